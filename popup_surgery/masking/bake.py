"""Turn a converted network back into plain layers, and read its masks."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..learners.base import masked
from ..learners.sampling import as_saved
from ..selection.shards import is_shard, whole
from ..torch_compat import of_fsdp, without_fsdp
from ..weights.fill import equals, fill
from .layer import is_masked, unswap
from .packed import refuse_packed
from .ranking import RankGroup, drop_hooks, parameter_of, score_of
from .state import MaskedParam, forget, slots_of
from .walk import masked_weights, ranked_within, unwrap


def bake(model: nn.Module) -> nn.Module:
    """Return a plain copy of a converted network: original classes and `state_dict` keys, effective weights.

    All floating-point parameters of the copy are trainable. It shares no memory with `model`, which does not change. If
    the learner samples, the copy is the network that a file would store; inside `sampled` it is that sample. Where
    `fully_shard` has spread `model` over processes, all of them must call this, and each gets a whole copy.
    """
    core = unwrap(model)
    refuse_packed(core, "be baked", ConversionError)
    replacements: list[tuple[object, object]] = []
    plain: dict[tuple[int, int], nn.Parameter] = {}  # by raw weight and score
    with torch.no_grad(), as_saved(), ranked_within(core):
        for _, module, name, slot in masked_weights(core):
            effective = slot.read(module, name)
            if slot.ranking.learner.rescale:
                effective = rebuilt(whole(parameter_of(module, name)), slot, slot.mask(module, name))
            # `data` of a plain tensor, so that a write to the copy does not count as one to the masked weight
            baked_weight = nn.Parameter(effective.as_subclass(Tensor).data, requires_grad=False)
            raw, score = parameter_of(module, name), score_of(module, name)
            plain[id(raw), id(score)] = baked_weight
            replacements += [
                (raw, baked_weight),
                (score, nn.Parameter(torch.empty(0))),  # `unswap` removes it
                (slot.ranking, RankGroup(slot.ranking.learner, 0)),  # otherwise its masks would be copied
                *((tensor, None) for tensor in slot.origins.values()),
            ]
        baked = clone_with(core, replacements)
    for before, module in zip(core.modules(), baked.modules(), strict=True):
        for name in slots_of(before):
            both = id(parameter_of(before, name)), id(score_of(before, name))
            module._parameters[name] = plain[both]
    for module in baked.modules():
        if is_masked(module):
            unswap(module)
        forget(module)
        drop_hooks(module)
    for parameter in baked.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return baked


def clone_with(model: nn.Module, replacements: Iterable[tuple[object, object]]) -> nn.Module:
    """Return a deep copy of `model` with some of its objects replaced.

    `copy.deepcopy` notes the copy of each object in its memo, by identity, so that shared objects stay shared. Each
    replacement is put into the memo beforehand. It then appears wherever its object was, is not copied itself, and the
    object is never read.

    Of a network in shards it is a whole copy, and all processes must call this.

    A network may store results of its last pass. `deepcopy` refuses them while they are part of a graph, so the copy
    gets their values.

    Args:
        replacements: pairs of an object in `model` and its replacement.
    """
    memo = {id(old): new for old, new in replacements}
    for module in model.modules():
        for value in module.__dict__.values():
            for kept in value if isinstance(value, list | tuple) else [value]:
                if isinstance(kept, Tensor) and not kept.is_leaf:
                    memo[id(kept)] = kept.detach().clone()
    for parameter in model.parameters():
        if is_shard(parameter) and id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(whole(parameter).clone(), parameter.requires_grad)
    with without_fsdp(model):
        return copy.deepcopy(model, memo)


def in_one_piece(model: nn.Module) -> nn.Module:
    """Return `model` itself, or if `fully_shard` has spread it over processes, a whole copy in each of them.

    All processes must call this.
    """
    return clone_with(model, ()) if of_fsdp(model) else model


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of each masked weight's mask, by the weight's `state_dict` key: bool, of the weight's shape.

    If the learner samples, they are the masks that a file would store; inside `sampled` they are those of that sample.
    Where `fully_shard` has spread `model` over processes, all of them must call this, and each gets whole masks.
    """
    with as_saved(), ranked_within(unwrap(model)):
        return {key: slot.mask(module, name).clone() for key, module, name, slot in masked_weights(unwrap(model))}


def rebuilt(weight: Tensor, slot: MaskedParam, mask: Tensor) -> Tensor:
    """Return a raw weight under `mask`, drawn or pretrained, bit for bit as a file restores it."""
    weight = slot.ranking.learner.values(weight.detach(), mask)
    factor = slot.ranking.learner.scale(weight, mask)
    if factor != 1 and equals(weight, slot.values(weight)):  # otherwise it was loaded, and no file can store it
        weight, factor = fill(torch.empty_like(weight), slot.values(weight, factor)), 1.0
    weight = masked(weight, mask)
    return weight * factor if factor != 1 else weight
