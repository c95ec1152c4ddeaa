"""The network that a file describes: `load`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConversionError
from ..masking.walk import masked_weights, unwrap
from ..models.build import build_architecture, build_meta, build_uninitialised
from ..weights.fill import fill
from .base_weights import base_weights, library_tag
from .compare import check_architecture, common_dtype, compare
from .container import DTYPES
from .reader import Artifact, naming, read
from .rebuild import effective_pieces, generated_pieces


def load(path: str | Path, model: nn.Module | None = None, *, base: nn.Module | str | Path | None = None) -> nn.Module:
    """The plain network that a popup artifact describes, in eval mode, its `state_dict` exact to the bit.

    Args:
        path: the file. It is treated as hostile: nothing in it is unpickled or run, and memory is at most twice the
            file, plus the network, plus 256 MiB.
        model: a plain network to fill, needed only where the file's architecture is `custom`; it is changed only
            after all checks have passed.
        base: for a mask on pretrained weights the network that has them, or a file of weights; without it they are
            `model`'s own, or the library's by the tag that the file names. Other weights are refused.

    Returns:
        A network of ordinary layers, float tensors of the file's dtypes; `model` itself if it was given.

    Raises:
        ArtifactError: names the file, the tensor, and what was expected.
    """
    with naming(path):
        return fill_network(read(path), model, base)


def load_unmasked(path: str | Path, *, base: nn.Module | str | Path | None = None) -> nn.Module:
    """As `load`, with all weights of the seed or the base, also those that take no part."""
    with naming(path):
        artifact = read(path)
        ones = {name: np.full_like(mask, 255) for name, mask in artifact.masks.items()}
        return fill_network(replace(artifact, masks=ones), None, base)


def fill_network(artifact: Artifact, model: nn.Module | None, base: nn.Module | str | Path | None) -> nn.Module:
    """The network that `artifact` describes, in `model` if it is given."""
    manifest = artifact.manifest
    if base is not None and manifest.base is None:
        raise ArtifactError("a base was given, and the file's weights are those of its seed")
    if model is None:
        check_architecture(manifest.architecture)
        tag = library_tag(manifest) if manifest.base is not None and base is None else None
        dtype = common_dtype(artifact)
        try:
            bare = build_meta(manifest.architecture)
            compare(artifact, bare.to(dtype) if dtype else bare)
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
            raise ArtifactError("the model to fill is converted; expected a plain network")
    compare(artifact, core)
    _fill(artifact, core, base_weights(manifest, core, base))
    return network.eval()


def _fill(artifact: Artifact, core: nn.Module, base: dict[str, Tensor]) -> None:
    manifest = artifact.manifest
    entries: dict[str, Tensor] = core.state_dict(keep_vars=True)
    meta = [name for name, tensor in entries.items() if tensor.is_meta]
    if meta:
        raise ArtifactError(f"{meta[0]!r} of the network to fill is on the meta device and cannot hold values")
    with torch.no_grad():
        for entry in manifest.masked:
            pieces = effective_pieces(entry, manifest.seed, artifact.masks[entry.name], base.get(entry.name))
            fill(entries[entry.name], pieces)
        for entry in manifest.generated:
            fill(entries[entry.name], generated_pieces(entry, manifest.seed))
        for name, constant in manifest.constants.items():
            entries[name].detach().fill_(constant.value)
        for name, (stored, data) in artifact.stored.items():
            if len(data):
                flat = torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[stored.dtype])
                entries[name].detach().copy_(flat.view(stored.shape))
        for name, target in manifest.aliases.items():
            if entries[name] is not entries[target]:
                entries[name].detach().copy_(entries[target].detach())
