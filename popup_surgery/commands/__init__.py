"""The command line: one file for each subcommand. torch is imported only when a command runs."""

import io
import logging
import os
import re
import sys
from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import PopupError, Stopped
from ..signals import command
from ..typer_compat import UsageError
from . import (
    bank,
    bench,
    card,
    combine,
    convert,
    diff,
    evaluate,
    export,
    inspect,
    list_,
    predict,
    push,
    recipes,
    repack,
    reproduce,
    sanity,
    sweep,
    train,
    verify,
    zoo,
)
from .shared import STOPPED, printable, replace_unprintable, shown_by, with_import

INTERRUPTED = 130  # exit status


class _Group(TyperGroup):
    """All commands. Help is in characters that stdout can show: typer writes UTF-8 where that is ASCII."""

    def get_help(self, ctx: Any) -> str:
        return shown_by(sys.stdout, super().get_help(ctx))


class _Command(TyperCommand):
    """One command, with such a help."""

    def get_help(self, ctx: Any) -> str:
        return shown_by(sys.stdout, super().get_help(ctx))


app = typer.Typer(
    name="popup-surgery",
    cls=_Group,
    help="Turn any network into a hidden one: random frozen weights, a learned mask, one small file to share.",
    epilog="\b\n$ popup-surgery convert fc --in-chans 1 --k 0.1 --no-scaled -o fc.popup.safetensors\n"
    "3 layers masked, 266,200 weights, 26,620 kept (10.0%)\n"
    "0 tensors not masked, 0 parameters; 100.00% of all parameters are masked\n"
    "signed_kaiming_constant, seed 0, edge_popup, ranked layer by layer\n"
    "wrote fc.popup.safetensors, 35 kB",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for each in (
    convert,
    train,
    sweep,
    reproduce,
    evaluate,
    predict,
    sanity,
    inspect,
    verify,
    diff,
    bank,
    combine,
    export,
    bench,
    repack,
    push,
    list_,
    card,
    recipes,
    zoo,
):
    text, _, example = (each.run.__doc__ or "").partition("\b")
    name = each.__name__.rsplit(".", 1)[-1].removesuffix("_")
    app.command(name, cls=_Command, help=text, epilog="\b\n" + cleandoc(example))(with_import(each.run))


def _version(asked: bool) -> None:
    if asked:
        print(f"popup-surgery {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> int:
    """Run the command line.

    Returns the exit status: 0; 1 if the answer is no; 2 for bad use, after one sentence on stderr; 75 if a run can be
    resumed; 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        replace_unprintable(stream)
    # huggingface_hub reads it when it is imported: one sentence says what went wrong, without a line for each try
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        with command():
            status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
        return status
    except UsageError as error:
        shown = io.StringIO()
        error.show(shown)
        print(re.sub("^Error: ", "error: ", shown.getvalue(), flags=re.MULTILINE), end="", file=sys.stderr)
        return 2
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{error}; resume with the same command and --resume", file=sys.stderr)
        if STOPPED not in os.environ:
            return error.status
        Path(os.environ[STOPPED]).touch()
        return 0
    except PopupError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(printable(f"error: {error.filename}: {error.strerror}"), file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
