import json
from pathlib import Path
from typing import Annotated

import typer

from ..plots import PICTURES
from ..signals import interruptible
from .shared import Base, File, a_file, new_file, progress, show


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of inputs of a pass; repeatable; default: 1 and 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way with each number of inputs.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: as many as PyTorch uses by itself.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Measure the export with --fast too.")] = False,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width of the images, if the file does not say them."),
    ] = None,
    base: Base = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Picture to write.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing picture.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure time, memory and bytes of each way to run an artifact's network on this machine, and print a table.

    \b
    $ popup-surgery bench digits.popup.safetensors
    """
    if output is not None:
        new_file(output, force, PICTURES, reads=[artifact, base])
    with interruptible():
        from ..experiment.bench import bench

        found = bench(
            artifact, batches=batch or (1, 8), rounds=rounds, threads=threads, fast=fast, input_size=input_size,
            base=base, progress=progress,
        )  # fmt: skip
    if output is not None:
        found.draw(output)
    if json_:
        print(json.dumps(found.to_json(), indent=2))
    else:
        show(str(found), *([f"wrote {output}"] if output is not None else []))
