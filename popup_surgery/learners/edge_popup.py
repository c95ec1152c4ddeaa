"""edge-popup: rank by |score|, and pass the gradient straight through (paper, section 3, equations 3 to 5)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..selection import Limits, Selection, select, select_traced
from ..torch_compat import in_func_transform
from ..weights.streams import draw_scores
from .base import Learner, StraightThrough, Unsaved, masked


class EdgePopup(Learner):
    """w_eff = w · h(|s|), where h is 1 for the k share of a layer's largest |s| and 0 elsewhere.

    Backward, straight through h: ∂L/∂s = ∂L/∂w_eff · w · sign(s), for kept and unkept weights alike. There is one
    score for each weight: a tensor of the weight's shape, always float32. Scores start as U(−1/√fan_in, 1/√fan_in).
    Exactly `kept` weights take part, and ties go to the lower index; the authors' code leaves ties to its sort.
    """

    takes_pattern = True
    takes_floor = True
    takes_fixed = True
    one_pass = True

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        return draw_scores(numel, fan_in, seed, name)

    def select(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), **limits: Unpack[Limits]
    ) -> Selection:
        return select(scores, kept, **limits)

    def select_traced(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), **limits: Unpack[Limits]
    ) -> Sequence[Tensor]:
        return select_traced(scores, kept, **limits)

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or in_func_transform() or weight.requires_grad:
            return _StraightThrough.apply(weight, score, mask)
        return _Unsaved.apply(weight, score, mask)


def straight_through(grad: Tensor, weight: Tensor, score: Tensor) -> Tensor:
    """Return the score's gradient, float32, as if the mask were the score's magnitude."""
    return (grad.to(score.dtype) * weight).mul_(score.sign())


class _StraightThrough(StraightThrough):
    """The masked weight; the score gets its gradient as if the mask were the score's magnitude."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, score, mask = ctx.saved_tensors
        for_score = straight_through(grad, weight, score) if ctx.needs_input_grad[1] else None
        for_weight = torch.where(mask, grad, 0.0) if ctx.needs_input_grad[0] else None
        return for_weight, for_score, None


class _Unsaved(torch.autograd.Function):
    """The same of a weight that is not trained, outside compilers and transforms. The graph saves no tensors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.inputs = Unsaved(weight, score)
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, straight_through(grad, *ctx.inputs.tensors()), None
