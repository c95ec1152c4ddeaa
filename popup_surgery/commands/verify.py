import os
from typing import Annotated

from ..hub import is_address
from .shared import Base, File, a_file, busy, show


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    base: Base = None,
) -> int:
    """Rebuild everything in an artifact and compare it with its digests. The exit status is 1 if something differs.

    A dash marks what cannot be checked.

    \b
    $ popup-surgery verify digits.popup.safetensors
    ok    manifest, masks, stored tensors  match their digests
    ok    masked weights                   23,568 of 5 layers, rebuilt from seed 0
    ok    architecture                     popup_surgery/conv2 takes every tensor
    ok    probe                            output differs by 0.0e+00 of its largest value; allowed 0.001
    """
    with busy("rebuilding"):
        from ..artifact import Artifact, verify
        from ..artifact.container import located, open_file
        from ..artifact.reader import naming
        from ..errors import ArtifactError, PopupError

        found = located(artifact)
        with naming(artifact):
            open_file(found).close()
        if base is not None and not is_address(base) and not os.path.isfile(base):
            raise PopupError(f"--base is {base}, which does not exist")
        try:
            result = verify(Artifact.open(found), base=base)
        except ArtifactError as error:
            show(f"FAIL  {error}")
            return 1
    show(str(result))
    return 0 if result else 1
