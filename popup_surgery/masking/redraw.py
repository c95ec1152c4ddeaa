"""Draw weights that do not take part again, from time to time: IteRand (Chijiwa et al., NeurIPS 2021)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..weights.fill import rounded
from ..weights.streams import CHUNK, MOST, values_at, words
from .rewrites import Places, Rewrite
from .state import MaskedParam


@dataclass(frozen=True)
class Redraw(Rewrite):
    """When weights are drawn again, and how many of them.

    Attributes:
        every: the number of optimiser steps between two redraws.
        share: the probability with which each weight that does not take part is drawn again, in (0, 1].
    """

    key = "redraw"
    called = "redraws"
    done = "drawn again"
    expected = "a probability"
    record = "generations"

    def first(self, weight: Tensor) -> Tensor:
        return torch.zeros(weight.shape, dtype=torch.int16)

    def rewrite(self, flat: Tensor, places: Places, taking: Tensor, step: int) -> int:
        slot, kept, count = places[0][2], taking.cpu().numpy(), 0
        record = {what: tensor.view(-1).numpy() for what, tensor in slot.origins.items()}
        generator, last = words(slot.seed, "redraw", f"{slot.stream}@{step}"), max(0, int(self.share * 2**32) - 1)
        for start in range(0, len(kept), CHUNK):
            piece = record["generations"][start : start + CHUNK]
            random = generator.random_raw(-(-len(piece) // 2)).astype("<u8", copy=False).view("<u4")[: len(piece)]
            drawn = start + np.flatnonzero((random <= last) & ~kept[start : start + CHUNK] & (piece < MOST))
            record["generations"][drawn] += 1
            if "sources" in record:  # a copy gets a value of its own place
                record["sources"][drawn] = drawn
            generations = record["generations"][drawn]
            values = values_at(drawn, generations, slot.distribution, slot.std, slot.seed, slot.stream)
            flat[torch.from_numpy(drawn).to(flat.device)] = rounded(values, flat.dtype).to(flat.device)
            count += len(drawn)
        return count


def generations_of_signs(slot: MaskedParam, values: Tensor) -> Tensor:
    """Return the first generation in which each weight that is not 0 has the sign that it has in `values`: int16.

    Args:
        slot: of a signed constant that was not drawn again.
        values: the weight, on the CPU.
    """
    wanted, first = values.reshape(-1).float().numpy(), np.concatenate([*slot.values(values)])
    found = np.zeros(len(first), np.int16)
    left = np.flatnonzero((wanted != 0) & (np.signbit(wanted) != np.signbit(first)))
    while left.size:
        found[left] += 1
        drawn = values_at(left, found[left], slot.distribution, slot.std, slot.seed, slot.stream)
        left = left[np.signbit(drawn) != np.signbit(wanted[left])]
    return torch.from_numpy(found).view(values.shape)


def redraw(model: nn.Module, step: int, *, every: int = 300, share: float = 0.1) -> int:
    """Draw weights that do not take part again, for a training loop of your own.

    Call it after each step of the optimiser; it acts at every `every`-th. Each weight that does not take part then gets
    a new value from its distribution with the probability `share`. Which do is a function of the network's seed, the
    step and the weight's name alone, so that all processes draw the same, and a loop that resumes too. `save` writes
    which values the weights that take part have. The `state_dict` has how often each weight was drawn again, as
    `<weight>_generation`: int16, of the weight's shape, on the CPU. A weight is drawn again at most 4,095 times, and
    then keeps its value. Method: IteRand, "Pruning Randomly Initialized Neural Networks with Iterative Randomization",
    NeurIPS 2021.

    Args:
        model: a converted network, which may be wrapped.
        step: how many steps the optimiser has made.
        every, share: as for a recipe's `surgery.redraw`.

    Returns:
        The number of weights that were drawn again.

    Raises:
        ConversionError: nothing is masked; the weights are pretrained, or all of one value; the learner's masks do not
            change, or change with each sample, or it trains the weights; an argument has a bad value.
    """
    return Redraw(every, share).after_step(model, step)
