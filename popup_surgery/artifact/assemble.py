"""Put a file together: a manifest, packed masks and stored tensors become bytes."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ..codecs import get_codec
from ..errors import ArtifactError
from .container import DTYPE_NAMES, METADATA
from .manifest import MANIFEST_LIMIT, Manifest, read_manifest
from .mask_bytes import encode_mask, encode_planes, recoded
from .planes import Bits
from .rebuild import tensors_digest
from .strict_json import canonical


def assemble(
    manifest: Manifest, bits: Mapping[str, Bits], stored: Mapping[str, Tensor], encoding: str | None = None
) -> tuple[Manifest, bytes]:
    """Return the manifest as the file has it, and the bytes of the file.

    Args:
        manifest: what the file says; the numbers of kept weights and its digests are those of `bits` and `stored`, but
            for `tensors_sha256`, which is replaced.
        bits: the packed mask of each masked weight, by name, and its planes.
        stored: the tensors that no seed gives, by name, on the CPU.
        encoding: the codec of all masks; None: of each mask the one that the manifest names. With one at the entropy
            limit, planes are coded too, where that saves bytes.

    Raises:
        ArtifactError: the manifest cannot be written, or the codec needs a pattern that a mask does not have.
        UnknownName: there is no such codec.
    """
    if encoding is not None:
        codec = get_codec(encoding)
        if codec.needs_pattern and (odd := [entry.name for entry in manifest.masked if entry.pattern is None]):
            raise ArtifactError(
                f"the encoding {encoding} is for masks of a pattern such as 2:4, and {odd[0]!r} has none; expected "
                "bitpack or range_coded"
            )
        masked = tuple(recoded(entry, encoding, bits[entry.name].planes) for entry in manifest.masked)
        manifest = replace(manifest, masked=masked)
    tensors = dict(stored)
    for entry in manifest.masked:
        planes = encode_planes(entry, bits[entry.name].planes)
        tensors |= {f"{entry.name}.{kind}": torch.from_numpy(plane) for kind, plane in planes.items()}
    digest = tensors_digest({name: _bytes(tensor) for name, tensor in tensors.items()})
    manifest = replace(manifest, tensors_sha256=digest)
    try:
        text = canonical(manifest.text())
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the provenance cannot be written as JSON: {error}") from error
    if len(text) > MANIFEST_LIMIT:
        raise ArtifactError(f"the manifest would have {len(text):,} bytes; expected at most {MANIFEST_LIMIT:,}")
    read_manifest(text)  # make sure that what is written can be read
    masks = {
        f"{entry.name}.mask": torch.from_numpy(encode_mask(entry, manifest.seed, bits[entry.name].mask))
        for entry in manifest.masked
    }
    return manifest, serialize(masks | tensors, metadata={METADATA: text})


def _bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data.data
