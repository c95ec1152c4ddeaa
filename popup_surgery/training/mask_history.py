"""How the masks of a run change."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ..codecs import bitpack
from ..codecs.bitpack import ones
from .metrics import LayerMask

Packed = np.ndarray[tuple[int], np.dtype[np.uint8]]


def packed(masks: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Return masks by name, packed into uint8 arrays at one bit per weight."""
    return {key: bitpack.pack(mask.cpu().numpy()) for key, mask in masks.items()}


class MaskHistory:
    """The masks of a run at one bit per weight: the `initial` ones, those `before` the last epoch, and the `latest`."""

    def __init__(self, masks: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None) -> None:
        self.numel = {key: mask.numel() for key, mask in masks.items()}
        self.before = self.latest = packed(masks)
        self.initial = self.latest if initial is None else packed(initial)

    def add(self, masks: Mapping[str, Tensor]) -> float:
        """Record the masks at the end of an epoch. Returns the share of bits that changed in it, 0 … 1."""
        self.before, self.latest = self.latest, packed(masks)
        changed = sum(ones(mask ^ self.before[key]) for key, mask in self.latest.items())
        return changed / max(sum(self.numel.values()), 1)

    def density(self) -> float | None:
        """Return the share of weights that the latest masks keep, 0 … 1; None where nothing is masked."""
        return sum(map(ones, self.latest.values())) / sum(self.numel.values()) if self.numel else None

    def layers(self) -> list[LayerMask]:
        """Return the numbers of each weight's latest mask."""
        return [
            LayerMask(
                key, ones(mask) / self.numel[key], ones(mask ^ self.before[key]) / self.numel[key],
                ones(mask & self.initial[key]) / max(ones(mask), 1),
            )
            for key, mask in self.latest.items()
        ]  # fmt: skip
