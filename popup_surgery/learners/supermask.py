"""Supermasks: a probability for each weight, and a new network at each forward (Zhou et al., 2019, section 5)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConversionError
from ..selection import OneRead, Selection
from ..weights.streams import CHUNK, draw_scores
from .base import Learner, masked
from .sampling import named, noise


@dataclass(frozen=True)
class Supermask(Learner):
    """w_eff = w · m, m ~ Bernoulli(σ(s)) at each read of the weight, in training and in evaluation alike.

    "Deconstructing Lottery Tickets", NeurIPS 2019, section 5. There is one score for each weight: a tensor of
    the weight's shape, always float32. Backward, straight through the sample:
    ∂L/∂s = ∂L/∂m · σ(s) · (1 − σ(s)) with ∂L/∂m = ∂L/∂w_eff · w.

    With `rescale` (dynamic weight rescaling) w_eff = w · m · r, r = n / Σm over the layer's n weights, and the gradient
    goes through r too, as in the authors' code: ∂L/∂m = r · ∂L/∂w_eff · w − Σ(∂L/∂w_eff · w_eff) / Σm.

    `masks`, `bake` and `save` use the most probable network, s > 0, or the named sample.

    Args:
        init: `uniform` for U(−1/√fan_in, 1/√fan_in), as in the edge-popup paper's experiments; or a number that all
            scores start at, 0 in the authors' code. Untrained scores of 0 have an empty most probable network.
        rescale: whether kept weights are multiplied by n / Σm.
        sample: number of the sample that a file stores, 0 or larger. Default: the most probable network.
    """

    init: float | str = "uniform"
    rescale: bool = False
    sample: int | None = None

    takes_k = False
    samples = True

    def __post_init__(self) -> None:
        init, sample = self.init, self.sample
        number = type(init) in (int, float) and abs(float(init)) <= 1000
        for name, holds, expected in (
            ("init", number or init == "uniform", "'uniform', or a number from -1000 to 1000 that all scores start at"),
            ("rescale", isinstance(self.rescale, bool), "true or false"),
            ("sample", sample is None or (type(sample) is int and 0 <= sample < 2**63), "an integer from 0"),
        ):
            if not holds:
                raise ConversionError(f"supermask: {name} is {getattr(self, name)!r}; expected {expected}")

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        if self.init == "uniform":
            return draw_scores(numel, fan_in, seed, name)
        return (np.full(min(CHUNK, numel - start), self.init, np.float32) for start in range(0, numel, CHUNK))

    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        return OneRead(tuple(_choose(s, name, self.sample) for s, name in zip(scores, names, strict=True)))

    def select_traced(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        return [choose_op(score, name, self.sample) for score, name in zip(scores, names, strict=True)]

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, score, mask, self.rescale)

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the same scores with other signs, so that the most probable network is that of `masks`."""
        above = [score.detach().abs().clamp(min=torch.finfo(torch.float32).tiny) for score in scores]
        return [torch.where(mask, score, -score) for mask, score in zip(masks, above, strict=True)]

    def kept_weights(self, score: Tensor, mask: Tensor) -> Tensor:
        """Return how many weights the network of a file keeps, with the gradient of Σ σ(s), the expected number.

        With `sample` it is the expected number itself.
        """
        probability = score.sigmoid()
        if self.sample is not None:
            return probability.sum()
        return ((score > 0) + (probability - probability.detach())).sum()

    def describe_sample(self) -> str:
        name = named(self.sample)
        return "the most probable network" if name is None else f"the sample {name}"


def _choose(score: Tensor, name: str, sample: int | None) -> Tensor:
    drawn = noise(score, name, sample)
    mask = score > 0 if drawn is None else drawn < score.sigmoid()
    return torch.empty_like(score, dtype=torch.bool).copy_(mask)


# not recomputed in the backward pass, and not captured in a CUDA graph, which would show the same sample forever
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)


@torch.library.custom_op("popup_surgery::choose", mutates_args=(), tags=_TAGS)
def choose_op(score: Tensor, name: str, sample: int | None) -> Tensor:
    """Return the current mask for `score`, as one operator that compilers and tracers do not look into."""
    return _choose(score, name, sample)


@choose_op.register_fake
def _(score: Tensor, name: str, sample: int | None) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)


@choose_op.register_vmap
def _(info: Any, in_dims: Any, score: Tensor, name: str, sample: int | None) -> tuple[Tensor, int]:
    rows = score.movedim(in_dims[0], 0)
    return torch.stack([choose_op(row, name, sample) for row in rows]), 0


class _StraightThrough(torch.autograd.Function):
    """The masked weight, rescaled if asked; the gradients are those of `Supermask`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, score: Tensor, mask: Tensor, rescale: bool) -> Tensor:
        effective = masked(weight, mask)
        return effective * _ratio(mask) if rescale else effective

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
        weight, score, mask, ctx.rescale = inputs
        ctx.save_for_backward(weight, score, mask if ctx.rescale or ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of the weight and of the score; the sample is taken as the probability itself."""
        weight, score, mask = ctx.saved_tensors
        if ctx.rescale:
            grad = grad * _ratio(mask)
        for_score = for_weight = None
        if ctx.needs_input_grad[1]:
            for_mask = grad.to(score.dtype) * weight
            if ctx.rescale:
                for_mask = for_mask - torch.where(mask, for_mask, 0.0).sum() / mask.sum().clamp(min=1)
            probability = score.sigmoid()
            for_score = for_mask * probability * (1 - probability)
        if ctx.needs_input_grad[0]:
            for_weight = torch.where(mask, grad, 0.0)
        return for_weight, for_score, None, None


def _ratio(mask: Tensor) -> Tensor:
    return mask.numel() / mask.sum().clamp(min=1)
