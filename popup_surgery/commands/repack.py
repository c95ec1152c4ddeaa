from pathlib import Path
from typing import Annotated

import typer

from .shared import EncodingOption, File, a_file, busy, new_file, show, size


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    encoding: EncodingOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an artifact again, with its masks in another encoding. No bit of the network changes.

    \b
    $ popup-surgery repack conv4.popup.safetensors --encoding range_coded -o conv4.coded.popup.safetensors
    wrote conv4.coded.popup.safetensors, 271 kB: 0.881 bits a weight, where it was 1.000
    """
    new_file(output, force, ["", ".safetensors"], reads=[artifact])
    with busy("repacking"):
        from ..artifact import Artifact

        opened = Artifact.open(artifact)
        opened.write(output, encoding)
        weights = max(1, opened.manifest.weights)
        before, after = ((each.mask_bits or 0) / weights for each in (opened, Artifact.open(output)))
    show(f"wrote {output}, {size(output)}: {after:.3f} bits a weight, where it was {before:.3f}")
