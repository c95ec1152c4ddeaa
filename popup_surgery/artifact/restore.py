"""Build and fill the network that a file describes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConversionError
from ..masking.walk import masked_weights, unwrap
from ..models.build import build_architecture, build_meta, build_uninitialised
from ..weights.fill import fill
from .base_weights import base_weights, library_tag
from .compare import check_architecture, common_dtype, compare
from .container import DTYPES
from .reader import Contents
from .rebuild import effective_pieces, generated_pieces


def fill_network(contents: Contents, model: nn.Module | None, base: nn.Module | str | Path | None) -> nn.Module:
    """Build and fill the network that `contents` describes, or fill `model` if it is given."""
    manifest = contents.manifest
    if base is not None and manifest.base is None:
        raise ArtifactError("`base` was given, but the file's weights come from its seed; leave out `base`")
    if model is None:
        check_architecture(manifest.architecture)
        tag = library_tag(manifest) if manifest.base is not None and base is None else None
        dtype = common_dtype(contents)
        try:
            bare = build_meta(manifest.architecture)
            compare(contents, bare.to(dtype) if dtype else bare)
            network = (
                build_architecture(manifest.architecture, tag) if tag else build_uninitialised(manifest.architecture)[0]
            )
        except ConversionError as error:
            raise ArtifactError(f"the architecture cannot be built: {error}") from error
        core = network.to(dtype) if dtype else network
    elif not isinstance(model, nn.Module):
        raise ArtifactError(f"model is {model!r}; expected a plain torch.nn.Module to fill")
    else:
        network, core = model, unwrap(model)
        if any(True for _ in masked_weights(core)):
            raise ArtifactError("the network to fill is converted; expected a plain one")
    compare(contents, core)
    _fill(contents, core, base_weights(manifest, core, base))
    return network.eval()


def _fill(contents: Contents, core: nn.Module, base: dict[str, Tensor]) -> None:
    """Write every tensor of the file into the network, in place."""
    manifest = contents.manifest
    entries: dict[str, Tensor] = core.state_dict(keep_vars=True)
    meta = [name for name, tensor in entries.items() if tensor.is_meta]
    if meta:
        raise ArtifactError(f"{meta[0]!r} of the network to fill is on the meta device and cannot hold values")
    with torch.no_grad():
        for entry in manifest.masked:
            pieces = effective_pieces(entry, manifest.seed, contents.masks[entry.name], base.get(entry.name))
            fill(entries[entry.name], pieces)
        for entry in manifest.generated:
            fill(entries[entry.name], generated_pieces(entry, manifest.seed))
        for name, constant in manifest.constants.items():
            entries[name].detach().fill_(constant.value)
        for name, (stored, data) in contents.stored.items():
            if len(data):
                flat = torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[stored.dtype])
                entries[name].detach().copy_(flat.view(stored.shape))
        for name, target in manifest.aliases.items():
            if entries[name] is not entries[target]:
                entries[name].detach().copy_(entries[target].detach())
