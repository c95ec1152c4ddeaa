"""Readable names of a sweep's runs: what varies, as text, in tables and in the names of folders."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

LONGEST = 24, 100  # characters of one value, and bytes of a title: a file's name may have 255 bytes


class Named(Protocol):
    """What a run has that its title is made of."""

    @property
    def label(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...


def as_text(value: Any) -> str:
    """Return a grid value in human-readable form: text unchanged, everything else as YAML reads it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def titles(runs: Sequence[Named]) -> list[str]:
    """Return for each run what varies between the runs, such as `k=0.3,seed=1`, fit for a file's name.

    Keys are shortened to their last word where that is unique. The title of a single run is empty.
    """
    rows = [{"label": run.label, **{key: as_text(value) for key, value in run.values.items()}} for run in runs]
    if not any(key.endswith(".seed") for row in rows for key in row):
        rows = [{**row, "seed": str(run.seed)} for row, run in zip(rows, runs, strict=True)]
    keys = dict.fromkeys(key for row in rows for key in row)
    varied = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    short = {key: _shortest(key, varied) for key in varied}
    return [_title({short[key]: row[key] for key in varied if key in row}) for row in rows]


def _shortest(key: str, keys: Sequence[str]) -> str:
    """Return as many of the last words of a key as no other key ends with."""
    words = key.split(".")
    endings = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
    return next((end for end in endings if not any(o != key and f".{o}".endswith(f".{end}") for o in keys)), key)


def _title(values: Mapping[str, str]) -> str:
    parts = (value if key == "label" else f"{key}={value}" for key, value in _cut(values).items())
    text = ",".join(re.sub(r"[^\w.+=-]+", "_", part) for part in parts).lstrip(".-,")
    return text.encode(errors="replace")[: LONGEST[1]].decode(errors="ignore").rstrip("-,._")


def _cut(values: Mapping[str, str]) -> dict[str, str]:
    """Cut what is too long for a file's name; of a path, such as that of a network, its last part stays."""
    last = {key: value.rstrip("/").rpartition("/")[2] for key, value in values.items()}
    return {key: value.strip("{}[]\"' ")[: LONGEST[0]] for key, value in last.items()}


def find_folder(output: Path, name: str, new: str) -> str:
    """Return the name of the folder in `output` that ends with the hash `name`; `new` if there is none."""
    try:
        stamp = os.stat(output).st_mtime_ns
        return _folders(output, stamp).get(name, new)
    except OSError:
        return new


@lru_cache(maxsize=4)
def _folders(output: Path, stamp: int) -> dict[str, str]:
    """Return the folders in `output` by the hash at the end of their names. `stamp` is when their list last changed."""
    found: dict[str, str] = {}
    for entry in sorted(os.scandir(output), key=lambda entry: entry.name):
        ending = re.search(r"(?:^|-)([0-9a-f]{16})$", entry.name)
        if ending and entry.is_dir() and (ending[1] not in found or _has_result(entry.path)):
            found[ending[1]] = entry.name
    return found


def _has_result(path: str) -> bool:
    return any(name.endswith(".safetensors") for name in os.listdir(path))
