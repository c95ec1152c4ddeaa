"""Read a file that somebody else made (docs/artifact-format.md, section 3).

Everything is checked before memory is allocated whose size the file decides.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArtifactError
from .container import Container, Stored, open_file, read_header, stamp_of
from .manifest import Manifest, read_manifest
from .mask_bytes import decode_mask, expands, mask_sizes
from .planes import CODED, Bits, Packed, check_coded, coded_bound
from .rebuild import masks_digest, tensors_digest

if TYPE_CHECKING:
    from ..hub.files import HubFile

LIMIT = 1 << 33  # weights whose masks are decoded without a network to compare them with
Parts = dict[str, tuple[Stored, memoryview]]


@dataclass(frozen=True, eq=False)
class Contents:
    """The manifest and the tensors of a file, by name. The stored ones are checked; masks are when they are decoded.

    Attributes:
        encoded: each mask's bytes as the file has them.
        stored: the tensors that no seed gives.
        planes: of each masked weight, what changes the weights that take part. Checked, but for coded ones.
    """

    manifest: Manifest
    encoded: Mapping[str, memoryview]
    stored: Parts
    planes: Mapping[str, Mapping[str, Packed]] = field(default_factory=dict)
    _decoded: dict[str, Bits] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, manifest: Manifest, masks: Mapping[str, Packed], stored: Parts) -> "Contents":
        """Return what a file in memory would have, whose masks are decoded already and have no planes."""
        return cls(manifest, {}, stored, {}, {name: Bits(mask) for name, mask in masks.items()})

    def decode(self) -> dict[str, Bits]:
        """Return the packed masks, decoded and checked once. The file must have been compared with a network before.

        Each has its planes with it, without which the weights under it are others.
        """
        if not self._decoded:
            masks = {
                entry.name: decode_mask(entry, self.manifest.seed, np.frombuffer(self.encoded[entry.name], np.uint8))
                for entry in self.manifest.masked
            }
            if masks_digest(list(masks.values())) != self.manifest.masks_sha256:
                raise ArtifactError("masks_sha256 does not match: a mask is damaged")
            self._check_coded()
            self._decoded.update({name: Bits(mask, self.planes.get(name, {})) for name, mask in masks.items()})
        return self._decoded

    def _check_coded(self) -> None:
        """Check the planes that may be as good as empty, and still say something of any number of weights."""
        for entry in self.manifest.masked:
            for kind in (kind for kind in entry.planes if kind in CODED):
                try:
                    check_coded(kind, self.planes[entry.name][kind], entry.kept or 0, entry.numel)
                except ValueError as error:
                    raise ArtifactError(f"'{entry.name}.{kind}' {error}") from error

    @property
    def bits(self) -> dict[str, Bits]:
        """What `decode` returns, where no network is at hand, whose bits a file of almost no bytes may ask for.

        Raises:
            ArtifactError: a mask is damaged; or they are not decoded yet, and would have more than `LIMIT` bits.
        """
        entries = [entry for entry in self.manifest.masked if expands(entry)]
        if not self._decoded and sum(entry.numel for entry in entries) > LIMIT:
            raise ArtifactError(
                f"the masks are for more than {LIMIT:,} weights, and no network is at hand to compare them with"
            )
        return self.decode()

    @property
    def masks(self) -> dict[str, Packed]:
        """The packed masks of `bits`, without planes."""
        return {name: bits.mask for name, bits in self.bits.items()}


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Context manager: put the file's name in front of an `ArtifactError`."""
    try:
        yield
    except ArtifactError as error:
        text = str(error)  # it may quote a stranger's file
        raise ArtifactError(f"{path}: {text[:1000]}{'…' if len(text) > 1000 else ''}") from error.__cause__


def read_front(path: "str | Path | HubFile") -> tuple[Container, Manifest]:
    """Read and check a file's header and manifest, also against each other. The tensors stay unread."""
    with open_file(path) as file:
        container = read_header(file)
    manifest = read_manifest(container.manifest)
    _check_masks(manifest, container)
    _check_places(manifest, container)
    return container, manifest


