"""Checkpoints: tensors as safetensors, everything else as JSON. A checkpoint is complete or absent.

A checkpoint is two files, `<step>.safetensors` and `<step>.json`. The JSON is written last and contains the digests
of both. A checkpoint without its JSON, or one whose digests do not match, does not count.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..atomic import write_atomically
from ..errors import RunError
from ..selection.shards import whole

FORMAT = 2  # format 1 packed the bits of masks in the opposite order
PACKED = ("before.", "ticket.")  # prefixes of the names of packed masks
KEPT = 2
_REVERSED = torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=torch.uint8)
_NAME = re.compile(r"(\d{10})\.json")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to resume: tensors by name, and a JSON object."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of `step` and remove all but the newest two.

    Raises:
        PopupError: it cannot be written; the earlier checkpoints stay.
    """
    folder.mkdir(exist_ok=True)
    data = save(checkpoint.tensors)
    body = {"format": FORMAT, "tensors_sha256": hashlib.sha256(data).hexdigest(), **checkpoint.state}
    text = json.dumps(body | {"sha256": _digest(body)}, sort_keys=True, allow_nan=False)
    file = folder / file_of(step)
    write_atomically(file.with_suffix(".safetensors"), data)
    write_atomically(file, text.encode())
    kept = {number for number, _ in _found(folder)[:KEPT]}
    for path in sorted(folder.iterdir()):  # .json before .safetensors
        if path.stem.isdigit() and int(path.stem) not in kept:
            path.unlink()


def read(path: Path) -> Checkpoint:
    """Read the checkpoint whose JSON file is `path`.

    Raises:
        RunError: it is damaged, as the message explains, or has an unknown format.
    """
    try:
        state = json.loads(path.read_bytes())
        digest, expected = state.pop("sha256"), state["tensors_sha256"]
        data = path.with_suffix(".safetensors").read_bytes()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from error
    if digest != _digest(state) or hashlib.sha256(data).hexdigest() != expected:
        wrong = path if digest != _digest(state) else path.with_suffix(".safetensors")
        raise RunError(f"{wrong} is damaged: its digest does not match")
    if state["format"] not in (1, FORMAT):
        raise RunError(f"{path} has the format {state['format']}; this version reads 1 and {FORMAT}")
    tensors = load(data)
    if state["format"] == 1:
        tensors |= {key: _REVERSED[bits.long()] for key, bits in tensors.items() if key.startswith(PACKED)}
    return Checkpoint(tensors, state)


def file_of(step: int) -> str:
    """Return the name of the JSON file of the checkpoint after `step` steps."""
    return f"{step:010}.json"


def discard(path: Path) -> None:
    """Remove the checkpoint whose JSON file is `path`."""
    path.unlink()
    path.with_suffix(".safetensors").unlink(missing_ok=True)


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor] | None) -> Any:
    """Return nested dicts, lists, tuples, plain values and dtypes in a form that JSON can represent.

    Args:
        tree: the values; tensors among them are moved to `tensors`.
        prefix: how the names of these tensors begin.
        tensors: receives the tensors by name, whole and on the CPU; None in a process that only helps to gather them.

    Raises:
        RunError: a value is of another type.
    """
    if isinstance(tree, Tensor):
        tensor = whole(tree)
        if tensors is not None:
            tensors[prefix] = tensor.cpu().contiguous()
        return {"tensor": prefix}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}
    if isinstance(tree, dict):
        return {"items": [[key, pack(value, f"{prefix}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [pack(value, f"{prefix}.{i}", tensors) for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"tuple": values}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise RunError(f"{prefix} is a {type(tree).__name__}, which a checkpoint cannot hold")


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `pack` was given."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dtype" in tree:
        return _dtype(tree["dtype"])
    if "float" in tree:
        return float(tree["float"])
    return tuple(unpack(tree["tuple"], tensors)) if "tuple" in tree else dict(unpack(tree["items"], tensors))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise RunError(f"a checkpoint names the dtype {name!r}, which PyTorch {torch.__version__} does not have")
    return found


def newest_first(folder: Path) -> Iterator[Path]:
    """Return the JSON files of the checkpoints in `folder`, newest first, including damaged ones."""
    return (path for _, path in _found(folder))


def _found(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.json"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
