"""The architecture that a file records: one that builds the same network again, or `custom` and the reason."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError, PopupError
from ..models.architecture import KWARGS, Architecture, check_kwargs, origin_of
from ..models.build import build_uninitialised
from ..models.libraries import architecture_of
from ..models.structure import difference, is_extra_state


def describe_network(core: nn.Module, entries: Mapping[str, Tensor]) -> tuple[Architecture, str]:
    """Return a description that builds a network which computes what `core` does; and if none does, why.

    It is the one that `core` was built or converted with, or the name that timm noted on it, perhaps with another head
    or input size. Without either it is `custom`.

    Args:
        entries: the `state_dict` of `core`, without scores.
    """
    custom = Architecture("custom", type(core).__name__)
    described = origin_of(core).architecture or _noted_by_timm(core)
    if described is None or described.library == "custom":
        return custom, ""
    kwargs, reason = described.kwargs, ""
    for _ in range(2):  # as described, and once more with the arguments that differ
        found = replace(described, kwargs=kwargs)
        try:
            check_kwargs(kwargs)
            with as_libraries_build():
                reference = build_uninitialised(found)[0]
        except ConversionError as error:
            return custom, reason or str(error)
        cast_like(reference, entries)
        if (differs := _other_entries(entries, reference) or difference(core, reference)) is None:
            return found, ""
        kwargs, reason = described.kwargs | _changed(core, entries, reference), differs
        if kwargs == found.kwargs:
            break
    return custom, f"it is not {described.library}/{described.name}: {reason}"


@contextmanager
def as_libraries_build() -> Iterator[None]:
    """Context manager: networks are built in float32, whatever the process's default, and draw no number."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(default)


def cast_like(network: nn.Module, entries: Mapping[str, Any]) -> None:
    """Give the tensors of a network that a library built the dtypes of a file's or network's `entries`.

    Buffers that are in no `state_dict` get the dtype that most values of `entries` have.

    Args:
        entries: anything with `dtype` and `shape`, by `state_dict` key.
    """
    sizes: dict[torch.dtype, int] = {}
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    if not sizes:
        return
    network.to(max(sizes, key=lambda dtype: sizes[dtype]))
    for name, tensor in network.state_dict(keep_vars=True).items():
        entry = entries.get(name)
        if (
            isinstance(tensor, Tensor)
            and entry is not None
            and tensor.is_floating_point() == entry.dtype.is_floating_point
            and not {tensor.dtype, entry.dtype} & {torch.bool}
            and tensor.is_complex() == entry.dtype.is_complex
        ):
            tensor.data = tensor.data.to(entry.dtype)


def _noted_by_timm(core: nn.Module) -> Architecture | None:
    """Return the network's name and arguments as timm noted them; None if it is none of timm's."""
    config = getattr(core, "pretrained_cfg", None) or getattr(core, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str) or not type(core).__module__.startswith("timm."):
        return None
    try:
        return architecture_of(f"timm/{name}")
    except PopupError:
        return None


def _other_entries(entries: Mapping[str, Tensor], reference: nn.Module) -> str | None:
    """Return the first difference in the names and shapes of two networks' `state_dict`s, as a clause."""
    theirs = reference.state_dict(keep_vars=True)
    for name in [*theirs, *(name for name in entries if name not in theirs)]:
        if name not in entries or name not in theirs:
            return f"{name} is {'missing' if name not in entries else 'new'}"
        if not is_extra_state(name) and entries[name].shape != theirs[name].shape:
            return f"{name} has the shape {tuple(entries[name].shape)}, not {tuple(theirs[name].shape)}"
    return None


def _changed(core: nn.Module, entries: Mapping[str, Tensor], reference: nn.Module) -> dict[str, Any]:
    """Return the arguments with which `reference` would have been built as `core` is now, as far as `core` shows."""
    found: dict[str, Any] = {}
    for key, read in ("global_pool", _pooling), ("img_size", _image_size):
        if (value := read(core)) is not None and value != read(reference):
            found[key] = value
    shapes = [
        (tuple(entries[name].shape), tuple(tensor.shape))
        for name, tensor in reference.state_dict(keep_vars=True).items()
        if name in entries and not is_extra_state(name) and entries[name].shape != tensor.shape
    ]
    for key, axis, least in ("num_classes", 0, 1), ("in_chans", 1, 4):
        sizes = {
            ours[axis]
            for ours, theirs in shapes
            if len(ours) == len(theirs) >= least
            and ours[:axis] + ours[axis + 1 :] == theirs[:axis] + theirs[axis + 1 :]
        }
        if len(sizes) == 1:
            found[key] = sizes.pop()
    classes = getattr(core, "num_classes", None)
    if classes != getattr(reference, "num_classes", None) and KWARGS["num_classes"][1](classes):
        found.setdefault("num_classes", classes)
    return found


def _pooling(network: nn.Module) -> str | None:
    pool = getattr(network, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return pool if isinstance(pool, str) else None


def _image_size(network: nn.Module) -> list[int] | None:
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return list(size) if isinstance(size, tuple | list) else None
