import os
from pathlib import Path
from typing import Annotated

import typer

from .shared import busy, show


def run(
    artifact: Annotated[Path, typer.Argument(help="A popup artifact.")],
    base: Annotated[Path | None, typer.Option(help="File of the pretrained weights under the mask.")] = None,
) -> int:
    """Rebuild everything in an artifact and compare it with its digests. The exit status is 1 if something differs.

    \b
    $ popup-surgery verify digits.popup.safetensors
    ok    manifest, masks, stored tensors  match their digests
    ok    masked weights                   23,568 of 5 layers, rebuilt from seed 0
    ok    architecture                     popup_surgery/conv2 takes every tensor
    ok    probe                            output differs by 0.0e+00 of its largest value; allowed 0.001
    """
    with busy("rebuilding"):
        from ..artifact import verify
        from ..artifact.container import open_file
        from ..artifact.reader import naming
        from ..errors import ArtifactError, PopupError

        with naming(artifact):
            open_file(artifact).close()
        if base is not None and not os.path.isfile(base):
            raise PopupError(f"--base is {base}, which does not exist")
        try:
            result = verify(artifact, base=base)
        except ArtifactError as error:
            show(f"FAIL  {error}")
            return 1
    show(str(result))
    return 0 if result else 1
