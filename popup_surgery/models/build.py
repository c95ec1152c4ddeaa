"""Build networks that record their own description: initialised, uninitialised, or on the meta device."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ..errors import ConversionError
from .architecture import Architecture, Base, note_origin
from .libraries import architecture_and_tag
from .pretrained import check_tag, fill_from, read_weights, weights_file, with_tag
from .skip_init import Blank


def build(name: str, *, pretrained: bool | str | Path = False, **kwargs: Any) -> nn.Module:
    """Build a network that records its own description, so that `save` can write it to a file.

    Args:
        name: `timm/…`, `torchvision/…`, `popup_surgery/conv4`, or such a name without the library. A tag after a dot
            means its weights: `timm/resnet18.a1_in1k` is `timm/resnet18` with `pretrained="a1_in1k"`.
        pretrained: False for the network's own random initialisation; True for the library's default weights; a tag of
            the library, such as `a1_in1k`; or the path of a file of weights, which is safetensors or a checkpoint that
            unpickles no code. If the classifier has another size than the pretrained one, it stays random, and
            conversion draws it from the seed.
        kwargs: arguments of the network. Only those that an artifact can record are allowed: `KWARGS`.

    Raises:
        UnknownName: there is no such network or tag.
        ConversionError: an artifact cannot record an argument, or the network does not take it; or the weights cannot
            be obtained, or do not fit the network.
    """
    described, named = architecture_and_tag(name, **kwargs)
    if named:
        pretrained = with_tag(name, named, pretrained)
    if pretrained is False or pretrained is None:
        return build_architecture(described)
    if (file := weights_file(pretrained)) is not None:
        model, tag, pretrained = build_architecture(described), "", file.absolute()
        fill_from(model, read_weights(file), str(file))
    else:
        tag = pretrained = check_tag(described, None if pretrained is True else str(pretrained))
        model = build_architecture(described, tag)
    note_origin(model, base=Base(described.library, described.version, described.name, tag), pretrained=pretrained)
    return model


def build_architecture(architecture: Architecture, tag: str | None = None) -> nn.Module:
    """Build the network that `architecture` describes, whose names and arguments were checked.

    Args:
        tag: which of the library's pretrained weights to load; none if None or empty.
    """
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
    note_origin(model, architecture=architecture)
    return model


def build_meta(architecture: Architecture) -> nn.Module:
    """Build like `build_architecture`, with parameters on the meta device, which take no memory."""
    try:
        with torch.device("meta"), Blank():
            return build_architecture(architecture)
    except ConversionError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
    from accelerate import init_empty_weights

    with init_empty_weights():  # torchvision's regnets read values while being built: only parameters go to meta
        return build_architecture(architecture)


def build_uninitialised(architecture: Architecture) -> tuple[nn.Module, Blank]:
    """Build like `build_architecture`, without random initialisation.

    Returns:
        The network, and the `Blank` that tells which of its parameters are not initialised.
    """
    with Blank() as blank:
        return build_architecture(architecture), blank


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the libraries, which a user can do nothing about
        yield


def _build_timm(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    """Build a timm network, and note the layers that the pretrained weights lack as fresh."""
    import timm

    if not tag:
        return timm.create_model(name, pretrained=False, **kwargs)
    with _missing_keys() as missing:
        model = timm.create_model(f"{name}.{tag}", pretrained=True, **kwargs)
    # if the number of classes differs, timm loads the weights that fit
    note_origin(model, fresh=tuple({key.rpartition(".")[0] for key in missing}))
    return model


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Context manager: a list that collects the keys missing from every `state_dict` that is loaded."""
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    with patch.object(nn.Module, "load_state_dict", watched):
        yield missing


def _build_torchvision(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    """Build a torchvision network; with another number of classes, load the pretrained weights that fit."""
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs = {"weights_backbone": None, **kwargs}
    if not tag:
        return builder(weights=None, **kwargs)
    classes = kwargs.pop("num_classes", None)
    model = builder(weights=torchvision.models.get_model_weights(name)[tag], **kwargs)
    if getattr(model, "transform_input", False):
        raise ConversionError(
            f"torchvision/{name} transforms its input for {tag}, which a file cannot record; use a network of timm"
        )
    if classes is not None:
        state, model = model.state_dict(), builder(weights=None, num_classes=classes, **kwargs)
        fill_from(model, state, f"{name} {tag}")
    return model


def _build_own(name: str, tag: str | None, **kwargs: Any) -> nn.Module:
    from .paper_nets import NETS

    return NETS[name](**kwargs)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "popup_surgery": _build_own,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
