"""The rules for unmasked parameters: they keep a frozen network working, and the seed can restore it."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..models.layer_types import layer_type_of


@dataclass(frozen=True)
class UnmaskedRule:
    """What conversion does with one unmasked parameter.

    Attributes:
        action: `constant` sets it to `value`; `generated` draws it from the seed, with the standard deviation `value`;
            `left` does not change it.
        why: the reason, human-readable.
    """

    action: Literal["constant", "generated", "left"]
    why: str
    value: float = 0.0


FROZEN = UnmaskedRule("left", "came frozen, and include does not name it")
NAMED = UnmaskedRule("left", "train names it")
FRESH = UnmaskedRule("left", "has no pretrained weights")


@dataclass(frozen=True)
class Generated:
    """Where a generated tensor came from."""

    stream: str
    seed: int
    std: float
    distribution: str = "normal"


_POSITIONS = re.compile(
    r"(^|_)pos_?(ition(al)?)?_?(emb(ed(ding)?s?)?|enc(oding)?)\d*(_|$)|"
    r"(^|_)(cls|class|dist|distillation|reg|register|mask|storage|prompt)_?(token|embedding)s?\d*(_|$)|"
    r"^(patch|pixel|spatial|temporal|class)_pos$|^latents?$|_latent$|"
    r"relative_position_bias_table|^attention_biases$|rel_pos(_[hwt])?$|^(height|width)_rel$|^pos_bias$"
)
_SCALES = re.compile(r"^(gamma(_?\d|_\w+)?|ls\d?|lambda_?\d|layer_?scale(_?\d|_parameter)?|skipinit_gain|gain)$")


_BIASES = re.compile(r"^([qkv]|qkv|mlp)_bias$")  # biases of masked layers that the module around them has
_CENTRED = re.compile(r"(T5)?Gemma[23]?RMSNorm|Qwen3NextRMSNorm")  # the scale of these norms is 1 + weight


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalisation layer, of any library."""
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    named = re.search("norm|grn$", type(module).__name__.lower())
    return bool(named) and all(sum(size > 1 for size in t.shape) <= 1 for t in own)


def treatment(module: nn.Module, name: str, swapped: bool) -> UnmaskedRule:
    """Return the rule for the unmasked parameter `name` of `module`, whose weights are masked if it is `swapped`."""
    layer_type = layer_type_of(module)
    if layer_type is not None:
        if swapped and name in layer_type.biases(module):
            return UnmaskedRule("constant", "bias of a masked layer")
        if not swapped:
            return UnmaskedRule("left", "layer left out of the conversion")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return UnmaskedRule("generated", "embedding", 1.0)
    if is_norm(module):
        if name == "weight":
            centred = _CENTRED.fullmatch(type(module).__name__)
            return UnmaskedRule("constant", "scale of a norm", 0.0 if centred else 1.0)
        if name == "bias":
            return UnmaskedRule("constant", "bias of a norm")
    if _SCALES.search(name) or type(module).__name__.endswith("LayerScale"):
        return UnmaskedRule("constant", "scale of a branch, which would be dead at its first value", 1.0)
    if _BIASES.search(name):
        return UnmaskedRule("constant", "bias of a masked layer")
    if _POSITIONS.search(name):
        return UnmaskedRule("generated", "position embedding or token", 0.02)
    return UnmaskedRule("left", "not part of a layer that can be masked")
