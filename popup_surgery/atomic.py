"""Atomic writes: a path has either the old file or the complete new one, never a part of it."""

import errno
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import PopupError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def check_writable(path: str | Path) -> None:
    """Check, before any work, that `write_atomically` can write `path`. Nothing stays on the disk.

    Raises:
        PopupError: the name is too long, a folder or a device has it, its folder does not exist, or is not writable.
    """
    path = _here(path)
    try:
        with suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "it is no ordinary file")
        handle, temporary = _temporary(path)
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise PopupError(f"{path} cannot be written: {error.strerror or error}") from error
    except ValueError as error:  # of a name with a null byte
        raise PopupError(f"{str(path)!r} cannot be written: {error}") from error


def _here(path: str | Path) -> Path:
    """Return `path`; a `PopupError` if it is an address on the Hub, with both slashes or with one, as a Path has it."""
    if re.match("hf:/", str(path)):
        raise PopupError(f"{path} is an address on the Hub; write a file here, and publish it with popup-surgery push")
    return Path(path)


def _temporary(path: Path) -> tuple[int, str]:
    """Make a temporary file beside `path`. Its name begins like that of `path`, and is not too long if that is not."""
    return tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a new file beside `path`, flush it to disk, and move it to `path`.

    Raises:
        PopupError: the folder does not exist or cannot be written to, or the disk is full. `path` is unchanged.
    """
    path = _here(path)
    temporary = None
    try:
        handle, temporary = _temporary(path)
        with os.fdopen(handle, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes the file private; give it the usual permissions
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        missing = ""
        if temporary is not None:
            left = len(data) - os.stat(temporary).st_size
            if error.errno in _FULL and left:
                missing = f"; {left:,} of {len(data):,} bytes did not fit"
            Path(temporary).unlink(missing_ok=True)
        before = "; the file that was there is unchanged" if os.path.exists(path) else ""
        raise PopupError(f"{path} cannot be written: {error.strerror or error}{missing}{before}") from error
    except BaseException:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, if the system can."""
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
