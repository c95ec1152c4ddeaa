"""Put a file together: a manifest, packed masks and stored tensors become bytes."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ..codecs import get_codec
from ..errors import ArtifactError
from .container import METADATA
from .manifest import MANIFEST_LIMIT, Manifest, read_manifest
from .mask_bytes import encode_mask
from .planes import Bits
from .strict_json import canonical


def assemble(
    manifest: Manifest, bits: Mapping[str, Bits], stored: Mapping[str, Tensor], encoding: str | None = None
) -> tuple[Manifest, bytes]:
    """Return the manifest as the file has it, and the bytes of the file.

    Args:
        manifest: what the file says; its digests and the numbers of kept weights are those of `bits` and `stored`.
        bits: the packed mask of each masked weight, by name, and its planes.
        stored: the tensors that no seed gives, by name, on the CPU.
        encoding: the codec of all masks; None: of each mask the one that the manifest names.

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
        manifest = replace(manifest, masked=tuple(replace(entry, encoding=encoding) for entry in manifest.masked))
    try:
        text = canonical(manifest.text())
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the provenance cannot be written as JSON: {error}") from error
    if len(text) > MANIFEST_LIMIT:
        raise ArtifactError(f"the manifest would have {len(text):,} bytes; expected at most {MANIFEST_LIMIT:,}")
    read_manifest(text)  # make sure that what is written can be read
    tensors = {
        f"{entry.name}.mask": torch.from_numpy(encode_mask(entry, manifest.seed, bits[entry.name].mask))
        for entry in manifest.masked
    }
    tensors |= {f"{name}.{kind}": torch.from_numpy(p) for name, b in bits.items() for kind, p in b.planes.items()}
    return manifest, serialize(tensors | dict(stored), metadata={METADATA: text})
