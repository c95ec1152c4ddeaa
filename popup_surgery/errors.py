"""Every error that a user of popup-surgery can cause. Each message is one clear sentence."""

import difflib
from collections.abc import Iterable, Sequence


class PopupError(Exception):
    """Base class of all errors that popup-surgery raises on purpose."""


class ConversionError(PopupError, ValueError):
    """A network cannot be converted as asked: a bad k, pattern or scheme, or a layer that cannot be swapped."""


class NothingToConvert(ConversionError):
    """No layer of the network can be masked, or the patterns leave none."""


class UnknownName(PopupError, LookupError):
    """A name (scheme, learner, architecture, recipe, …) is in no registry."""


class MaskedWeightError(PopupError, RuntimeError):
    """A masked weight was assigned or written to. Only its scores can change it, and one held as bits nothing can."""


class ArtifactError(PopupError, ValueError):
    """A file is not a popup artifact, is damaged, or does not belong to the given network."""


class HubError(PopupError, RuntimeError):
    """A repository or file on the Hugging Face Hub cannot be read or written; the message says what to do."""


class RecipeError(PopupError, ValueError):
    """A recipe has unknown keys or bad values. The message lists all of them."""


class DataError(PopupError, ValueError):
    """A data set is missing or does not match the recipe."""


class RunError(PopupError, RuntimeError):
    """A training run cannot start or continue."""


class Stopped(RunError):
    """A run was told to stop. It has saved a checkpoint, and `resume` continues from it."""

    status = 75  # exit code of the command line: "try again later" in sysexits.h


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names in one line, and how many more there are than `most`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return the `n` choices nearest to `name`, as text for an error message."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lower, n, cutoff=0.4) or sorted(lower)[:n]
    return ", ".join(lower[found] for found in near)


def unknown(kind: str, name: object, choices: Iterable[str]) -> UnknownName:
    """Return an `UnknownName` for `name` that lists the nearest of `choices`."""
    return UnknownName(f"unknown {kind} {name!r}; the nearest known: {nearest(str(name), choices)}")


def some(names: Iterable[str], n: int = 10) -> str:
    """Return the first `n` names as text, and how many more there are."""
    found = list(names)
    return ", ".join(found[:n]) + (f" and {len(found) - n} more" if len(found) > n else "")
