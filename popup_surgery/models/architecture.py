"""The description of a network in a file: library, name, arguments, and the origin of pretrained weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConversionError, nearest

ORIGIN = "_popup_origin"  # key of a network's `Origin` in its `__dict__`


@dataclass(frozen=True)
class Architecture:
    """How to build a network, as recorded under `architecture` in an artifact.

    Attributes:
        library: `timm`, `torchvision`, `popup_surgery`, or `custom` for a network that is in no library.
        name: the network's name in the library; for `custom`, the name of its class.
        kwargs: the keyword arguments; only those in `KWARGS` are allowed.
        version: the library's version, informational.
    """

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True)
class Base:
    """Pretrained weights, as recorded under `base` in an artifact.

    Attributes:
        library, version, name: of the network, as in `Architecture`.
        tag: the name of the pretrained weights in the library; empty if they came from a file or from the user.
        sha256: in an artifact, the digest of the values of all masked weights that are pretrained.
    """

    library: str
    version: str
    name: str
    tag: str
    sha256: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a network came from, as far as the network records it.

    Attributes:
        architecture: how to build it.
        base: its pretrained weights, if it has any.
        fresh: names of the layers that the pretrained weights lacked, or had in another size.
        pretrained: where `build` got the pretrained weights: a tag of the library, or a file.
        digest: of the masked weights that are pretrained, as they were at conversion: dtype, and SHA-256.
    """

    architecture: Architecture | None = None
    base: Base | None = None
    fresh: tuple[str, ...] = ()
    pretrained: str | Path | None = None
    digest: tuple[torch.dtype, str] | None = None


_MARKS = {"_popup_architecture": "architecture", "_popup_base_weights": "base", "_popup_fresh": "fresh"}


def gather(attributes: dict[str, Any], marks: Mapping[str, str], key: str, record: Callable[..., Any]) -> None:
    """Combine the marks that version 0.1.0 left among a module's attributes into one `record`, stored under `key`.

    Args:
        attributes: the module's `__dict__`, changed in place.
        marks: maps each mark to an argument of `record`.
    """
    if found := {name: attributes.pop(mark) for mark, name in marks.items() if mark in attributes}:
        attributes[key] = record(**found)


def origin_of(model: nn.Module) -> Origin:
    """Return where `model` came from; an empty `Origin` if nothing is recorded."""
    gather(model.__dict__, _MARKS, ORIGIN, Origin)
    return model.__dict__.get(ORIGIN, Origin())


def note_origin(model: nn.Module, **known: Any) -> None:
    """Record attributes of the `Origin` of `model`."""
    model.__dict__[ORIGIN] = replace(origin_of(model), **known)


def forget_base(model: nn.Module) -> None:
    """Drop the record of where the weights of `model` came from, and keep how it was built."""
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


# the arguments that an artifact may record: the expected value in words, and the check
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
    """Raise `ConversionError` unless every argument is in `KWARGS` and within its bounds."""
    for key, value in kwargs.items():
        if key not in KWARGS:
            near = nearest(key, KWARGS)
            raise ConversionError(f"an artifact cannot record the argument {key!r}; the nearest it can: {near}")
        expected, holds = KWARGS[key]
        if not holds(value):
            raise ConversionError(f"{key} is {value!r}; expected {expected}")


def describe(model: nn.Module) -> Architecture:
    """Return the description that `model` was built or converted with; `custom` if there is none."""
    return origin_of(model).architecture or Architecture("custom", type(model).__name__)


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images that `model` is made for; None if it does not say."""
    size = getattr(model, "input_size", None) or (getattr(model, "default_cfg", None) or {}).get("input_size")
    kwargs = describe(model).kwargs
    if size is None:
        return None
    side = kwargs.get("img_size", size[1:])
    height, width = (side, side) if isinstance(side, int) else side
    return kwargs.get("in_chans", size[0]), height, width
