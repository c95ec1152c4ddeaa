"""Discovering neural wirings: the weights are trained, and the largest are used (Wortsman et al., 2019)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import masked
from .edge_popup import EdgePopup


class DNW(EdgePopup):
    """w_eff = v · h(|v|), where h is 1 for the k share of a layer's largest |v| and 0 elsewhere.

    "Discovering Neural Wirings", NeurIPS 2019, algorithm 1, within given layers. Backward, straight through h:
    ∂L/∂v = ∂L/∂w_eff, for kept and unkept weights alike. v is the score: float32, of the weight's shape. It starts with
    the weight's values; the weight itself does not change. The learned network is not a subnetwork of the seed's
    weights, so it is saved as dense weights. Deviations from the paper: exactly `kept` weights take part, and ties go
    to the lower index. Under a constant scheme all magnitudes are one, so v starts with up to a 16th of it added, drawn
    from the seed (`weights.streams.untied`). Otherwise the first rows of each layer would be kept, and most channels
    be dead.
    """

    ranks_weights = True
    learns_weights = True
    takes_fixed = False

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        return iter(weights)

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return _StraightThrough.apply(score, mask, weight.dtype)

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the scores of the weights in `masks`, and 0 for all others."""
        return [torch.where(mask, score.detach(), 0.0) for score, mask in zip(scores, masks, strict=True)]


class _StraightThrough(torch.autograd.Function):
    """The masked score; its gradient passes unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(score: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return masked(score.to(dtype), mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None
