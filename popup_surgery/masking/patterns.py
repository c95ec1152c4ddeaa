"""Glob patterns on the names of modules and parameters."""

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import ConversionError, nearest
from .settings import Patterns


def several(patterns: Patterns) -> Sequence[str]:
    """Return one pattern, several, or none as a sequence."""
    return [patterns] if isinstance(patterns, str) else patterns or ()


def matches(name: str, pattern: str) -> bool:
    """Return whether `pattern` matches the module or parameter `name`, or a module that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def last_match(name: str, patterns: Collection[str]) -> str:
    """Return the last of the patterns that match the module `name`."""
    return [pattern for pattern in patterns if matches(name, pattern)][-1]


def check_patterns(given: Any, names: Collection[str], argument: str, what: str = "module", of: str = "layer") -> None:
    """Raise `ConversionError` unless `given` is patterns, each of which matches one of `names`.

    Args:
        argument: whose value `given` is.
        what, of: words for that on whose names there are patterns, and for one of `names`.
    """
    patterns = several(given)
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConversionError(f"{argument} is {given!r}; expected glob patterns on {what} names")
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConversionError(
                f"{argument} has {pattern!r}, which matches no {of}; nearest: {nearest(pattern, names)}"
            )
