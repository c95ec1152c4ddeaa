"""Networks that know their own description: a library, a name in it, and the few arguments that a file may hold."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .errors import ConversionError, nearest, unknown

LIBRARIES = ("popup_surgery", "timm", "torchvision")
DESCRIPTION = "_popup_architecture"


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


def names(library: str) -> list[str]:
    """All names of networks in `library`."""
    if library == "timm":
        import timm

        return timm.list_models()
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    from .nets import NETS

    return list(NETS)


def resolve(name: str) -> tuple[str, str]:
    """Library and name of `timm/resnet50`, or of a bare `resnet50`: ours first, then timm, then torchvision.

    Raises:
        UnknownName: no library has it; the message has the three nearest names.
    """
    library, slash, bare = name.rpartition("/")
    for candidate in [library] if slash else LIBRARIES:
        if candidate not in LIBRARIES:
            raise unknown("library", candidate, LIBRARIES)
        if bare in names(candidate):
            return candidate, bare
    raise unknown("architecture", bare, names(library) if slash else [n for each in LIBRARIES for n in names(each)])


def build(name: str, **kwargs: Any) -> nn.Module:
    """A network without pretrained weights that knows its own description, so that `save` can record it.

    Args:
        name: `timm/…`, `torchvision/…`, `popup_surgery/conv4`, or the bare name of one of them.
        kwargs: arguments of the network, of those that an artifact can record: `KWARGS`.

    Raises:
        UnknownName: no such network.
        ConversionError: an argument that an artifact cannot record, or that the network does not take.
    """
    return build_described(architecture(name, **kwargs))


def architecture(name: str, **kwargs: Any) -> Architecture:
    """The description of what `build` with the same arguments builds, with the same errors."""
    library, bare = resolve(name)
    check_kwargs(kwargs)
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return Architecture(library, bare, kwargs, import_module(library).__version__)


def build_described(architecture: Architecture) -> nn.Module:
    """The network that `architecture` describes, of checked names and arguments."""
    library, name = architecture.library, architecture.name
    try:
        with _quiet():
            model = _BUILDERS[library](name, **architecture.kwargs)
    except ConversionError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in architecture.kwargs.items()) or "its defaults"
        raise ConversionError(f"{library}/{name} cannot be built with {given}: {error}") from error
    model.__dict__[DESCRIPTION] = architecture
    return model


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


def build_bare(architecture: Architecture) -> nn.Module:
    """As `build_described`, without memory: parameters on the meta device."""
    try:
        with torch.device("meta"):
            return build_described(architecture)
    except ConversionError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
    from accelerate import init_empty_weights

    with init_empty_weights():  # torchvision's regnets read values while they are built; only parameters are left out
        return build_described(architecture)


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the libraries, nothing that a user could act on
        yield


def _build_timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **kwargs)


def _build_torchvision(name: str, **kwargs: Any) -> nn.Module:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs = {"weights_backbone": None, **kwargs}
    return builder(weights=None, **kwargs)


def _build_own(name: str, **kwargs: Any) -> nn.Module:
    from .nets import NETS

    return NETS[name](**kwargs)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "popup_surgery": _build_own,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
