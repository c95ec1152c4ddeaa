"""Checks that a file and a network fit each other."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArtifactError, PopupError
from ..models.architecture import KWARGS, Architecture, check_kwargs
from ..models.libraries import LIBRARIES, names
from ..models.structure import is_extra_state
from .container import DTYPE_NAMES, DTYPES
from .reader import Contents


def check_architecture(architecture: Architecture, reason: object = None) -> None:
    """Raise `ArtifactError` unless a library builds this architecture, with arguments within their bounds.

    Args:
        reason: why the file's architecture is `custom`, if it says so.
    """
    library, name = architecture.library, architecture.name
    if library == "custom":
        because = f"; {reason}" if isinstance(reason, str) else ""
        raise ArtifactError(
            f"the architecture is custom ({name}), which no library builds{because}; pass the network to fill to "
            "popup_surgery.load as `model`"
        )
    if library not in LIBRARIES:
        raise ArtifactError(f"architecture.library is {library!r}; expected one of {', '.join(LIBRARIES)}, custom")
    if not re.fullmatch("[a-z0-9_]+", name) or name not in names(library):
        raise ArtifactError(f"architecture.name is {name[:60]!r}, which {library} does not have")
    if unknown := architecture.kwargs.keys() - KWARGS.keys():
        raise ArtifactError(f"architecture.kwargs has {min(unknown)!r}; expected some of {', '.join(KWARGS)}")
    try:
        check_kwargs(architecture.kwargs)
    except PopupError as error:
        raise ArtifactError(f"architecture.kwargs: {error}") from error


class Entry(NamedTuple):
    """Dtype and shape of a `state_dict` entry."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def entries_of(contents: Contents) -> dict[str, Entry]:
    """Return the `state_dict` entries that a file gives back, by name."""
    manifest = contents.manifest
    file = {entry.name: (entry.dtype, entry.shape) for entry in (*manifest.masked, *manifest.generated)}
    file |= {name: (constant.dtype, constant.shape) for name, constant in manifest.constants.items()}
    file |= {name: (tensor.dtype, tensor.shape) for name, (tensor, _) in contents.stored.items()}
    file |= {name: file[target] for name, target in manifest.aliases.items()}
    return {name: Entry(DTYPES[dtype], shape) for name, (dtype, shape) in file.items()}


def compare(contents: Contents, entries: Mapping[str, Tensor]) -> None:
    """Check that file and network have the same `state_dict` entries, with the same shapes, dtypes and ties.

    Args:
        entries: the network's `state_dict`. Keys of one tensor have one object.
    """
    manifest, file = contents.manifest, entries_of(contents)
    if missing := [name for name in entries if name not in file]:
        raise ArtifactError(f"the network has {missing[0]!r} (and {len(missing) - 1} more) that the file does not hold")
    if extra := [name for name in file if name not in entries]:
        raise ArtifactError(f"the file holds {extra[0]!r} (and {len(extra) - 1} more) that the network does not have")
    first: dict[int, str] = {}
    place = {name: i for i, name in enumerate(entries)}
    for name, tensor in entries.items():
        dtype, shape = file[name]
        if place[name] < place[manifest.aliases.get(name, name)]:
            raise ArtifactError(f"aliases[{name!r}] is {manifest.aliases[name]!r}; expected an earlier key")
        if is_extra_state(name):
            continue  # what it holds is for its module alone to check
        if shape != tuple(tensor.shape):
            raise ArtifactError(f"{name!r}: the file's tensor is for {shape}, the network has {tuple(tensor.shape)}")
        if dtype != tensor.dtype:
            raise ArtifactError(f"{name!r}: the file's tensor is {DTYPE_NAMES[dtype]}, the network's {tensor.dtype}")
        tied = first.setdefault(id(tensor), name)
        if manifest.aliases.get(name, name) != manifest.aliases.get(tied, tied):
            raise ArtifactError(f"{name!r}: the network ties it to {tied!r}, the file does not")
