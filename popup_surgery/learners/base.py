"""What a learner is, and the product of a weight and its mask that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..deprecated import link_methods
from ..selection import Selection

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TrainedWeight:
    """One masked weight of a network in training, as `after_step` gets it.

    Attributes:
        name: its stream name.
        weight, score: its parameters. What is written into them is what the next step reads.
        mask: gives the mask that the network shows now, and ranks the scores for it if they have changed.
        distribution, std, seed: what its values were drawn from; the distribution is `base` where they are pretrained.
    """

    name: str
    weight: Tensor
    score: Tensor
    mask: Callable[[], Tensor]
    distribution: str
    std: float
    seed: int


class Learner(ABC):
    """A way to learn which weights take part. Stateless: one instance serves every layer.

    A learner draws a layer's first scores, turns the scores of a ranking group into masks, and says how a gradient
    reaches a score. One that has options is a frozen dataclass, and they are its fields.

    Attributes:
        takes_k: a share of weights that is kept is asked for; else the scores alone decide how many take part.
        trains: the scores are to be trained; else they stay as they were drawn.
        samples: each read of a mask may be another one; `masks`, `bake` and `save` take what `describe_sample` says.
        learns_weights: the network computes with other weights than the seed's, such as scores that are weights, so
            that no file of a seed and a mask can hold them.
        rescale: `effective` multiplies what is kept by `scale`; a file holds weights drawn that much wider.
        redraws: `after_step` changes the weights, so that checkpoints hold them too; needs `learns_weights`.
    """

    takes_k: bool = True
    trains: bool = True
    samples: bool = False
    learns_weights: bool = False
    rescale: bool = False
    redraws: bool = False

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
        # |s| = 4 1 3 2 and the mask 0 1 0 1: the largest two, 4 and 3, go to the weights in the mask, in the order of
        # their own, and 2 and 1 to the others: |s| = 2 3 1 4.
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

    def kept_at(self, progress: float, kept: int) -> int:
        """How many weights of a ranking group take part at a point of the training: by default `kept` all along.

        Args:
            progress: the share of the training that is done, 0 before its first step. At 1 the answer must be `kept`,
                which also holds outside a training.
            kept: what k gives. A larger answer than there are weights stands for all of them.
        """
        return kept

    def scale(self, weight: Tensor, mask: Tensor) -> float:
        """The factor of a layer's kept weights in `effective`, where the learner sets `rescale`; else 1.

        Args:
            weight, mask: the layer's raw weight, and the mask that is shown.
        """
        return self.factor(mask)

    def factor(self, mask: Tensor) -> float:
        """The `scale` that depends on the mask alone: n / Σm for n weights where the learner rescales, else 1."""
        return mask.numel() / max(int(mask.sum()), 1) if self.rescale else 1.0

    def after_step(self, weights: Sequence[TrainedWeight], seed: int, step: int) -> None:  # noqa: B027
        """Called by the training loop after each step of the optimiser, in every process, without gradients.

        Args:
            weights: all masked weights of the network that this learner serves.
            seed: the run's. What is drawn here must depend on `seed`, `step` and `weights` alone.
            step: how many steps the run has made, those before a resume included.
        """

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
    # −0.75 is 0xBF400000 in float32: times 1 it stays that, times 0 it is 0x00000000 = +0.0, where a product of floats
    # would give −0.0. An infinite weight that is dropped becomes +0.0 too, not NaN.
    integer = _INTEGERS[weight.element_size()]
    return mask.view(torch.int8).to(integer).mul_(weight.detach().view(integer)).view(weight.dtype)
