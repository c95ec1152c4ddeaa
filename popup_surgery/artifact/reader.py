"""Reading a file that somebody else made: everything is checked before anything of its sizes is made (section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..codecs.bitpack import ones, padding_is_zero
from ..errors import ArtifactError
from .container import Container, Stored, open_file, read_header
from .manifest import Manifest, read_manifest
from .rebuild import Packed, masks_digest, tensors_digest


@dataclass(frozen=True)
class Artifact:
    """A file that has passed all checks that need no network: manifest, packed masks and stored tensors by name."""

    manifest: Manifest
    masks: dict[str, Packed]
    stored: dict[str, tuple[Stored, memoryview]]


def inspect(path: str | Path) -> Manifest:
    """The manifest of a popup artifact, without reading its tensors.

    Raises:
        ArtifactError: the file is missing, or its header or manifest is not as the format says.
    """
    with naming(path), open_file(path) as file:
        container = read_header(file)
        manifest = read_manifest(container.manifest)
        _check_tensors(manifest, container)
        return manifest


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of an `ArtifactError`."""
    try:
        yield
    except ArtifactError as error:
        text = str(error)  # which may quote a stranger's file
        raise ArtifactError(f"{path}: {text[:1000]}{'…' if len(text) > 1000 else ''}") from error.__cause__


def _check_tensors(manifest: Manifest, container: Container) -> None:
    described = {e.name for e in (*manifest.masked, *manifest.generated)} | {*manifest.constants, *manifest.aliases}
    for entry in manifest.masked:
        mask = container.tensors.get(f"{entry.name}.mask")
        expected = -(-entry.numel // 8)
        if mask is None:
            raise ArtifactError(f"{entry.name!r} has no mask; expected the tensor '{entry.name}.mask'")
        if mask.dtype != "U8" or mask.shape != (expected,):
            found = f"{mask.dtype} {list(mask.shape)}"
            raise ArtifactError(f"'{entry.name}.mask' is {found}; expected U8 [{expected}] for {list(entry.shape)}")
    if both := described & container.tensors.keys():
        raise ArtifactError(f"{min(both)!r} is stored, and stands in the manifest's lists too")
    known = described | (container.tensors.keys() - {f"{entry.name}.mask" for entry in manifest.masked})
    for name, target in manifest.aliases.items():
        if target not in known:
            raise ArtifactError(f"aliases[{name!r}] is {target!r}, which the file does not hold")


def read(path: str | Path) -> Artifact:
    """The file, after all checks that need no network."""
    with open_file(path) as file:
        container = read_header(file)
        manifest = read_manifest(container.manifest)
        _check_tensors(manifest, container)
        buffer = bytearray(max((tensor.stop for tensor in container.tensors.values()), default=0))
        file.seek(container.data_start)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise ArtifactError("the file changed while it was read")
    data = memoryview(buffer)
    masks: dict[str, Packed] = {}
    stored = dict(container.tensors)
    for entry in manifest.masked:
        tensor = stored.pop(f"{entry.name}.mask")
        packed = np.frombuffer(data[tensor.start : tensor.stop], np.uint8)
        if not padding_is_zero(packed, entry.numel):
            raise ArtifactError(f"'{entry.name}.mask' has padding bits that are not 0")
        if ones(packed) != entry.kept:
            raise ArtifactError(f"'{entry.name}.mask' keeps {ones(packed)} weights; expected {entry.kept}")
        masks[entry.name] = packed
    if masks_digest(list(masks.values())) != manifest.masks_sha256:
        raise ArtifactError("masks_sha256 does not match: a mask is damaged")
    for name, tensor in stored.items():
        if tensor.dtype == "BOOL" and np.frombuffer(data[tensor.start : tensor.stop], np.uint8).max(initial=0) > 1:
            raise ArtifactError(f"{name!r} is BOOL and has bytes other than 0 and 1")
    found = {name: (tensor, data[tensor.start : tensor.stop]) for name, tensor in stored.items()}
    digested = {name: (tensor.dtype, tensor.shape, part) for name, (tensor, part) in found.items()}
    if tensors_digest(digested) != manifest.tensors_sha256:
        raise ArtifactError("tensors_sha256 does not match: a stored tensor is damaged")
    return Artifact(manifest, masks, found)
