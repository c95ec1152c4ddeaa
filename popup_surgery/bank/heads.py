"""Layers that have another size in some tasks, such as a classifier of as many outputs as the task has classes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..artifact.compare import Entry
from .base import Base, Place

Sizes = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each tensor whose shape is not the base's

_OUTPUTS = {nn.Linear: "out_features", nn.Conv1d: "out_channels", nn.Conv2d: "out_channels", nn.Conv3d: "out_channels"}


@dataclass(frozen=True, eq=False)
class Heads:
    """The layers of one size, which all tasks of that size share. Without layers it is the base's own size.

    Attributes:
        sizes: the shapes that differ from the base's.
        layers: by the module's name.
        outputs: what the network's `num_classes` is with them; None if it stays.
    """

    sizes: Sizes = ()
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    outputs: int | None = None


def heads_for(base: Base, entries: Mapping[str, Entry]) -> Heads:
    """Return new layers of a file's sizes, without values.

    Layers are linear or convolutional, and differ in the number of their outputs alone. Other differences are left for
    the comparison of shapes to refuse.
    """
    differ: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, _) in base.shapes.items():
        if name in entries and entries[name].shape != shape and _is_output(base.places[name], shape, entries[name]):
            place = base.places[name]
            differ.setdefault(place.layer, {})[place.name] = entries[name].shape
    layers, before = {}, set()
    for layer, shapes in differ.items():
        sizes = {shape[0] for shape in shapes.values()}
        module = base.layers[layer]
        tensors = {name for name, tensor in module._parameters.items() if tensor is not None}
        if len(sizes) == 1 and set(shapes) == tensors:
            layers[layer] = _layer(module, shapes)
            before |= {base.shapes[name][0][0] for name, place in base.places.items() if place.layer == layer}
    after = {getattr(layer, _attribute(layer)) for layer in layers.values()}
    named = {
        (name, entries[name].shape) for name, place in base.places.items() if place.layer in layers and name in entries
    }
    outputs = after.pop() if len(after) == 1 and before == {base.classes} else None
    return Heads(tuple(sorted(named)), layers, outputs)


def _is_output(place: Place, shape: tuple[int, ...], entry: Entry) -> bool:
    return isinstance(place.module, tuple(_OUTPUTS)) and bool(shape) and entry.shape[1:] == shape[1:]


def _attribute(layer: nn.Module) -> str:
    return next(name for cls, name in _OUTPUTS.items() if isinstance(layer, cls))


def _layer(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return a copy of a layer whose parameters have other shapes, and no values."""
    memo: dict[int, Tensor] = {}
    for name, tensor in module._parameters.items():
        if tensor is not None:
            empty = torch.empty(shapes[name], dtype=tensor.dtype, device=tensor.device)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    layer = copy.deepcopy(module, memo)
    setattr(layer, _attribute(layer), next(iter(shapes.values()))[0])
    return layer


def put(core: nn.Module, layer: str, new: nn.Module) -> None:
    """Put a layer in the place of the one that has this name, also where the same one has other names."""
    old = core.get_submodule(layer)
    if old is new:
        return
    for module in list(core.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                module.add_module(name, new)
