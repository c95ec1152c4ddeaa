from pathlib import Path
from typing import Annotated

import typer

from .shared import Base, File, a_file, busy, new_file, show, size


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; its suffix, .safetensors, .onnx or .pt2, decides.")
    ],
    base: Base = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width of the images, if the file does not say them."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an artifact's network for timm (.safetensors), ONNX Runtime (.onnx) or torch.export.load (.pt2).

    \b
    $ popup-surgery export digits.popup.safetensors -o digits.onnx
    wrote digits.onnx, 98 kB: popup_surgery/conv2, differs by 4e-07 of the largest output
    """
    new_file(output, force, [".safetensors", ".onnx", ".pt2"], reads=[artifact, base])
    with busy("exporting"):
        from ..experiment.export import export, random_images

        example = None if input_size is None else random_images(input_size)
        done = export(artifact, output, base=base, example=example)
    if done.tensors is not None:
        show(f"wrote {output}, {size(output)}: {done.tensors} tensors of {done.network}")
    else:
        show(f"wrote {output}, {size(output)}: {done.network}, differs by {done.difference:.0e} of the largest output")
