"""The file in which `popup-surgery sanity` leaves its table, for the model card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact.manifest import Manifest
from ..atomic import write_atomically
from .escape import clean


@dataclass(frozen=True)
class SanityTable:
    """The table of an artifact: its rows, the head first, and the lines below it."""

    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    @classmethod
    def beside(cls, artifact: Path, sha256: str) -> "SanityTable | None":
        """Read the table beside an artifact's file; None if there is none, or if it is of another artifact."""
        try:
            values = json.loads(sanity_file(artifact).read_text(encoding="utf-8"))
            rows = tuple(tuple(map(clean, row)) for row in values["table"])
            notes = tuple(map(clean, values["notes"]))
            same = values["manifest_sha256"] == sha256
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        whole = len(rows) > 1 and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1
        return cls(rows, notes) if same and whole else None


def sanity_file(artifact: Path) -> Path:
    """Return the file of the table of an artifact: beside it."""
    return artifact.with_name(f"{artifact.name.partition('.')[0]}.sanity.json")


def write_sanity(path: Path, manifest: Manifest, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Write the table of an artifact. It has the artifact's digest, so that no other takes it for its own."""
    digest = manifest.text()["manifest_sha256"]
    values = {"manifest_sha256": digest, "table": list(map(list, rows)), "notes": list(notes)}
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
