"""biprop: a binary network, of the signs of the weights and one factor for each layer (Diffenderfer et al., 2021)."""

import torch
from torch import Tensor

from .base import masked
from .edge_popup import EdgePopup


class Biprop(EdgePopup):
    """w_eff = α · sign(w) · m, where α = Σ|w|m / Σm over the layer, and m is 1 for the k share of its largest |s|.

    "Multi-Prize Lottery Ticket Hypothesis: Finding Accurate Binary Neural Networks by Pruning A Randomly Weighted
    Network", Diffenderfer & Kailkhura, ICLR 2021, algorithm 1. There is one score for each weight, as in edge-popup:
    float32, of the weight's shape. Backward, straight through m with α as a constant:
    ∂L/∂s = ∂L/∂w_eff · α · sign(w) · sign(s), for kept and dropped weights alike. α is the mean in float64, rounded to
    float32. Of constant weights it is the constant, and the learner is edge_popup. Deviations from the paper: exactly
    `kept` weights take part, of each layer unless `scope` is global; k changes only with a schedule; and activations
    are not binary.
    """

    binary = True

    def magnitude(self, weight: Tensor, mask: Tensor) -> Tensor:
        magnitudes = masked(weight.detach().abs(), mask)
        return (magnitudes.sum(dtype=torch.float64) / mask.sum().clamp(min=1)).float()

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return super().effective(self.values(weight, mask), score, mask)
