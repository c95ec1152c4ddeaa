"""What a learner is, and the product of a weight and its mask that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..deprecated import link_methods
from ..selection import Selection

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Learner(ABC):
    """A way to learn which weights take part. Stateless: one instance serves every layer.

    A learner draws a layer's first scores, turns the scores of a ranking group into masks, and says how a gradient
    reaches a score. One that has options is a frozen dataclass, and they are its fields.

    Attributes:
        takes_k: a share of weights that is kept is asked for; else the scores alone decide how many take part.
        trains: the scores are to be trained; else they stay as they were drawn.
        samples: each read of a mask may be another one; `masks`, `bake` and `save` take what `describe_sample` says.
        learns_weights: the scores are the weights that the network computes with, so that no file of a seed and a mask
            can hold them.
        rescale: `effective` multiplies what is kept by `factor`; a file holds weights drawn that much wider.
    """

    takes_k: bool = True
    trains: bool = True
    samples: bool = False
    learns_weights: bool = False
    rescale: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        link_methods(cls)

    @abstractmethod
    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        """First scores of the weight with the stream name `name`, row-major, in pieces of float32.

        Args:
            weights: the weight's own values, in such pieces, made as they are asked for.
        """

    @abstractmethod
    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        """Masks for scores ranked together, float32 of any shape; `kept` weights of them all take part.

        Args:
            kept: 0 where no k is taken.
            names: the stream names of the scores' weights.
        """

    @abstractmethod
    def select_traced(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        """The masks of `select`, by operators alone, for compilers and tracers."""

    @abstractmethod
    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """The weight that the network computes with, differentiable in `score`: shape and dtype of `weight`."""

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """The same scores in other places, so that the weights in `masks` come before all others and are kept.

        Args:
            scores: ranked together, float32 of any shape.
            masks: bool, of the scores' shapes.
        """
        flat = torch.cat([score.detach().reshape(-1) for score in scores])
        chosen = torch.cat([mask.reshape(-1) for mask in masks])
        size = flat.abs()
        ranked = size.sort(descending=True).values
        kept = int(chosen.sum())
        for part, values in ((chosen, ranked[:kept]), (~chosen, ranked[kept:])):
            places = part.nonzero().view(-1)
            size[places[size[places].argsort(descending=True, stable=True)]] = values
        if 0 < kept < len(ranked):  # of equal scores the lower index would be kept
            size[chosen & (size == ranked[kept])] = torch.nextafter(ranked[kept], ranked.new_tensor(torch.inf))
        moved = size.copysign(flat).split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(moved, scores, strict=True)]

    def factor(self, mask: Tensor) -> float:
        """n / Σm for the mask m of n weights where the learner rescales, else 1."""
        return mask.numel() / max(int(mask.sum()), 1) if self.rescale else 1.0

    def describe_sample(self) -> str:
        """Which of its networks `masks`, `bake` and `save` take, for people."""
        return "the only network"


link_methods(Learner)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask` is True and +0.0 elsewhere, never −0.0.

    Args:
        weight: any floating dtype, any shape.
        mask: bool, the same shape.
    """
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or weight.element_size() not in _INTEGERS:
        return torch.where(mask, weight, 0.0)
    # torch.where is not vectorised on the CPU: an integer product with 0 or 1 gives the same bits, 8 times as fast.
    integer = _INTEGERS[weight.element_size()]
    return mask.view(torch.int8).to(integer).mul_(weight.detach().view(integer)).view(weight.dtype)
