"""The weights of a group that are not fixed, which alone are ranked."""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from ..weights.fixed import FREE, KEPT, Fixed


@dataclass(frozen=True)
class FixedTensor:
    """Which weights of one tensor are fixed: how many of `numel`, and the stream that chooses them."""

    dropped: int
    kept: int
    numel: int
    seed: int
    stream: str


class _Places(NamedTuple):
    """What becomes of a tensor's weights, in row-major order, on one device.

    Attributes:
        free: indices of those that are not fixed, in ascending order, int64.
        kept: whether a weight is fixed as kept: bool [n].
    """

    free: Tensor
    kept: Tensor


class FreeWeights:
    """Which weights of the tensors in a group are free. While it lives, groups of the same tensors share it.

    An operator of a compiled graph takes it as a text. So no tensor of it is part of a network or of a graph.

    Attributes:
        members: the tensors, in the order of the group.
        text: from which `read` gives this object.
    """

    def __init__(self, members: Sequence[FixedTensor], text: str) -> None:
        self.members, self.text = tuple(members), text
        self._places: dict[tuple[int, torch.device], _Places] = {}

    @classmethod
    def of(cls, members: Sequence[FixedTensor]) -> "FreeWeights":
        """Return the free weights of these tensors."""
        return cls.read(json.dumps([astuple(member) for member in members]))

    @classmethod
    def read(cls, text: str) -> "FreeWeights":
        """Return the object whose `text` this is."""
        found = _KNOWN.get(text)
        if found is None:
            found = _KNOWN[text] = cls([FixedTensor(*member) for member in json.loads(text)], text)
        return found

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return FreeWeights.read, (self.text,)

    @property
    def kept(self) -> int:
        """How many weights of the group are always kept."""
        return sum(member.kept for member in self.members)

    @property
    def dropped(self) -> int:
        """How many weights of the group never take part."""
        return sum(member.dropped for member in self.members)

    def scores(self, index: int, score: Tensor) -> Tensor:
        """Return the scores of a member's free weights, with one dimension, in row-major order."""
        return score.detach().reshape(-1).index_select(0, self._on(index, score.device).free)

    def mask(self, index: int, chosen: Tensor, score: Tensor) -> Tensor:
        """Return a member's whole mask: bool, of its score's shape and strides.

        Args:
            chosen: which of its free weights are kept, bool.
        """
        places = self._on(index, score.device)
        mask = places.kept.index_put((places.free,), chosen).view(score.shape)
        return mask if mask.stride() == score.stride() else torch.empty_like(score, dtype=torch.bool).copy_(mask)

    def obeyed_by(self, index: int, mask: Tensor) -> bool:
        """Return whether a mask of a member keeps and drops what is fixed."""
        places = self._on(index, mask.device)
        flat = mask.reshape(-1)
        return torch.equal(places.kept.index_put((places.free,), flat.index_select(0, places.free)), flat)

    def _on(self, index: int, device: torch.device) -> _Places:
        if (index, device) not in self._places:
            one = self.members[index]
            fates = [*Fixed(one.dropped, one.kept).fates(one.numel, one.seed, one.stream)]
            whole = torch.from_numpy(np.concatenate(fates))
            self._places[index, device] = _Places(
                (whole == FREE).nonzero().view(-1).to(device), (whole == KEPT).to(device)
            )
        return self._places[index, device]


_KNOWN: WeakValueDictionary[str, FreeWeights] = WeakValueDictionary()
