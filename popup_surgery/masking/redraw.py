"""Draw weights that do not take part again, from time to time: IteRand (Chijiwa et al., NeurIPS 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConversionError, nearest
from ..learners import Learner, name_of
from ..learners.sampling import as_saved
from ..weights import PRETRAINED, get_scheme
from ..weights.source import source_of
from ..weights.streams import CHUNK, MOST, values_at, words
from .ranking import parameter_of
from .settings import is_share
from .state import MaskedParam, slots_of
from .walk import ranked_within, unwrap


@dataclass(frozen=True)
class Redraw:
    """When weights are drawn again, and how many of them.

    Attributes:
        every: the number of optimiser steps between two redraws.
        share: the probability with which each weight that does not take part is drawn again, in (0, 1].

    Raises:
        ConversionError: a value is bad; the message names all of them.
    """

    every: int = 300
    share: float = 0.1

    def __post_init__(self) -> None:
        found = []
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            found.append(f"every is {self.every!r}; expected the steps between two redraws, an integer from 1")
        if not is_share(self.share):
            found.append(f"share is {self.share!r}; expected a probability above 0 and up to 1")
        if found:
            raise ConversionError("; and ".join(found))

    @classmethod
    def of(cls, values: Any) -> "Redraw":
        """Return what plain values describe, such as `{"every": 300, "share": 0.1}`.

        Raises:
            ConversionError: a key or a value is bad; the message names all of them.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ConversionError("expected a mapping with every and share")
        mistakes = [
            f"{key!r} is not one of its keys; nearest: {nearest(str(key), names)}" for key in values if key not in names
        ]
        try:
            found = cls(**{key: value for key, value in values.items() if key in names})
        except ConversionError as error:
            mistakes.append(str(error))
        if mistakes:
            raise ConversionError("; and ".join(mistakes))
        return found


def learner_mistake(learner: Learner) -> str | None:
    """Return why weights under a learner are not drawn again, after its name; None if they are."""
    if learner.binary:
        return "gives the weights of a layer one magnitude"
    if learner.learns_weights:
        return "trains the weights themselves"
    if learner.samples:
        return "samples the weights that take part in each step"
    if not learner.trains:
        return "never changes its masks, so that a weight drawn again would never take part"
    return None


def scheme_mistake(scheme: str) -> str | None:
    """Return why weights of a scheme are not drawn again, after its name; None if they are."""
    return _source_mistake("base" if scheme == PRETRAINED else get_scheme(scheme).distribution)


def _source_mistake(distribution: str) -> str | None:
    if not source_of(distribution).drawn:
        return "has no seed that others could be drawn from"
    if distribution == "unsigned_constant":
        return "gives each weight the same value, however often it is drawn"
    return None


def begin_redraws(model: nn.Module) -> None:
    """Check that the weights of a converted network can be drawn again, and begin to count how often they are.

    Raises:
        ConversionError: there is no masked weight, or one of them cannot be drawn again.
    """
    held = _by_weight(unwrap(model))
    if not held:
        raise ConversionError(f"{type(unwrap(model)).__name__} has no masks; convert it first")
    for _, places in held:
        slot = places[0][2]
        learner = slot.ranking.learner
        if wrong := learner_mistake(learner):
            raise ConversionError(f"weights cannot be drawn again: the learner {name_of(learner)} {wrong}")
        if wrong := _source_mistake(slot.distribution):
            raise ConversionError(f"{slot.stream!r} cannot be drawn again: its scheme {slot.scheme} {wrong}")
    for weight, places in held:
        found = next((slot.generations for *_, slot in places if slot.generations is not None), None)
        for *_, slot in places:
            slot.generations = found = torch.zeros(weight.shape, dtype=torch.int16) if found is None else found


@torch.no_grad()
def set_generations(core: nn.Module, weight: Tensor, values: Tensor, generations: Tensor | None) -> None:
    """Set the values of a raw weight of `core`, and how often each was drawn again, in all of its places."""
    weight.copy_(values)
    for held, places in _by_weight(core):
        for _, _, slot in places if held is weight else ():
            slot.generations = generations


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


@torch.no_grad()
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
    settings = Redraw(every, share)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConversionError(f"step is {step!r}; expected the number of steps made, an integer from 0")
    begin_redraws(model)
    if step == 0 or step % settings.every:
        return 0
    core = unwrap(model)
    with as_saved(), ranked_within(core):
        taking = [
            torch.stack([slot.mask(module, name) for module, name, slot in places]).any(0)
            for _, places in _by_weight(core)
        ]
    return sum(
        _redraw(weight, places[0][2], mask, step, settings.share)
        for (weight, places), mask in zip(_by_weight(core), taking, strict=True)
    )


Held = list[tuple[Tensor, list[tuple[nn.Module, str, MaskedParam]]]]


def _by_weight(core: nn.Module) -> Held:
    """Return each masked weight with the places that it has. Several may have masks of their own."""
    found: dict[int, tuple[Tensor, list[tuple[nn.Module, str, MaskedParam]]]] = {}
    for module in core.modules():
        for name, slot in slots_of(module).items():
            weight = parameter_of(module, name)
            found.setdefault(id(weight), (weight, []))[1].append((module, name, slot))
    return list(found.values())


def _redraw(weight: Tensor, slot: MaskedParam, taking: Tensor, step: int, share: float) -> int:
    """Draw some of the weights again that do not take part, in place. Return how many."""
    assert slot.generations is not None
    generations, kept = slot.generations.view(-1).numpy(), taking.reshape(-1).cpu().numpy()
    generator, last = words(slot.seed, "redraw", f"{slot.stream}@{step}"), max(0, int(share * 2**32) - 1)
    flat, count = weight.detach().reshape(-1), 0
    for start in range(0, len(generations), CHUNK):
        piece = generations[start : start + CHUNK]
        random = generator.random_raw(-(-len(piece) // 2)).astype("<u8", copy=False).view("<u4")[: len(piece)]
        places = np.flatnonzero((random <= last) & ~kept[start : start + CHUNK] & (piece < MOST))
        piece[places] += 1
        values = values_at(start + places, piece[places], slot.distribution, slot.std, slot.seed, slot.stream)
        flat[torch.from_numpy(start + places).to(flat.device)] = torch.from_numpy(values).to(flat.device, flat.dtype)
        count += len(places)
    if not weight.is_contiguous():
        weight.detach().copy_(flat.view(weight.shape))
    return count
