from pathlib import Path
from typing import Annotated

import typer

from .shared import Base, File, a_file, busy, new_file, show, size


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Dense safetensors file to write.")],
    base: Base = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an artifact's network as a dense safetensors file for timm.create_model(…, checkpoint_path=…).

    \b
    $ popup-surgery export digits.popup.safetensors -o digits.safetensors
    wrote digits.safetensors, 95 kB: 5 tensors of popup_surgery/conv2
    """
    new_file(output, force, [".safetensors"], reads=[artifact, base])
    with busy("rebuilding"):
        from ..artifact import Artifact
        from ..experiment.dense import write_dense

        opened = Artifact.open(artifact)
        architecture = opened.manifest.architecture
        count = write_dense(opened.network(base=base), output, opened.manifest.provenance)
    show(f"wrote {output}, {size(output)}: {count} tensors of {architecture.library}/{architecture.name}")
