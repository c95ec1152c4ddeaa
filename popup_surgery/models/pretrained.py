"""Pretrained weights: tags of a library, and files of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConversionError, unknown
from .architecture import Architecture, note_origin
from .layer_types import layer_type_of

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def tags(architecture: Architecture) -> list[str]:
    """Return the names of a network's pretrained weights, the default first."""
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
    """Return `tag`, or the network's default tag if it is None.

    Raises:
        UnknownName: the network has no such tag.
        ConversionError: the network has no pretrained weights.
    """
    known = tags(architecture)
    if not known:
        raise ConversionError(f"{architecture.library}/{architecture.name} has no pretrained weights")
    if tag is not None and tag not in known:
        raise unknown(f"weights of {architecture.library}/{architecture.name}", tag, known)
    return tag or known[0]


def read_weights(path: Path) -> dict[str, Any]:
    """Read the `state_dict` in a file: safetensors, or a checkpoint, none of whose code is run."""
    from timm.models import load_state_dict

    if not path.is_file():
        raise ConversionError(f"the file of weights {path} does not exist")
    try:
        return load_state_dict(str(path))
    except Exception as error:
        raise ConversionError(f"{path} has no weights that can be read safely: {error}") from error


def fill_from(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load a `state_dict` into a network. Layers that have another size there are noted as fresh.

    Args:
        what: name of the `state_dict`, for messages.

    Raises:
        ConversionError: the `state_dict` does not fit the network.
    """
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
            f"{tuple(own[name].shape)} here; build the network with the arguments that the weights were trained with"
        )
    fresh = {name.rpartition(".")[0] for name in other}
    for name in other:
        if layer_type_of(model.get_submodule(name.rpartition(".")[0])) is None:
            shapes = f"{tuple(state[name].shape)}; the network's is {tuple(own[name].shape)}"
            raise ConversionError(
                f"{name!r} of {what} is {shapes}, and only a layer that can be masked may have another size"
            )
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in other}, strict=False)
    note_origin(model, fresh=tuple(fresh))
