"""From a converted network to plain layers, and its masks."""

import copy
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..learners.base import masked
from ..learners.sampling import as_saved
from ..models.architecture import FRESH, PRETRAINED_BASE
from ..weights.fill import equals, fill
from ..weights.streams import draw
from .layer import is_masked, unswap
from .ranking import RankGroup, drop_hooks, score_name
from .state import CONVERTED, SETTINGS, MaskedParam
from .unmasked import GENERATED
from .walk import masked_weights, unwrap


def bake(model: nn.Module) -> nn.Module:
    """A plain copy of a converted network: original classes and `state_dict` keys, effective weights, all trainable.

    The copy shares no memory with `model`, which stays as it is. Of a learner that samples it is the network that a
    file would hold, or within `sampled` that sample.
    """
    core = unwrap(model)
    memo: dict[int, object] = {}
    with torch.no_grad(), as_saved():
        for _, module, name, slot in masked_weights(core):
            raw, effective = module._parameters[name], slot.read(module, name)
            if slot.ranking.learner.rescale:
                effective = rebuilt(module, name, slot, slot.ranking.mask(slot.index))
            # `data` of a plain tensor: a write to the copy is none to the masked weight
            memo[id(raw)] = nn.Parameter(effective.as_subclass(Tensor).data, requires_grad=False)
            memo[id(module._parameters[score_name(name)])] = nn.Parameter(torch.empty(0))
            memo[id(slot.ranking)] = RankGroup(slot.ranking.learner, 0)
        for module in core.modules():  # a network may keep results of its last pass, which no copy can be made of
            for value in module.__dict__.values():
                for kept in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(kept, Tensor) and not kept.is_leaf:
                        memo[id(kept)] = kept.detach().clone()
    baked = copy.deepcopy(core, memo)
    for module in baked.modules():
        if is_masked(module):
            unswap(module)
        for mark in (GENERATED, CONVERTED, SETTINGS, PRETRAINED_BASE, FRESH):
            module.__dict__.pop(mark, None)
        drop_hooks(module)
    for parameter in baked.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return baked


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each masked weight, by the weight's `state_dict` key: bool, of the weight's shape, a copy.

    Of a learner that samples they are those that a file would hold, or within `sampled` those of that sample.
    """
    with as_saved():
        return {key: slot.ranking.mask(slot.index).clone() for key, _, _, slot in masked_weights(unwrap(model))}


def rebuilt(module: nn.Module, name: str, slot: MaskedParam, mask: Tensor) -> Tensor:
    """A drawn or pretrained weight under `mask` as a file gives it, to the bit."""

    def drawn(std: float) -> Iterator[NDArray[np.float32]]:
        return draw(slot.distribution, weight.numel(), std, slot.seed, "weight", slot.stream)

    weight = cast(Tensor, module._parameters[name]).detach()
    factor = slot.ranking.learner.scale(weight, mask)
    if factor != 1 and equals(weight, drawn(slot.std)):  # else it was loaded, and there will be no file
        weight, factor = fill(torch.empty_like(weight), drawn(slot.std * factor)), 1.0
    weight = masked(weight, mask)
    return weight * factor if factor != 1 else weight
