"""What several commands need: the console, progress, and files that must not be lost."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import PopupError

messages = Console(stderr=True, highlight=False)

STOPPED = "POPUP_SURGERY_STOPPED"  # names the file by which processes of a run tell who launched them that it can go on


def show(*things: object) -> None:
    """Print text and tables on stdout, as wide as they are where that is no terminal."""
    wide = None if sys.stdout.isatty() else 200
    console = Console(file=io.StringIO(), width=wide, force_terminal=False, color_system=None)
    console.print(*things, sep="\n", markup=False, highlight=False, soft_wrap=all(isinstance(t, str) for t in things))
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        print(printable(line.rstrip()), flush=True)


def printable(text: str) -> str:
    """`text` without what could steer the terminal, which names in a stranger's file may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


@contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, or nothing where there is no terminal; gone when it is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A word on the terminal while something takes its time."""
    if not messages.is_terminal:
        yield
        return
    with messages.status(what):
        yield


def new_file(path: Path, force: bool) -> Path:
    """`path`, unless a file is there and `force` is not given."""
    if path.exists() and not force:
        raise PopupError(f"{path} exists already; pass --force to replace it, or another name with -o")
    return path


def size(path: Path) -> str:
    """A file's size for people."""
    count = path.stat().st_size
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1000:,.0f} kB"
