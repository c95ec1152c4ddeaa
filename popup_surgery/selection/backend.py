"""What ranks: the protocol of a backend, and the one place that chooses one by where the scores are."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from . import cpu, gpu
from .bits import Found


class Backend(Protocol):
    """Ranks all layers of a group in one call. The modules `cpu` and `gpu` are backends; an object may be one too."""

    def select(self, scores: Sequence[Tensor], kept: int) -> Found:
        """What `selection.select` asks for, which has checked the arguments.

        A backend whose `holds` never says yes gives −1 for the threshold and the last tie.
        """

    def holds(self, found: Found, scores: Sequence[Tensor], only: int | None) -> bool:
        """True only where `select` would find the same masks for these scores; with `only`, for that member's."""


def backend_of(tensors: Sequence[Tensor]) -> Backend:
    """The backend for scores, and masks, that are where these tensors are; a group spread over devices is the GPU's."""
    return cpu if all(tensor.device.type == "cpu" for tensor in tensors) else gpu
