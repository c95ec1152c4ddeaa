"""Networks that know their own description: a library, a name in it, and the few arguments that a file may hold."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ..errors import ConversionError, nearest, unknown
from .layer_types import kind_of
from .skip_init import Blank

_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
LIBRARIES = ("popup_surgery", "timm", "torchvision")
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


def names(library: str) -> list[str]:
    """All names of networks in `library`."""
    if library == "timm":
        import timm

        return timm.list_models()
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    from .paper_nets import NETS

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


def build(name: str, *, pretrained: bool | str | Path = False, **kwargs: Any) -> nn.Module:
    """A network that knows its own description, so that `save` can record it.

    Args:
        name: `timm/…`, `torchvision/…`, `popup_surgery/conv4`, or the bare name of one of them.
        pretrained: False for the network's own random initialisation; True for the library's default weights; one of
            its tags, such as `a1_in1k`; or a file of weights, safetensors or a checkpoint that unpickles no code. A
            classifier of another size than theirs stays random, and conversion draws it from the seed.
        kwargs: arguments of the network, of those that an artifact can record: `KWARGS`.

    Raises:
        UnknownName: no such network or tag.
        ConversionError: an argument that an artifact cannot record, or that the network does not take; weights that
            cannot be had, or that are not for this network.
    """
    described = architecture(name, **kwargs)
    if pretrained is False or pretrained is None:
        return build_described(described)
    if isinstance(pretrained, Path) or (isinstance(pretrained, str) and Path(pretrained).suffix in _WEIGHT_FILES):
        model, tag = build_described(described), ""
        _fill_from(model, read_weights(Path(pretrained)), str(pretrained))
    else:
        tag = check_tag(described, None if pretrained is True else pretrained)
        model = build_described(described, tag)
    model.__dict__[PRETRAINED_BASE] = Base(described.library, described.version, described.name, tag)
    return model


def architecture(name: str, **kwargs: Any) -> Architecture:
    """The description of what `build` with the same arguments builds, with the same errors."""
    library, bare = resolve(name)
    check_kwargs(kwargs)
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return Architecture(library, bare, kwargs, import_module(library).__version__)


def build_described(architecture: Architecture, tag: str | None = None) -> nn.Module:
    """The network that `architecture` describes, of checked names and arguments, with the pretrained weights `tag`."""
    library, name = architecture.library, architecture.name
    try:
        with _quiet():
            model = _BUILDERS[library](name, tag, **architecture.kwargs)
    except ConversionError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in architecture.kwargs.items()) or "its defaults"
        weights = f" and the weights {tag}" if tag else ""
        raise ConversionError(f"{library}/{name} cannot be built with {given}{weights}: {error}") from error
    model.__dict__[DESCRIPTION] = architecture
    return model


def tags(architecture: Architecture) -> list[str]:
    """The names of a network's pretrained weights, the default first."""
    if architecture.library == "timm":
        import timm

        found = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture.name}.*")]
        default = timm.get_pretrained_cfg(architecture.name)
        return sorted(found, key=lambda tag: tag != (default.tag if default is not None else ""))
    if architecture.library == "torchvision":
        import torchvision

        weights = torchvision.models.get_model_weights(architecture.name)
        return sorted((w.name for w in weights), key=lambda tag: tag != weights.DEFAULT.name)
    return []


def check_tag(architecture: Architecture, tag: str | None) -> str:
    """`tag` if the network has such pretrained weights, or its default one for None; else `UnknownName`."""
    known = tags(architecture)
    if not known:
        raise ConversionError(f"{architecture.library}/{architecture.name} has no pretrained weights")
    if tag is not None and tag not in known:
        raise unknown(f"weights of {architecture.library}/{architecture.name}", tag, known)
    return tag or known[0]


def read_weights(path: Path) -> dict[str, Any]:
    """The `state_dict` in a file: safetensors, or a checkpoint, of which nothing is run."""
    from timm.models import load_state_dict

    if not path.is_file():
        raise ConversionError(f"there is no file of weights {path}")
    try:
        return load_state_dict(str(path))
    except Exception as error:
        raise ConversionError(f"{path} holds no weights that can be read safely: {error}") from error


def _fill_from(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """A `state_dict`, which `what` names, into a network; layers that it has in another size are noted as fresh."""
    own = model.state_dict()
    if missing := [name for name in own if name not in state and not name.endswith("num_batches_tracked")]:
        raise ConversionError(f"{what} lacks {missing[0]!r} and {len(missing) - 1} more tensors of the network")
    if extra := [name for name in state if name not in own]:
        raise ConversionError(f"{what} has {extra[0]!r} and {len(extra) - 1} more tensors that the network does not")
    if bare := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{bare[0]!r} of {what} is {type(state[bare[0]]).__name__}; expected a tensor")
    other = [name for name, tensor in state.items() if tuple(own[name].shape) != tuple(tensor.shape)]
    if other and all(name in other for name, tensor in state.items() if tensor.ndim):
        name = other[0]
        raise ConversionError(
            f"no tensor of {what} has its size in the network: {name!r} is {tuple(state[name].shape)} there and "
            f"{tuple(own[name].shape)} here; expected the arguments that the weights' network was built with"
        )
    fresh = {name.rpartition(".")[0] for name in other}
    for name in other:
        if kind_of(model.get_submodule(name.rpartition(".")[0])) is None:
            shapes = f"{tuple(state[name].shape)}; the network's is {tuple(own[name].shape)}"
            raise ConversionError(f"{name!r} of {what} is {shapes}, and only a layer may have another size")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in other}, strict=False)
    model.__dict__[FRESH] = tuple(fresh)


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
        with torch.device("meta"), Blank():
            return build_described(architecture)
    except ConversionError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
    from accelerate import init_empty_weights

    with init_empty_weights():  # torchvision's regnets read values while they are built; only parameters are left out
        return build_described(architecture)


def build_blank(architecture: Architecture) -> tuple[nn.Module, Blank]:
    """As `build_described`, without its random initialisation; the second value tells what is not initialised."""
    with Blank() as blank:
        return build_described(architecture), blank


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the libraries, nothing that a user could act on
        yield


def _build_timm(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    import timm

    if not tag:
        return timm.create_model(name, pretrained=False, **kwargs)
    with _missing_keys() as missing:
        model = timm.create_model(f"{name}.{tag}", pretrained=True, **kwargs)
    # with another number of classes timm loads what it can
    model.__dict__[FRESH] = tuple({key.rpartition(".")[0] for key in missing})
    return model


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """The keys that weights loaded within it lacked."""
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    with patch.object(nn.Module, "load_state_dict", watched):
        yield missing


def _build_torchvision(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs = {"weights_backbone": None, **kwargs}
    if not tag:
        return builder(weights=None, **kwargs)
    classes = kwargs.pop("num_classes", None)
    model = builder(weights=torchvision.models.get_model_weights(name)[tag], **kwargs)
    if getattr(model, "transform_input", False):
        raise ConversionError(f"torchvision/{name} transforms its input for {tag}, which no file records; try timm's")
    if classes is not None:
        state, model = model.state_dict(), builder(weights=None, num_classes=classes, **kwargs)
        _fill_from(model, state, f"{name} {tag}")
    return model


def _build_own(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    from .paper_nets import NETS

    return NETS[name](**kwargs)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "popup_surgery": _build_own,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
