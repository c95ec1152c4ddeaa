"""Files that are either the old one or the whole new one, never a half."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import PopupError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file beside `path`, bring it to the disk, and put it in `path`'s place.

    Raises:
        PopupError: the folder does not exist, cannot be written, or the disk is full; `path` is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp keeps others out, which is not what a shared file is for
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        before = "; the file that was there is unchanged" if path.exists() else ""
        raise PopupError(f"{path} cannot be written: {error.strerror or error}{before}") from error
    except BaseException:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise
