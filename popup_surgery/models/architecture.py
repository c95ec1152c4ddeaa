"""What describes a network in a file: library, name, arguments, and where pretrained weights came from."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import ConversionError, nearest

ORIGIN = "_popup_origin"  # where a network has its `Origin`, in its `__dict__`


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


@dataclass(frozen=True)
class Origin:
    """Where a network came from, as far as it knows itself.

    Attributes:
        architecture: how to build it.
        base: its pretrained weights, where it has some.
        fresh: names of the layers that those weights lacked, or had in another size.
    """

    architecture: Architecture | None = None
    base: Base | None = None
    fresh: tuple[str, ...] = ()


_MARKS = {"_popup_architecture": "architecture", "_popup_base_weights": "base", "_popup_fresh": "fresh"}


def gather(attributes: dict[str, Any], marks: Mapping[str, str], key: str, record: Callable[..., Any]) -> None:
    """Make marks that version 0.1.0 left one by one among a module's attributes one `record`, and keep it under `key`.

    Args:
        marks: the argument of `record` for each mark.
    """
    if found := {name: attributes.pop(mark) for mark, name in marks.items() if mark in attributes}:
        attributes[key] = record(**found)


def origin_of(model: nn.Module) -> Origin:
    """Where `model` came from; an empty `Origin` if it does not know."""
    gather(model.__dict__, _MARKS, ORIGIN, Origin)
    return model.__dict__.get(ORIGIN, Origin())


def note_origin(model: nn.Module, **known: Any) -> None:
    """Let `model` know more of its `Origin`."""
    model.__dict__[ORIGIN] = replace(origin_of(model), **known)


def forget_base(model: nn.Module) -> None:
    """Let `model` know how it was built, and no longer where its weights are from."""
    built = Origin(origin_of(model).architecture)
    if built == Origin():
        model.__dict__.pop(ORIGIN, None)
    else:
        model.__dict__[ORIGIN] = built


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
    return origin_of(model).architecture or Architecture("custom", type(model).__name__)


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that `model` is made for, where it says so."""
    size = getattr(model, "input_size", None) or (getattr(model, "default_cfg", None) or {}).get("input_size")
    kwargs = describe(model).kwargs
    if size is None:
        return None
    side = kwargs.get("img_size", size[1:])
    height, width = (side, side) if isinstance(side, int) else side
    return kwargs.get("in_chans", size[0]), height, width
