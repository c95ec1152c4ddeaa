"""Copy weights with high scores onto those with low ones, from time to time (Gorbett & Whitley, 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ranking import score_of
from .rewrites import Places, Rewrite


@dataclass(frozen=True)
class Recycle(Rewrite):
    """When weights are recycled, and how many of them.

    Attributes:
        every: the number of optimiser steps between two recyclings.
        share: the share of each layer's weights that get the value of another, in (0, ½].
    """

    key = "recycle"
    called = "recyclings"
    done = "recycled"
    expected = "a share of a layer's weights"
    record = "sources"
    most = 0.5

    def first(self, weight: Tensor) -> Tensor:
        return torch.arange(weight.numel()).view(weight.shape)

    def rewrite(self, flat: Tensor, places: Places, taking: Tensor, step: int) -> int:
        found = [slot.ranking.importance(slot.index, score_of(module, name)) for module, name, slot in places]
        importance = torch.stack(found).amax(0).reshape(-1)
        order = importance.sort(descending=True, stable=True).indices
        low = order[~taking[order] & importance[order].isfinite()].flip(0)[: int(self.share * len(order))]
        high = order[: len(low)]
        flat[low] = flat[high]
        for tensor in places[0][2].origins.values():
            of_each = tensor.view(-1)
            of_each[low.cpu()] = of_each[high.cpu()]
        return len(low)


def recycle(model: nn.Module, step: int, *, every: int = 300, share: float = 0.1) -> int:
    """Copy weights with high scores onto those with low ones, for a training loop of your own.

    Call it after each step of the optimiser; it acts at every `every`-th. In each layer, `share` of the weights, those
    with the lowest |score|, get the values of the weights with the highest: the lowest that of the highest, the second
    lowest that of the second highest, and so on. Weights that take part keep their values, so that there may be fewer.
    Scores stay. Of equal scores, that of the lower index counts as higher. So it is a function of the scores alone, and
    all processes copy the same, and a loop that resumes too. A learner that does not rank by |score| has its own order.
    `save` writes which values the weights that take part have. The `state_dict` has whose value each weight has, as
    `<weight>_source`: an index of the flattened weight, int64, of the weight's shape, on the CPU. Method: "Randomly
    Initialized Subnetworks with Iterative Weight Recycling", Gorbett and Whitley, 2023, arXiv:2303.15953.

    Args:
        model: a converted network, which may be wrapped.
        step: how many steps the optimiser has made.
        every, share: as for a recipe's `surgery.recycle`.

    Returns:
        The number of weights that got the value of another.

    Raises:
        ConversionError: nothing is masked; the weights are pretrained, or all of one value; the learner's masks do not
            change, or change with each sample, or it trains the weights; an argument has a bad value.
    """
    return Recycle(every, share).after_step(model, step)
