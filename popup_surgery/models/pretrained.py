"""Pretrained weights: tags of a library, and files of weights."""

from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..errors import ConversionError, unknown
from .architecture import Architecture, note_origin
from .layer_types import layer_type_of

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


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


def with_tag(name: str, tag: str, pretrained: object) -> str:
    """Return the tag in a network's name, which `pretrained` must not contradict.

    Raises:
        ConversionError: `pretrained` gives other weights than the name.
    """
    if pretrained not in (None, False, True, tag):
        raise ConversionError(
            f"{name} names the pretrained weights {tag}, and pretrained is {str(pretrained)!r}; expected one of them"
        )
    return tag


def weights_file(pretrained: object) -> Path | None:
    """Return the file that `pretrained` gives; None if it is a tag, or no weights at all."""
    if isinstance(pretrained, str) and Path(pretrained).suffix in WEIGHT_FILES:
        return Path(pretrained)
    return pretrained if isinstance(pretrained, Path) else None


def read_weights(path: Path) -> dict[str, Any]:
    """Read the `state_dict` in a file: safetensors, or a checkpoint, none of whose code is run."""
    from timm.models import load_state_dict

    if not path.is_file():
        where = "; weights are not read from the Hub: download the file first" if str(path).startswith("hf:") else ""
        raise ConversionError(f"the file of weights {path} does not exist{where}")
    try:
        state: dict[str, Any] = load_state_dict(str(path))
    except Exception as error:
        raise ConversionError(f"{path} has no weights that can be read safely: {error}") from error
    if kind := _no_weights(path, state):
        raise ConversionError(f"{path} is {kind}")
    return state


def _no_weights(path: Path, state: Mapping[str, Any]) -> str:
    """Return what a file of this library is that has no network's weights, and what has them; empty for weights."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            if "popup_surgery" in (file.metadata() or {}):
                return "a popup artifact, which has a seed and masks; popup-surgery export writes its weights"
    if state and all(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in state.values()):
        return "a file of masks; the weights are in the file beside it"
    if any(str(name).startswith("optimizer.") for name in state):
        return "a checkpoint of a run; the file that the run ends with has its weights"
    return ""


def without_prefix(state: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Return a `state_dict` without a prefix that all its keys share, such as `model.` of Lightning's checkpoints.

    It is returned unchanged if some of `names`, the keys that are wanted, are in it as they are, or under no prefix.
    """
    columns = zip(*(str(key).split(".")[:-1] for key in state))
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    for depth in range(len(shared) + 1):
        length = sum(len(part) + 1 for part in shared[:depth])
        if any(key[length:] in names for key in state):
            return {key[length:]: value for key, value in state.items()}
    return state


def prefix_note(state: Mapping[str, Any], name: str) -> str:
    """Return a clause for a message that `state` lacks `name`: under which prefixes it has it; empty if under none."""
    found = [key.removesuffix(name) for key in state if key.endswith(f".{name}")]
    if not found:
        return ""
    counts = [f"{prefix!r} ({sum(key.startswith(prefix) for key in state)} of {len(state)})" for prefix in found]
    return f"; keys there begin with {' or '.join(counts)}: keep those of one prefix, without it"


def fill_from(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load a `state_dict` into a network. Layers that have another size there are noted as fresh.

    A prefix that all keys share, such as `model.`, is dropped where the network's keys lack it.

    Args:
        what: name of the `state_dict`, for messages.

    Raises:
        ConversionError: the `state_dict` does not fit the network.
    """
    own = model.state_dict()
    state = without_prefix(state, own)
    if missing := [name for name in own if name not in state and not name.endswith("num_batches_tracked")]:
        raise ConversionError(
            f"{what} lacks {missing[0]!r} and {len(missing) - 1} more tensors of the network"
            + prefix_note(state, missing[0])
        )
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
