"""What describes a network in a file: library, name, arguments, and where pretrained weights came from."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConversionError, nearest

DESCRIPTION = "_popup_architecture"
PRETRAINED_BASE = "_popup_base_weights"
FRESH = "_popup_fresh"


@dataclass(frozen=True)
class Architecture:
    """How to build a network: what an artifact's `architecture` says.

    Attributes:
        library: `timm`, `torchvision`, `popup_surgery`, or `custom` for a network that no library has.
        name: its name there, or its class's name for `custom`.
        kwargs: the keyword arguments, of those in `KWARGS` alone.
        version: the library's version, to inform.
    """

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True)
class Base:
    """Pretrained weights: what an artifact's `base` says of them.

    Attributes:
        library, version, name: the network's, as in `Architecture`.
        tag: which of the network's pretrained weights; empty where they came from a file or from the user's own hands.
        sha256: over the values of all weights that came from there and are masked, in the artifact.
    """

    library: str
    version: str
    name: str
    tag: str
    sha256: str = ""


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _size(high: int) -> Callable[[Any], bool]:
    one = _integer(1, high)
    return lambda value: one(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(one, value)))


def _number(high: float, zero: bool) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and (value >= 0 if zero else value > 0) and value <= high


# the arguments that an artifact may hold: what is expected, and the check
KWARGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_classes": ("an integer from 0 to 1,000,000", _integer(0, 1_000_000)),
    "in_chans": ("an integer from 1 to 1,024", _integer(1, 1024)),
    "img_size": ("one or two integers from 1 to 8,192", _size(8192)),
    "patch_size": ("one or two integers from 1 to 1,024", _size(1024)),
    "global_pool": ("a string of letters a to z", lambda v: isinstance(v, str) and bool(re.fullmatch("[a-z]*", v))),
    "width": ("a number above 0 and up to 64", _number(64, zero=False)),
    "drop_rate": ("a number from 0 to 1", _number(1, zero=True)),
    "drop_path_rate": ("a number from 0 to 1", _number(1, zero=True)),
    "output_stride": ("8, 16 or 32", lambda v: type(v) is int and v in (8, 16, 32)),
}


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """`ConversionError` unless every argument is one of `KWARGS`, within its bounds."""
    for key, value in kwargs.items():
        if key not in KWARGS:
            near = nearest(key, KWARGS)
            raise ConversionError(f"an artifact cannot record the argument {key!r}; the nearest it can: {near}")
        expected, holds = KWARGS[key]
        if not holds(value):
            raise ConversionError(f"{key} is {value!r}; expected {expected}")


def describe(model: nn.Module) -> Architecture:
    """The description that `model` was built or converted with; `custom` where there is none."""
    return model.__dict__.get(DESCRIPTION) or Architecture("custom", type(model).__name__)


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that `model` is made for, where it says so."""
    size = getattr(model, "input_size", None) or (getattr(model, "default_cfg", None) or {}).get("input_size")
    kwargs = describe(model).kwargs
    if size is None:
        return None
    side = kwargs.get("img_size", size[1:])
    height, width = (side, side) if isinstance(side, int) else side
    return kwargs.get("in_chans", size[0]), height, width
