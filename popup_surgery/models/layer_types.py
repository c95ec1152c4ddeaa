"""Which parameters of a module are weights, and their fans: one entry per type of layer."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from ..plugins import load_entry_points
from ..torch_compat import RecurrentWeights


@dataclass(frozen=True)
class Fans:
    """How many inputs are summed into one output of a weight, and how many outputs one input reaches.

    Attributes:
        channels, stride: how many of the inputs belong to one kernel position, and how many elements of the weight, in
            row-major order, lie from one of these to the next. Together they say which weights are neighbours, for
            `convert(model, pattern="2:4")`; without `channels` that is refused.
    """

    fan_in: float
    fan_out: float
    channels: int | None = None
    stride: int = 1


@dataclass(frozen=True)
class LayerType:
    """A type of layer.

    Args:
        types: classes whose instances are layers of this type, subclasses included. A class from a library that may
            not be installed, or is slow to import, is given by its full name.
        weights: returns the fans of each maskable weight of such a layer, by parameter name.
        biases: returns the parameter names of the layer's biases.
        mixin: a class that is put before the layer's own once it is masked. It is needed if the layer does not read its
            weights as `self.<name>`.
    """

    types: tuple[type[nn.Module] | str, ...]
    weights: Callable[[Any], dict[str, Fans]]
    biases: Callable[[Any], tuple[str, ...]] = lambda module: ("bias",)
    mixin: type | None = None

    def covers(self, cls: type) -> bool:
        """Return whether instances of `cls` are layers of this type."""
        mro = {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__}
        return any(t in mro if isinstance(t, str) else issubclass(cls, t) for t in self.types)


def _linear(module: nn.Linear) -> dict[str, Fans]:
    return {"weight": Fans(float(module.in_features), float(module.out_features), module.in_features)}


def _conv(module: Any) -> dict[str, Fans]:
    volume, per_group = prod(module.kernel_size), module.in_channels // module.groups
    return {"weight": Fans(float(per_group * volume), float(module.out_channels * volume), per_group, volume)}


def _conv_transpose(module: Any) -> dict[str, Fans]:
    volume, stride = prod(module.kernel_size), prod(module.stride)
    per_group, beside = module.in_channels // module.groups, module.out_channels // module.groups * volume
    return {"weight": Fans(per_group * volume / stride, module.out_channels * volume / stride, per_group, beside)}


def _conv1d_of_transformers(module: Any) -> dict[str, Fans]:
    inputs, outputs = module._parameters["weight"].shape
    return {"weight": Fans(float(inputs), float(outputs), inputs, outputs)}


def _packed(module: nn.Module, names: tuple[str, ...]) -> dict[str, Fans]:
    """Return the fans of the two-dimensional weights (outputs, inputs) whose names start with one of `names`."""
    found = {name: tensor for name, tensor in module._parameters.items() if name.startswith(names)}
    return {n: Fans(float(t.shape[1]), float(t.shape[0]), t.shape[1]) for n, t in found.items() if t is not None}


_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")


def _recurrent_biases(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in module._parameters if name.startswith(("bias_ih", "bias_hh")))


LAYER_TYPES = [
    LayerType((nn.Linear,), _linear),
    LayerType((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    LayerType((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose),
    LayerType(
        (nn.MultiheadAttention,),
        lambda module: _packed(module, _ATTENTION),
        biases=lambda module: ("in_proj_bias", "bias_k", "bias_v"),
    ),
    LayerType((nn.RNNBase,), lambda module: _packed(module, _RECURRENT), _recurrent_biases, RecurrentWeights),
    LayerType((nn.RNNCellBase,), lambda module: _packed(module, _RECURRENT), _recurrent_biases),
    LayerType(("timm.layers.cond_conv2d.CondConv2d",), _conv),
    LayerType(("transformers.pytorch_utils.Conv1D",), _conv1d_of_transformers),
]


def layer_type_of(layer: nn.Module | type) -> LayerType | None:
    """Return the layer type of a module or of a class; None if it has none."""
    cls = layer if isinstance(layer, type) else type(layer)
    return next((each for each in LAYER_TYPES if each.covers(cls)), None)


def _take(name: str, found: Any) -> None:
    if isinstance(found, LayerType) and found not in LAYER_TYPES:
        LAYER_TYPES.append(found)


load_entry_points("layer_types", _take)
