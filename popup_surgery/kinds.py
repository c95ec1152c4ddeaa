"""Which parameters of a module are weights, and their fans: one entry for each kind of layer."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass(frozen=True)
class Fans:
    """How many inputs are summed into one output of a weight, and how many outputs one input reaches."""

    fan_in: float
    fan_out: float


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Args:
        types: instances of these, subclasses too, are layers of this kind.
        weights: the fans of each maskable weight of such a layer, by parameter name.
        biases: parameter names of its biases.
    """

    types: tuple[type[nn.Module], ...]
    weights: Callable[[nn.Module], dict[str, Fans]]
    biases: Callable[[nn.Module], tuple[str, ...]] = lambda module: ("bias",)


def _linear(module: nn.Module) -> dict[str, Fans]:
    assert isinstance(module, nn.Linear)
    return {"weight": Fans(float(module.in_features), float(module.out_features))}


def _conv(module: nn.Module) -> dict[str, Fans]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    volume = float(prod(module.kernel_size))
    return {"weight": Fans(module.in_channels // module.groups * volume, module.out_channels * volume)}


def _conv_transpose(module: nn.Module) -> dict[str, Fans]:
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    volume, stride = prod(module.kernel_size), prod(module.stride)
    per_group = module.in_channels // module.groups
    return {"weight": Fans(per_group * volume / stride, module.out_channels * volume / stride)}


KINDS = [
    Kind((nn.Linear,), _linear),
    Kind((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    Kind((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose),
]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of layer that `module` is, or None."""
    return next((kind for kind in KINDS if isinstance(module, kind.types)), None)
