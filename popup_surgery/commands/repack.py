from pathlib import Path
from typing import Annotated

import typer

from .shared import busy, new_file, show, size


def run(
    artifact: Annotated[Path, typer.Argument(help="A popup artifact.")],
    encoding: Annotated[
        str, typer.Option(help="How the masks are stored: bitpack, or range_coded, which is smaller if k is not 0.5.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an artifact again, with its masks in another encoding. No bit of the network changes.

    \b
    $ popup-surgery repack conv4.popup.safetensors --encoding range_coded -o conv4.coded.popup.safetensors
    wrote conv4.coded.popup.safetensors, 271 kB; conv4.popup.safetensors has 307 kB
    """
    new_file(output, force, ["", ".safetensors"], reads=[artifact])
    with busy("repacking"):
        from ..artifact import repack

        repack(artifact, output, encoding=encoding)
    show(f"wrote {output}, {size(output)}; {artifact} has {size(artifact)}")
