"""The masks of a folder, by the names of their tasks."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import ArtifactError
from ..hub import is_address, suggestion

SUFFIX = ".popup.safetensors"


def files_of(folder: str | Path) -> dict[str, str | Path]:
    """Return the popup artifacts in a folder and its folders, in alphabetical order, by task.

    The folder may be a repository on the Hub, such as `hf://user/repo`.

    A task has the name of its file without the suffix, with the folders in between. If all files have one name, as in
    a sweep's folder, the folders alone are the names.

    Raises:
        ArtifactError: it is no folder, or has no popup artifact.
        HubError: the repository cannot be read, or has no popup artifact.
    """
    if is_address(folder):
        from ..hub.files import artifacts

        return _by_task({Path(address.path): str(address) for address in artifacts(str(folder))})
    root = Path(folder)
    if not root.is_dir():
        what = "not a folder" if os.path.exists(root) else "not there"
        raise ArtifactError(f"{folder} is {what}; expected a folder of popup artifacts{suggestion(folder)}")
    files = sorted(path for path in root.rglob(f"*{SUFFIX}") if path.is_file())
    if not files:
        raise ArtifactError(f"{folder} has no file that ends in {SUFFIX}, nor have its folders")
    return _by_task({path.relative_to(root): path for path in files})


def _by_task(files: Mapping[Path, str | Path]) -> dict[str, str | Path]:
    """Return files by the names of their tasks, which are in their paths."""
    one = len({path.name for path in files}) == 1 < len(files)
    return {(path.parent if one else path).as_posix().removesuffix(SUFFIX): file for path, file in files.items()}
