"""Every error that a user of popup-surgery can cause, each one clear sentence."""

import difflib
from collections.abc import Iterable


class PopupError(Exception):
    """Base of all errors that popup-surgery raises on purpose."""


class ConversionError(PopupError, ValueError):
    """A network cannot be converted as asked: a bad k, pattern, scheme, or a layer that cannot be swapped."""


class NothingToConvert(ConversionError):
    """No layer of the network can be masked, or the patterns left none."""


class UnknownName(PopupError, LookupError):
    """A name (scheme, learner, architecture, recipe, …) that no registry has."""


class MaskedWeightError(PopupError, RuntimeError):
    """Somebody assigned or wrote to a masked weight, which only its scores can change."""


class ArtifactError(PopupError, ValueError):
    """A file is no popup artifact, is damaged, or does not belong to the network at hand."""


class RecipeError(PopupError, ValueError):
    """A recipe has unknown keys or bad values; the message lists all of them."""


class DataError(PopupError, ValueError):
    """A data set is missing or is not what the recipe says."""


class RunError(PopupError, RuntimeError):
    """A training run cannot start or go on."""


class Stopped(RunError):
    """A run was told to stop; it has kept a checkpoint, and `resume` goes on with it."""

    status = 75  # of the command line: "try again later", as sysexits.h has it


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """The `n` choices nearest to `name`, as text for an error message."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lower, n, cutoff=0.4) or sorted(lower)[:n]
    return ", ".join(lower[found] for found in near)


def unknown(kind: str, name: object, choices: Iterable[str]) -> UnknownName:
    """An `UnknownName` for `name` that says the nearest of `choices`."""
    return UnknownName(f"unknown {kind} {name!r}; the nearest known: {nearest(str(name), choices)}")
