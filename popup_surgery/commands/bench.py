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
    $ popup-surgery bench digits.popup.safetensors --threads 1
    inputs  way                   time of a pass    peak memory      in memory        file         outputs differ by
    1       PyTorch               0.0873 ms         4,751 kB         4,751 kB         7,730 bytes
    1       PyTorch, packed=True  0.629 ms × 7.21   5,992 kB × 1.26  5,992 kB × 1.26  7,730 bytes  0 %
    1       ONNX, float32         0.0375 ms × 0.43  11 MB × 2.29     11 MB × 2.29     98 kB × 13   4e-05 %
    8       PyTorch               0.365 ms          12 MB
    8       PyTorch, packed=True  1.07 ms × 2.94    13 MB × 1.11
    8       ONNX, float32         0.0668 ms × 0.18  11 MB × 0.95
    ONNX, --packed: not measured, because none of its layers is packed \
(a convolution too small to gain, a product too small to gain)
    popup_surgery/conv2, inputs of 1 × 8 × 8; medians of 5 rounds, in which the ways took turns
    AMD EPYC (avx2, fma, avx512f, avx512_vnni, avx512_bf16); 1 thread on 2 cores, load before 1.3
    """
    if output is not None:
        new_file(output, force, PICTURES, reads=[artifact, base])
    with interruptible():
        from ..experiment.bench import bench

        found = bench(
            artifact, batches=batch or (1, 8), rounds=rounds, threads=threads, fast=fast, input_size=input_size,
            base=base, progress=progress,
        )  # fmt: skip
    if json_:
        print(json.dumps(found.to_json(), indent=2), flush=True)
    else:
        show(str(found))
    if output is not None:
        found.draw(output)
        if not json_:
            show(f"wrote {output}")
