"""Helpers of several commands: the console, progress, and a guard against overwriting files."""

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..atomic import check_writable
from ..errors import PopupError
from ..plugins import load_plugins

messages = Console(stderr=True, highlight=False)

# names the file by which the processes of a run tell their launcher that it is resumable, or else their status
STOPPED = "POPUP_SURGERY_STOPPED"


if TYPE_CHECKING:
    File = str | Path
else:
    File = type("file", (), {})  # typer takes no union, and shows this name


def as_file(text: str) -> str | Path:
    """Return a file's path; an address such as `hf://user/repo` as it is, because a Path would take a slash from it."""
    return text if "://" in text else Path(text)


def a_file(help: str) -> Any:
    """Return the argument of a command that takes a file, which may be on the Hub; its annotation is `File`."""
    return typer.Argument(parser=as_file, help=help)


EncodingOption = Annotated[
    str,
    typer.Option(
        help="How the masks are stored: bitpack; range_coded, which is smaller if k is not 0.5; or pattern_coded, the "
        "smallest for masks of a pattern such as 2:4."
    ),
]
Base = Annotated[File | None, typer.Option(parser=as_file, help="File of the pretrained weights under the mask.")]


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


Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE_OR_MODULE",
        help="Python file or module to import first, which registers a learner or the like; repeatable.",
    ),
]


def with_import(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the option `--import`."""

    @functools.wraps(run)
    def call(*, import_: list[str] | None, **given: Any) -> Any:
        load_plugins(import_ or [])
        return run(**given)

    signature = inspect.signature(run)
    option = inspect.Parameter("import_", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Import)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    call.__annotations__ = {**run.__annotations__, "import_": Import}
    return call


def replace_unprintable(stream: object) -> None:
    """Let a stream replace what its encoding lacks, such as the × of a table in ASCII, instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
        stream.reconfigure(errors="replace")


def shown_by(stream: object, text: str) -> str:
    """Return `text` with ? for whatever the encoding of a stream lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


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


def new_file(path: Path, force: bool, suffixes: Iterable[str] = (), *, reads: Iterable[str | Path | None] = ()) -> Path:
    """Return `path` if a command may write it. Called before the work, so that no work is lost.

    Args:
        path: the file to write.
        force: replace a file that is there.
        suffixes: the suffixes that it may have, the empty one for none; any if not given.
        reads: the files and folders that the command reads. None of them, and no file in them, is replaced.

    Raises:
        PopupError: it has another suffix, it is one of the command's inputs, something is there and `force` is not
            given, or it cannot be written.
    """
    expected = tuple(suffixes)
    if expected and path.suffix.lower() not in expected:
        named = " or ".join(suffix for suffix in expected if suffix)
        raise PopupError(f"-o is {path}; expected a name that ends in {named}")
    for source in reads:
        if source is not None and _is_or_is_in(path, Path(source)):
            how = "is in" if os.path.isdir(source) else "is"
            raise PopupError(f"-o {path} {how} {source}, which the command reads; choose another name with -o")
    if os.path.exists(path) and not force:
        raise PopupError(f"{path} exists already; pass --force to replace it, or choose another name with -o")
    check_writable(path)
    return path


def _is_or_is_in(path: Path, source: Path) -> bool:
    """Return whether `path` is an existing file that is `source`, or is in the folder `source`, whatever its name."""
    if not os.path.exists(path) or not os.path.exists(source):
        return False
    return os.path.samefile(path, source) or (os.path.isdir(source) and path.resolve().is_relative_to(source.resolve()))


def refuse_file(name: str, wanted: str) -> None:
    """Raise `PopupError`, which says what the file is and what takes it, if the name that was `wanted` is a file's."""
    if os.path.exists(name) and Path(name).suffix not in (".yaml", ".yml", ""):
        from ..artifact.container import what_is

        raise PopupError(f"{name} is not a {wanted} but {what_is(name)}")


def size(path: Path) -> str:
    """Return the size of a file in human-readable form."""
    return amount(path.stat().st_size)


def amount(count: int) -> str:
    """Return a number of bytes in human-readable form."""
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1000:,.0f} kB"
