"""Build and fill the network that a file describes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConversionError
from ..masking.memory import overlapping
from ..masking.walk import masked_weights, unwrap
from ..models.build import build_architecture, build_meta, build_uninitialised
from ..models.structure import is_extra_state
from ..weights.fill import fill
from .base_weights import base_weights, library_tag
from .compare import check_architecture, compare, entries_of
from .description import as_libraries_build, cast_like
from .reader import Contents
from .rebuild import Packed, effective_pieces, generated_pieces, stored_tensor


def fill_network(
    contents: Contents, model: nn.Module | None, base: nn.Module | str | Path | None, masked: bool = True
) -> nn.Module:
    """Build and fill the network that `contents` describes, or fill `model` if it is given.

    Masks are decoded once the shapes have matched. With `masked=False`, weights outside the mask keep their values.
    """
    manifest = contents.manifest
    if base is not None and manifest.base is None:
        raise ArtifactError("`base` was given, but the file's weights come from its seed; leave out `base`")
    if model is None:
        check_architecture(manifest.architecture, manifest.provenance.get("custom"))
        tag = library_tag(manifest) if manifest.base is not None and base is None else None
        entries = entries_of(contents)
        try:
            with as_libraries_build():
                bare = build_meta(manifest.architecture)
                cast_like(bare, entries)
                compare(contents, bare.state_dict(keep_vars=True))
                contents.decode()
                network = (
                    build_architecture(manifest.architecture, tag)
                    if tag
                    else build_uninitialised(manifest.architecture)[0]
                )
        except ConversionError as error:
            raise ArtifactError(f"the architecture cannot be built: {error}") from error
        cast_like(network, entries)
        core = network
    elif not isinstance(model, nn.Module):
        raise ArtifactError(f"model is {model!r}; expected a plain torch.nn.Module to fill")
    else:
        network, core = model, unwrap(model)
        if any(True for _ in masked_weights(core)):
            raise ArtifactError("the network to fill is converted; expected a plain one")
    if model is not None:
        check_memory(core)
    compare(contents, core.state_dict(keep_vars=True))
    masks = contents.decode()
    if not masked:
        masks = {name: np.full_like(bits, 255) for name, bits in masks.items()}
    _fill(contents, masks, core, base_weights(manifest, core, base))
    return network.eval()


def check_memory(core: nn.Module, what: str = "the network to fill") -> None:
    """Raise `ArtifactError` if filling one entry of the network would change another."""
    entries = core.state_dict(keep_vars=True).items()
    named = list({id(tensor): (key, tensor) for key, tensor in entries if isinstance(tensor, Tensor)}.values())
    for one, other in overlapping([tensor for _, tensor in named]):
        raise ArtifactError(
            f"{named[one][0]!r} and {named[other][0]!r} of {what} share memory and are not the same tensor; "
            "give one a copy of its own with clone()"
        )


def _fill(contents: Contents, masks: Mapping[str, Packed], core: nn.Module, base: dict[str, Tensor]) -> None:
    """Write every tensor of the file into the network, in place."""
    manifest = contents.manifest
    entries: dict[str, Tensor] = core.state_dict(keep_vars=True)
    meta = [name for name, tensor in entries.items() if tensor.is_meta]
    if meta:
        raise ArtifactError(f"{meta[0]!r} of the network to fill is on the meta device and cannot hold values")
    made = derived(core, entries)
    for name in made:
        entry = entries_of(contents)[name]
        entries[name] = torch.empty(entry.shape, dtype=entry.dtype)
    with torch.no_grad():
        for spec in manifest.masked:
            fill(
                entries[spec.name],
                effective_pieces(spec, manifest.seed, masks[spec.name], base.get(spec.name)),
            )
        for spec in manifest.generated:
            fill(entries[spec.name], generated_pieces(spec, manifest.seed))
        for name, constant in manifest.constants.items():
            entries[name].detach().fill_(constant.value)
        for name, (stored, data) in contents.stored.items():
            entries[name].detach().copy_(stored_tensor(stored, data))
        for name, target in manifest.aliases.items():
            if entries[name] is not entries[target]:
                entries[name].detach().copy_(entries[target].detach())
    if made:
        try:
            core.load_state_dict(entries)
        except Exception as error:  # a module may raise anything for a state that does not fit it
            raise ArtifactError(f"the network does not take {made[0]!r} of the file: {error}") from error


def derived(core: nn.Module, entries: Mapping[str, Tensor]) -> list[str]:
    """Return the `state_dict` entries that are no tensors of the network, but made when they are read."""
    own = {
        id(tensor) for module in core.modules() for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    return [name for name, tensor in entries.items() if id(tensor) not in own or is_extra_state(name)]
