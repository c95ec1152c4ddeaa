"""What becomes of the parameters that are not masked, so that a frozen network is alive and the seed gives it back."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .kinds import kind_of

GENERATED = "_popup_generated"


@dataclass(frozen=True)
class Treatment:
    """What conversion does with one unmasked parameter.

    Attributes:
        action: set it to the constant `value`; draw it from the seed with the standard deviation `value`; or leave it.
        why: the reason, for people.
    """

    action: Literal["constant", "generated", "left"]
    why: str
    value: float = 0.0


@dataclass(frozen=True)
class Generated:
    """Where a generated tensor came from; kept on its module by parameter name, under `GENERATED`."""

    stream: str
    seed: int
    std: float
    distribution: str = "normal"


_POSITIONS = re.compile(
    r"(^|_)pos_?(ition(al)?)?_?(emb(ed(ding)?s?)?|enc(oding)?)\d*(_|$)|"
    r"(^|_)(cls|class|dist|reg|register|mask|storage|prompt)_?(token|embedding)s?\d*(_|$)|"
    r"^(patch|pixel|spatial|temporal|class)_pos$|^latents?$|_latent$|"
    r"relative_position_bias_table|^attention_biases$|rel_pos(_[hwt])?$|^(height|width)_rel$|^pos_bias$"
)
_SCALES = re.compile(r"^(gamma(_?\d|_\w+)?|ls\d?|lambda_?\d|layer_?scale(_?\d|_parameter)?|skipinit_gain|gain)$")


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer, of whatever library."""
    return "norm" in type(module).__name__.lower()


def treatment(module: nn.Module, name: str, swapped: bool) -> Treatment:
    """What to do with the unmasked parameter `name` of `module`, whose weights are masked if it is `swapped`."""
    kind = kind_of(module)
    if kind is not None:
        if swapped and name in kind.biases(module):
            return Treatment("constant", "bias of a masked layer")
        if not swapped:
            return Treatment("left", "layer is not to be converted")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Treatment("generated", "embedding", 1.0)
    if is_norm(module):
        if name == "weight":
            return Treatment("constant", "scale of a norm", 1.0)
        if name == "bias":
            return Treatment("constant", "bias of a norm")
    if _SCALES.search(name) or type(module).__name__.endswith("LayerScale"):
        return Treatment("constant", "scale of a branch, which would be dead at its first value", 1.0)
    if _POSITIONS.search(name):
        return Treatment("generated", "position embedding or token", 0.02)
    return Treatment("left", "belongs to no layer that can be masked")
