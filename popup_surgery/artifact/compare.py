"""Checks that a file and a network fit each other."""

import re

import torch
from torch import nn

from ..errors import ArtifactError, PopupError
from ..models.architecture import KWARGS, Architecture, check_kwargs
from ..models.libraries import LIBRARIES, names
from .container import DTYPE_NAMES, DTYPES
from .reader import Contents


def check_architecture(architecture: Architecture) -> None:
    """Raise `ArtifactError` unless a library builds this architecture, with arguments within their bounds."""
    library, name = architecture.library, architecture.name
    if library == "custom":
        raise ArtifactError(
            f"the architecture is custom ({name}), which no library builds; pass the network to fill to "
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


def common_dtype(contents: Contents) -> torch.dtype | None:
    """Return the floating dtype that the network was cast to; None if the masked weights share none or float32."""
    dtypes = {entry.dtype for entry in contents.manifest.masked}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 and dtypes != {"F32"} else None


def compare(contents: Contents, core: nn.Module) -> None:
    """Check that file and network have the same `state_dict` entries, with the same shapes, dtypes and ties."""
    manifest = contents.manifest
    file: dict[str, tuple[str, tuple[int, ...]]] = {
        entry.name: (entry.dtype, entry.shape) for entry in (*manifest.masked, *manifest.generated)
    }
    file |= {name: (constant.dtype, constant.shape) for name, constant in manifest.constants.items()}
    file |= {name: (tensor.dtype, tensor.shape) for name, (tensor, _) in contents.stored.items()}
    file |= {name: file[target] for name, target in manifest.aliases.items()}
    entries = core.state_dict(keep_vars=True)
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
        if shape != tuple(tensor.shape):
            raise ArtifactError(f"{name!r}: the file's tensor is for {shape}, the network has {tuple(tensor.shape)}")
        if dtype != DTYPE_NAMES.get(tensor.dtype):
            raise ArtifactError(f"{name!r}: the file's tensor is {dtype}, the network's {tensor.dtype}")
        tied = first.setdefault(id(tensor), name)
        if manifest.aliases.get(name, name) != manifest.aliases.get(tied, tied):
            raise ArtifactError(f"{name!r}: the network ties it to {tied!r}, the file does not")
