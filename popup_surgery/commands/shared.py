"""Helpers of several commands: the console, progress, and a guard against overwriting files."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import PopupError

messages = Console(stderr=True, highlight=False)

STOPPED = "POPUP_SURGERY_STOPPED"  # names the file by which a run's processes tell their launcher that it is resumable


def show(*things: object) -> None:
    """Print text and tables on stdout, up to 200 columns wide if stdout is not a terminal."""
    wide = None if sys.stdout.isatty() else 200
    console = Console(file=io.StringIO(), width=wide, force_terminal=False, color_system=None)
    console.print(*things, sep="\n", markup=False, highlight=False, soft_wrap=all(isinstance(t, str) for t in things))
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        print(printable(line.rstrip()), flush=True)


def printable(text: str) -> str:
    """Return `text` without control characters, which a stranger's file may have in its names."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


@contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """Context manager: show a progress bar that disappears at the end, or nothing if stderr is not a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Context manager: show `what` with a spinner, or nothing if stderr is not a terminal."""
    if not messages.is_terminal:
        yield
        return
    with messages.status(what):
        yield


def new_file(path: Path, force: bool) -> Path:
    """Return `path` if nothing is there or `force` is given.

    Raises:
        PopupError: something is there, and `force` is not given.
    """
    if path.exists() and not force:
        raise PopupError(f"{path} exists already; pass --force to replace it, or choose another name with -o")
    return path


def size(path: Path) -> str:
    """Return the size of a file in human-readable form."""
    count = path.stat().st_size
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1000:,.0f} kB"
