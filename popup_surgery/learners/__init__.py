"""Ways to learn a mask: one file each, registered by name."""

from ..errors import unknown
from .base import Learner
from .edge_popup import EdgePopup

__all__ = ["LEARNERS", "EdgePopup", "Learner", "get_learner", "register_learner"]

LEARNERS: dict[str, Learner] = {}


def register_learner(name: str, learner: Learner) -> None:
    """Make `learner` known as `name`; a name that is taken fails at once."""
    if name in LEARNERS:
        raise ValueError(f"the learner {name!r} is registered already")
    LEARNERS[name] = learner


def get_learner(name: str) -> Learner:
    """The learner called `name`; `UnknownName` lists the nearest."""
    if not isinstance(name, str) or name not in LEARNERS:
        raise unknown("learner", name, LEARNERS)
    return LEARNERS[name]


register_learner("edge_popup", EdgePopup())
