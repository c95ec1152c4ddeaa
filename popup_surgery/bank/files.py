"""The masks of a folder, by the names of their tasks."""

import os
from pathlib import Path

from ..errors import ArtifactError

SUFFIX = ".popup.safetensors"


def files_of(folder: str | Path) -> dict[str, str | Path]:
    """Return the popup artifacts in a folder and its folders, in alphabetical order, by task.

    A task has the name of its file without the suffix, with the folders in between. If all files have one name, as in
    a sweep's folder, the folders alone are the names.

    Raises:
        ArtifactError: it is no folder, or has no popup artifact.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "not a folder" if os.path.exists(root) else "not there"
        raise ArtifactError(f"{folder} is {what}; expected a folder of popup artifacts")
    files = sorted(path for path in root.rglob(f"*{SUFFIX}") if path.is_file())
    if not files:
        raise ArtifactError(f"{folder} has no file that ends in {SUFFIX}, nor have its folders")
    one = len({path.name for path in files}) == 1 < len(files)
    names = [path.relative_to(root) for path in files]
    return {(name.parent if one else name).as_posix().removesuffix(SUFFIX): path for name, path in zip(names, files)}
