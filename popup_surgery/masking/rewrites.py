"""What gives weights other values from time to time: how often, how many, in which networks, in all of their places."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..learners import Learner, name_of
from ..learners.sampling import as_saved
from ..weights import PRETRAINED, get_scheme
from ..weights.source import source_of
from .ranking import parameter_of
from .settings import from_keys, is_share
from .state import ORIGINS, MaskedParam, slots_of
from .walk import ranked_within, unwrap

Places = list[tuple[nn.Module, str, MaskedParam]]  # of one weight; they share its record


@dataclass(frozen=True)
class Rewrite(ABC):
    """When weights get other values, and how many of them.

    Attributes:
        every: the number of optimiser steps from one time to the next.
        share: how many weights, in (0, `most`].
        key: its recipe key in the section `surgery`.
        called, done, expected: in messages, the times, what is done to a weight, and what the share is.
        record: what says where the new values are from, one of `state.ORIGINS`.

    Raises:
        ConversionError: a value is bad; the message names all of them.
    """

    every: int = 300
    share: float = 0.1

    key: ClassVar[str]
    called: ClassVar[str]
    done: ClassVar[str]
    expected: ClassVar[str]
    record: ClassVar[str]
    most: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        found = []
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            found.append(f"every is {self.every!r}; expected the steps between two {self.called}, an integer from 1")
        if not is_share(self.share) or self.share > self.most:
            found.append(f"share is {self.share!r}; expected {self.expected} above 0 and up to {self.most:g}")
        if found:
            raise ConversionError("; and ".join(found))

    @classmethod
    def of(cls, values: Any) -> Self:
        """Return what plain values describe, such as `{"every": 300, "share": 0.1}`.

        Raises:
            ConversionError: a key or a value is bad; the message names all of them.
        """
        if not isinstance(values, Mapping):
            raise ConversionError("expected a mapping with every and share")
        return from_keys(cls, values)

    def begin(self, model: nn.Module) -> None:
        """Check that the weights of a converted network may get other values, and begin to record where they are from.

        Raises:
            ConversionError: there is no masked weight, or one of them may not.
        """
        held = _by_weight(unwrap(model))
        if not held:
            raise ConversionError(f"{type(unwrap(model)).__name__} has no masks; convert it first")
        for _, places in held:
            slot = places[0][2]
            learner = slot.ranking.learner
            if wrong := learner_mistake(learner):
                raise ConversionError(f"weights cannot be {self.done}: the learner {name_of(learner)} {wrong}")
            if wrong := _source_mistake(slot.distribution):
                raise ConversionError(f"{slot.stream!r} cannot be {self.done}: its scheme {slot.scheme} {wrong}")
        for weight, places in held:
            found = next((slot.origins[self.record] for *_, slot in places if self.record in slot.origins), None)
            found = self.first(weight) if found is None else found
            for *_, slot in places:
                setattr(slot, self.record, found)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> int:
        """Do what is due after the `step`-th step of the optimiser, and return how many weights got other values.

        Raises:
            ConversionError: as for `begin`; `step` is not a number of steps.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ConversionError(f"step is {step!r}; expected the number of steps made, an integer from 0")
        self.begin(model)
        if step == 0 or step % self.every:
            return 0
        core = unwrap(model)
        with as_saved(), ranked_within(core):
            taking = [
                torch.stack([slot.mask(module, name) for module, name, slot in places]).any(0)
                for _, places in _by_weight(core)
            ]
        count = 0
        for (weight, places), mask in zip(_by_weight(core), taking, strict=True):
            flat = weight.detach().reshape(-1)
            count += self.rewrite(flat, places, mask.reshape(-1), step)
            if not weight.is_contiguous():
                weight.copy_(flat.view(weight.shape))
        return count

    @abstractmethod
    def first(self, weight: Tensor) -> Tensor:
        """Return the `record` of a raw weight of which nothing is recorded: on the CPU, of its shape."""

    @abstractmethod
    def rewrite(self, flat: Tensor, places: Places, taking: Tensor, step: int) -> int:
        """Write other values into a raw weight, in place, and record where they are from. Return how many.

        Args:
            flat: the weight, flattened.
            places: where it is. Its record may be changed in place.
            taking: which weights take part in any of the places: bool, flattened.
            step: how many steps the optimiser has made.
        """


def learner_mistake(learner: Learner) -> str | None:
    """Return why weights under a learner get no other values, after its name; None if they may."""
    if learner.binary:
        return "gives the weights of a layer one magnitude"
    if learner.learns_weights:
        return "trains the weights themselves"
    if learner.samples:
        return "samples the weights that take part in each step"
    if not learner.trains:
        return "never changes its masks, so that another value would never take part"
    return None


def scheme_mistake(scheme: str) -> str | None:
    """Return why weights of a scheme get no other values, after its name; None if they may."""
    return _source_mistake("base" if scheme == PRETRAINED else get_scheme(scheme).distribution)


def _source_mistake(distribution: str) -> str | None:
    if not source_of(distribution).drawn:
        return "has no seed that other values could come from"
    if distribution == "unsigned_constant":
        return "gives all weights the same value"
    return None


@torch.no_grad()
def set_origins(core: nn.Module, weight: Tensor, values: Tensor, like: MaskedParam) -> None:
    """Set the values of a raw weight of `core`, and where they are from, as `like` says, in all of its places."""
    weight.copy_(values)
    for held, places in _by_weight(core):
        for _, _, slot in places if held is weight else ():
            for what in ORIGINS:
                setattr(slot, what, getattr(like, what))


def _by_weight(core: nn.Module) -> list[tuple[Tensor, Places]]:
    """Return each masked weight with the places that it has. Several may have masks of their own."""
    found: dict[int, tuple[Tensor, Places]] = {}
    for module in core.modules():
        for name, slot in slots_of(module).items():
            weight = parameter_of(module, name)
            found.setdefault(id(weight), (weight, []))[1].append((module, name, slot))
    return list(found.values())
