"""The protocol of a ranking backend, and the choice of a backend by the device of the scores."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from . import cpu, gpu
from .bits import Found


class Backend(Protocol):
    """Ranks all layers of a group in one call. The modules `cpu` and `gpu` are backends; an object can be one too."""

    def select(self, scores: Sequence[Tensor], kept: int) -> Found:
        """Select as `selection.select` promises, which has checked the arguments.

        A backend whose `holds` never returns True gives −1 for the threshold and the last tie.
        """

    def holds(self, found: Found, scores: Sequence[Tensor], only: int | None) -> bool:
        """Return True only if `select` would find the same masks for these scores; with `only`, that member's mask."""


def backend_of(tensors: Sequence[Tensor]) -> Backend:
    """Return the backend for scores and masks on these tensors' devices: `gpu`, unless all are on the CPU."""
    return cpu if all(tensor.device.type == "cpu" for tensor in tensors) else gpu
