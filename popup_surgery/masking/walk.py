"""Walks over a network that may be wrapped or converted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ..torch_compat import compiled_module
from .ranking import RankGroup, parameter_of, score_of
from .state import MaskedParam, slots_of


class Place(NamedTuple):
    """Where a parameter is: the name of its module in the network, the module, and its own name there."""

    layer: str
    module: nn.Module
    name: str

    @property
    def key(self) -> str:
        """The parameter's `state_dict` key."""
        return f"{self.layer}.{self.name}" if self.layer else self.name

    @property
    def tensor(self) -> Tensor:
        return parameter_of(self.module, self.name)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, DataParallel and `torch.compile` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


def places_of(core: nn.Module) -> Iterator[Place]:
    """Yield every place of every parameter, in `state_dict` order. A shared parameter has several places."""
    for layer, module in core.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield Place(layer, module, name)


def masked_weights(core: nn.Module) -> Iterator[tuple[str, nn.Module, str, MaskedParam]]:
    """Yield each masked weight once: its first `state_dict` key, its layer, its parameter's name and its slot.

    A weight under two masks, as a shallow copy of a layer with other scores has it, counts as two.
    """
    seen = set()
    for layer, module in core.named_modules():
        for name, slot in slots_of(module).items():
            place = Place(layer, module, name)
            both = id(place.tensor), id(score_of(module, name))
            if both not in seen:
                seen.add(both)
                yield place.key, module, name, slot


@contextmanager
def ranked_within(core: nn.Module) -> Iterator[None]:
    """Context manager: masks read from now on are those of the scores in `core`, also where it is a shallow copy."""
    groups: dict[int, RankGroup] = {id(slot.ranking): slot.ranking for _, _, _, slot in masked_weights(core)}
    before = {index: group.holding() for index, group in groups.items()}
    try:
        for group in groups.values():
            group.hold(core)
        yield
    finally:
        for index, group in groups.items():
            group.release(before[index])
