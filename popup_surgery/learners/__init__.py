"""Learners, the ways to learn a mask: one file each, registered by name."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..deprecated import warn_of_methods
from ..errors import ConversionError, UnknownName, nearest
from ..plugins import load_entry_points
from .base import Learner
from .biprop import Biprop
from .coats import Coats
from .dnw import DNW
from .edge_popup import EdgePopup
from .gem_miner import GemMiner
from .piggyback import Piggyback
from .random_mask import RandomMask
from .sampling import sampled
from .signed import Signed
from .supermask import Supermask

__all__ = [
    "DNW",
    "LEARNERS",
    "Biprop",
    "Coats",
    "EdgePopup",
    "GemMiner",
    "Learner",
    "Piggyback",
    "RandomMask",
    "Signed",
    "Supermask",
    "get_learner",
    "register_learner",
    "sampled",
]

LEARNERS: dict[str, Learner] = {}


def register_learner(name: str, learner: Learner) -> None:
    """Register `learner` under `name`.

    Raises:
        ValueError: the name is taken, it is not a learner, or its attributes contradict each other.
    """
    if not isinstance(learner, Learner):
        what = f"the class {learner.__name__}" if isinstance(learner, type) else repr(learner)
        raise ValueError(f"the learner {name!r} is {what}; expected an instance of Learner, such as EdgePopup()")
    if name in LEARNERS:
        raise ValueError(f"the learner {name!r} is registered already")
    if learner.redraws and not learner.learns_weights:
        raise ValueError(
            f"the learner {name!r} redraws weights, which a file of a seed cannot hold; set learns_weights too"
        )
    warn_of_methods(learner)
    LEARNERS[name] = learner


def get_learner(name: str, options: Mapping[str, Any] | None = None) -> Learner:
    """Return the learner called `name`, with the given options set.

    Raises:
        UnknownName: there is no such learner; the message lists the nearest.
        ConversionError: the learner has no such option, or the option does not allow the value.
    """
    if not isinstance(name, str) or name not in LEARNERS:
        raise UnknownName(
            f"unknown learner {name!r}; the nearest known: {nearest(str(name), LEARNERS)}; for one of your own, "
            "name its file under plugins in the recipe, or by --import"
        )
    learner = LEARNERS[name]
    if options is not None and not isinstance(options, Mapping):
        raise ConversionError(f"learner_options is {options!r}; expected a mapping from names to values")
    known: list[str] = [field.name for field in fields(learner)] if is_dataclass(learner) else []
    for option in options or {}:
        if option not in known:
            hint = f"nearest: {nearest(str(option), known)}" if known else "it has no options"
            raise ConversionError(f"{name} has no option {option!r}; {hint}")
    return replace(learner, **options) if options else learner  # type: ignore[type-var]


def name_of(learner: Learner) -> str:
    """Return the name of a learner, or that of its class if none is registered."""
    return next((name for name, other in LEARNERS.items() if type(other) is type(learner)), type(learner).__name__)


register_learner("edge_popup", Coats())
register_learner("supermask", Supermask())
register_learner("dnw", DNW())
register_learner("piggyback", Piggyback())
register_learner("random", RandomMask())
register_learner("signed", Signed())
register_learner("gem_miner", GemMiner())
register_learner("biprop", Biprop())


def _take(name: str, found: Any) -> None:
    learner = found() if isinstance(found, type) else found
    if isinstance(learner, Learner) and name not in LEARNERS:  # otherwise its module has registered what it has
        register_learner(name, learner)


load_entry_points("learners", _take)
