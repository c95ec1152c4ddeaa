from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .shared import Base, File, a_file, busy, new_file, show, size


class How(StrEnum):
    union = "union"
    intersection = "intersection"
    majority = "majority"


def run(
    files: Annotated[list[File], a_file("Two popup artifacts or more, of one network on one base.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Popup artifact to write.")],
    how: Annotated[How, typer.Option(help="Keep what any file keeps, what all keep, or what more than half keep.")],
    base: Base = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Combine the masks of several files into one, layer by layer. Everything else is that of the first file.

    \b
    $ popup-surgery combine a.popup.safetensors b.popup.safetensors --how union -o both.popup.safetensors
    union of 2 masks: 23,568 weights, 16,493 kept (70.0%)
    wrote both.popup.safetensors, 6,521 bytes
    """
    new_file(output, force, ("", ".safetensors"), reads=[*files, base])
    with busy("combining"):
        from ..bank.combine import combine

        manifest = combine(files, how.value, base=base).write(output)
    share = 100 * manifest.kept / manifest.weights
    show(
        f"{how.value} of {len(files)} masks: {manifest.weights:,} weights, {manifest.kept:,} kept ({share:.1f}%)",
        f"wrote {output}, {size(output)}",
    )