def read_contents(path: str | Path, container: Container, manifest: Manifest) -> Contents:
    """Read the tensors of a file whose header and manifest `read_front` has read, and check those that are no masks."""
    with open_file(path) as file:
        if stamp_of(file) != container.stamp:
            raise ArtifactError("the file changed while it was being read; try again")
        buffer = bytearray(max((tensor.stop for tensor in container.tensors.values()), default=0))
        file.seek(container.data_start)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise ArtifactError("the file changed while it was being read; try again")
    data = memoryview(buffer)
    parts: Parts = {name: (tensor, data[tensor.start : tensor.stop]) for name, tensor in container.tensors.items()}
    encoded = {entry.name: parts.pop(f"{entry.name}.mask")[1] for entry in manifest.masked}
    digest = tensors_digest({name: (t.dtype, t.shape, part) for name, (t, part) in parts.items()})
    planes = {
        entry.name: {kind: np.frombuffer(parts.pop(f"{entry.name}.{kind}")[1], np.uint8) for kind in entry.planes}
        for entry in manifest.masked
    }
    for name, (tensor, part) in parts.items():
        if tensor.dtype == "BOOL" and np.frombuffer(part, np.uint8).max(initial=0) > 1:
            raise ArtifactError(f"{name!r} is BOOL and has bytes other than 0 and 1")
    for entry in manifest.masked:
        if wrong := Bits(np.empty(0, np.uint8), planes[entry.name]).wrong(entry.name, entry.kept or 0):
            raise ArtifactError(wrong)
    if digest != manifest.tensors_sha256:
        raise ArtifactError("tensors_sha256 does not match: a stored tensor is damaged")
    return Contents(manifest, encoded, parts, planes)


def _check_masks(manifest: Manifest, container: Container) -> None:
    """Check that each masked tensor has a mask and its planes, and that their sizes are possible."""
    for entry in manifest.masked:
        mask = container.tensors.get(f"{entry.name}.mask")
        sizes = mask_sizes(entry)
        if mask is None:
            raise ArtifactError(f"{entry.name!r} has no mask; expected the tensor '{entry.name}.mask'")
        if mask.dtype != "U8" or len(mask.shape) != 1 or mask.shape[0] not in sizes:
            found = f"{mask.dtype} {list(mask.shape)}"
            low, high = sizes.start, sizes.stop - 1
            expected = f"U8 [{low}]" if low == high else f"U8 [{low} to {high}]"
            raise ArtifactError(f"'{entry.name}.mask' is {found}; expected {expected} for {list(entry.shape)}")
        for kind in entry.planes:
            name, size = f"{entry.name}.{kind}", -(-(entry.kept or 0) // 8)
            plane = container.tensors.get(name)
            if plane is None:
                raise ArtifactError(f"{entry.name!r} has no plane {kind!r}; expected the tensor {name!r}")
            coded = kind in CODED
            exact = kind in ("sign", "coat2")  # a later coat has a bit for each 1 of the one before
            sizes = coded_bound(kind, entry.kept or 0, entry.numel) if coded else range(size * exact, size + 1)
            if plane.dtype != "U8" or len(plane.shape) != 1 or plane.shape[0] not in sizes:
                found = f"{plane.dtype} {list(plane.shape)}"
                expected = f"{sizes.start} to {sizes.stop - 1}" if coded else f"{size}"
                raise ArtifactError(f"{name!r} is {found}; expected U8 [{expected}] for {entry.kept:,} kept weights")


def _check_places(manifest: Manifest, container: Container) -> None:
    """Check that no stored tensor is in the manifest's lists too, and that each alias names a tensor of the file."""
    described = {e.name for e in (*manifest.masked, *manifest.generated)} | {*manifest.constants, *manifest.aliases}
    if both := described & container.tensors.keys():
        raise ArtifactError(f"{min(both)!r} is among the stored tensors, and in the manifest's lists too")
    known = described | (container.tensors.keys() - {name for entry in manifest.masked for name in entry.tensors})
    for name, target in manifest.aliases.items():
        if target not in known:
            raise ArtifactError(f"aliases[{name!r}] is {target!r}, which the file does not hold")
