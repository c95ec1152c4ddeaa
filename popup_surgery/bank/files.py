"""The masks of a folder, by the names of their tasks."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import ArtifactError
from ..hub import suggestion

SUFFIX = ".popup.safetensors"

Files = dict[str, str | Path]


def files_of(folder: str | Path) -> Files:
    """Return the popup artifacts in a folder and its folders, in alphabetical order, by task as `named` names them.

    Raises:
        ArtifactError: it is no folder, or has no popup artifact.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "not a folder" if os.path.exists(root) else "not there"
        raise ArtifactError(f"{folder} is {what}; expected a folder of popup artifacts{suggestion(folder)}")
    files = sorted(path for path in root.rglob(f"*{SUFFIX}") if path.is_file())
    if not files:
        raise ArtifactError(f"{folder} has no file that ends in {SUFFIX}, nor have its folders")
    return named({path.relative_to(root).as_posix(): path for path in files})


def named(files: Mapping[str, str | Path]) -> Files:
    """Return files by the names of their tasks: their own names without the suffix, with the folders in between.

    If all have one name in several folders, as in a sweep's folder, the folders alone are the names.

    Args:
        files: by their paths in the folder or repository, with slashes.
    """
    one = len({path.rpartition("/")[2] for path in files}) == 1 < len(files)
    return {path.rpartition("/")[0] if one else path.removesuffix(SUFFIX): file for path, file in files.items()}
