"""Ways to learn a mask: one file each, registered by name."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..deprecated import warn_of_methods
from ..errors import ConversionError, nearest, unknown
from .base import Learner
from .dnw import DNW
from .edge_popup import EdgePopup
from .random_mask import RandomMask
from .sampling import sampled
from .supermask import Supermask

__all__ = [
    "DNW",
    "LEARNERS",
    "EdgePopup",
    "Learner",
    "RandomMask",
    "Supermask",
    "get_learner",
    "register_learner",
    "sampled",
]

LEARNERS: dict[str, Learner] = {}


def register_learner(name: str, learner: Learner) -> None:
    """Make `learner` known as `name`; a name that is taken fails at once, and so do attributes that contradict."""
    if name in LEARNERS:
        raise ValueError(f"the learner {name!r} is registered already")
    if learner.redraws and not learner.learns_weights:
        raise ValueError(f"the learner {name!r} redraws weights, which no file of a seed holds: set learns_weights too")
    warn_of_methods(learner)
    LEARNERS[name] = learner


def get_learner(name: str, options: Mapping[str, Any] | None = None) -> Learner:
    """The learner called `name`, with some of its options set.

    Raises:
        UnknownName: there is none; the message lists the nearest.
        ConversionError: it has no such option, or the option no such value.
    """
    if not isinstance(name, str) or name not in LEARNERS:
        raise unknown("learner", name, LEARNERS)
    learner = LEARNERS[name]
    if options is not None and not isinstance(options, Mapping):
        raise ConversionError(f"learner_options is {options!r}; expected a mapping from names to values")
    known: list[str] = [field.name for field in fields(learner)] if is_dataclass(learner) else []
    for option in options or {}:
        if option not in known:
            raise ConversionError(f"{name} has no option {option!r}; nearest: {nearest(str(option), known) or 'none'}")
    return replace(learner, **options) if options else learner  # type: ignore[type-var]


register_learner("edge_popup", EdgePopup())
register_learner("supermask", Supermask())
register_learner("dnw", DNW())
register_learner("random", RandomMask())
