"""The private part of typer that the command line uses. `tests/test_compat.py` tests it."""

from typing import Any

import typer

UsageError: Any = typer.BadParameter.__mro__[1]
"""The error of every bad use of the command line; its `show()` prints the usage and one sentence.

typer publishes only the class below it. Above it stands click's own in older versions, and in newer ones that of a copy
of click inside typer. Tried on typer 0.29."""
