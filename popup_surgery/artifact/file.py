"""A popup artifact on disk or in memory, which is read only once, however often it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..atomic import write_atomically
from ..codecs import get_codec
from ..codecs.bitpack import ones, unpack_mask
from ..codecs.pattern_coded import obeys
from ..errors import ArtifactError, ConversionError
from ..masking.bake import masks as network_masks
from .assemble import assemble
from .container import Container, Header, local, located, open_file, read_safetensors
from .manifest import Manifest, TensorSpec
from .mask_bytes import obeys_fixed
from .planes import Packed
from .reader import Contents, Parts, naming, read_contents, read_front
from .rebuild import masks_digest, stored_tensor
from .restore import check_packable, fill_network

if TYPE_CHECKING:
    from ..hub.files import HubFile


@dataclass(frozen=True)
class Sizes:
    """Where the bytes of a file go.

    Attributes:
        masks: of the masks, in their encodings.
        planes: of the planes beside them, such as learnt signs.
        stored: of the tensors that no seed gives, such as trained norms and statistics.
        header: of the manifest, and of safetensors' own header around it.
    """

    masks: int
    planes: int
    stored: int
    header: int

    @property
    def total(self) -> int:
        """The file's size."""
        return self.masks + self.planes + self.stored + self.header


@dataclass(frozen=True, eq=False)
class Artifact:
    """A popup artifact on disk, from `Artifact.open(path)`, or in memory, from `Artifact.of(…)`.

    Opening reads and checks the header and the manifest. The tensors are read, checked and digested when they are
    first needed. Both happen only once. A file that changes in between is refused.

    Attributes:
        path: the file's path, as given; of an artifact in memory, what messages call it.
        manifest: what the file says about its network, including provenance, probe and base.
        container: the file's header; None for an artifact in memory.
        remote: the file on the Hub, at one commit, if `path` is an address there. Its tensors are downloaded into
            huggingface_hub's cache when they are first needed.
    """

    path: str | Path
    manifest: Manifest = field(repr=False)
    container: Container | None = field(repr=False)
    remote: "HubFile | None" = field(default=None, repr=False)

    @classmethod
    def open(cls, source: "str | Path | HubFile | Artifact") -> "Artifact":
        """Open a file, which is treated as hostile. An `Artifact` that is already open is returned unchanged.

        Args:
            source: a file, or an address on the Hub: `hf://user/repo`, `hf://user/repo/name.popup.safetensors` or
                `hf://user/repo@revision/…`. Of a file there, only the header is fetched.

        Raises:
            ArtifactError: the file is missing, or its header or manifest does not follow the format.
            HubError: the address names no file, or the Hub does not give it.
        """
        if isinstance(source, Artifact):
            return source
        file = located(source)
        with naming(source):
            container, manifest = read_front(file)
        if isinstance(file, str | Path):
            return cls(file, manifest, container)
        return cls(file.shown, manifest, container, file)

    @classmethod
    def of(
        cls, manifest: Manifest, masks: Mapping[str, Packed], stored: Parts, path: str | Path = "the artifact in memory"
    ) -> "Artifact":
        """Make an artifact in memory, of other masks for the weights that a manifest lists.

        Args:
            manifest: its numbers of kept weights and its `masks_sha256` are replaced by those of `masks`; everything
                else, such as `weights_sha256` and the probe, must be right already. It has no planes, which are for
                the weights that its own masks keep. A pattern that a mask does not obey is dropped, and `range_coded`
                takes the place of an encoding that needs it. So are fixed weights that it does not obey.
            masks: the packed mask of each masked weight, by name.
            stored: the tensors that no seed gives, as in another artifact's `contents.stored`.
            path: what messages call it.
        """
        if entry := next((entry for entry in manifest.masked if entry.planes), None):
            raise ArtifactError(f"{entry.name!r} has the plane {entry.planes[0]!r}, which is for another mask")
        decoded = {entry.name: masks[entry.name] for entry in manifest.masked}
        entries = tuple(_with_mask(entry, manifest.seed, decoded[entry.name]) for entry in manifest.masked)
        manifest = replace(manifest, masked=entries, masks_sha256=masks_digest(list(decoded.values())))
        artifact = cls(path, manifest, None)
        artifact.__dict__["contents"] = Contents.of(manifest, decoded, stored)
        return artifact

    @property
    def mask_bits(self) -> int | None:
        """How many bits all masks take in the file; None for an artifact in memory."""
        return None if (sizes := self.sizes) is None else 8 * sizes.masks

    @property
    def sizes(self) -> Sizes | None:
        """Where the bytes of the file go; None for an artifact in memory."""
        if self.container is None:
            return None
        sizes = {name: tensor.stop - tensor.start for name, tensor in self.container.tensors.items()}
        parts = [[sizes.pop(name) for name in entry.tensors] for entry in self.manifest.masked]
        masks, planes = sum(mask for mask, *_ in parts), sum(sum(rest) for _, *rest in parts)
        return Sizes(masks, planes, sum(sizes.values()), self.container.data_start)

    @cached_property
    def contents(self) -> Contents:
        """The tensors, still packed. Errors raised here do not name the file; use this inside `naming`."""
        assert self.container is not None, "an artifact in memory has its contents from the beginning"
        if self.remote is None:
            return read_contents(self.path, self.container, self.manifest)
        path = self.local()
        container, manifest = read_front(path)
        if replace(container, stamp=self.container.stamp) != self.container:
            raise ArtifactError("the file changed between its header and its data; try again")
        return read_contents(path, container, manifest)

    def local(self) -> Path:
        """Return the file on this machine, which is in huggingface_hub's cache if `path` is an address on the Hub.

        Raises:
            HubError: it cannot be downloaded.
        """
        return Path(self.path) if self.remote is None else self.remote.download()

    def write(self, path: str | Path, encoding: str | None = None) -> Manifest:
        """Write the same network to a file, perhaps with its masks in another encoding; return the manifest written.

        Args:
            path: the file to write. An existing file is replaced atomically.
            encoding: the codec of the masks, and if it is one at the entropy limit of the planes. Default: as they are.

        Raises:
            ArtifactError: this artifact's file is damaged.
            UnknownName: there is no such codec.
            PopupError: the file cannot be written. An existing file is unchanged.
        """
        with naming(self.path):
            contents = self.contents
            stored = {name: stored_tensor(*part) for name, part in contents.stored.items()}
            manifest, data = assemble(self.manifest, contents.bits, stored, encoding)
        write_atomically(path, data)
        return manifest

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each masked weight, by `state_dict` key: bool, of the weight's shape.

        Raises:
            ArtifactError: the file is damaged.
        """
        with naming(self.path):
            packed = self.contents.masks
        shapes = {entry.name: entry.shape for entry in self.manifest.masked}
        return {name: torch.from_numpy(unpack_mask(bits, shapes[name])) for name, bits in packed.items()}

    def network(
        self,
        model: nn.Module | None = None,
        base: nn.Module | str | Path | None = None,
        *,
        masked: bool = True,
        packed: bool = False,
    ) -> nn.Module:
        """Return the plain network, as `load` does. With `masked=False`, weights outside the mask keep their values.

        Raises:
            ArtifactError: as for `load`.
        """
        with naming(self.path):
            if packed:
                check_packable(self.manifest)
            return fill_network(self.contents, model, base, masked, packed)


def _with_mask(entry: TensorSpec, seed: int, mask: Packed) -> TensorSpec:
    """Return the entry of a weight under another mask."""
    entry = replace(entry, kept=ones(mask), fixed=entry.fixed if obeys_fixed(entry, seed, mask) else None)
    if entry.pattern is None or obeys(mask, entry.shape, entry.pattern):
        return entry
    encoding = "range_coded" if get_codec(entry.encoding).needs_pattern else entry.encoding
    return replace(entry, pattern=None, encoding=encoding)


def repack(path: str | Path | Artifact, output: str | Path, *, encoding: str) -> Manifest:
    """Write a popup artifact again, with its masks in another encoding. No bit of the network changes.

    In the manifest, only `encoding`, `requires` and `manifest_sha256` differ. With planes, which are coded too where
    that saves bytes, so do `plane_ones` and `tensors_sha256`. Without a network to compare with, a file whose coded
    masks and planes have at most 2³³ bits is read.

    Args:
        path: the file, or an open `Artifact`.
        output: the file to write; it may be `path`. An existing file is replaced atomically.
        encoding: `bitpack`, one bit a weight; `range_coded`, as few bits as the masks' shares of ones allow; or
            `pattern_coded`, as few as a pattern such as 2:4 allows.

    Returns:
        The manifest of the new file.

    Raises:
        ArtifactError: the file is damaged, or has no pattern, which the encoding needs.
        UnknownName: there is no such encoding.
        PopupError: the file cannot be written. An existing file is unchanged.
    """
    return Artifact.open(path).write(output, encoding)


def inspect(path: str | Path) -> Manifest:
    """Read the manifest of a popup artifact, but not its tensors. `path` may be an address such as `hf://user/repo`.

    Raises:
        ArtifactError: the file is missing, or its header or manifest does not follow the format.
        HubError: the file is on the Hub, and cannot be read.
    """
    return Artifact.open(path).manifest


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    base: nn.Module | str | Path | None = None,
    packed: bool = False,
) -> nn.Module:
    """Rebuild the plain network that a popup artifact describes, in eval mode, its `state_dict` exact to the bit.

    Args:
        path: the file, or its address on the Hub, such as `hf://user/repo`. It is treated as hostile: nothing in it
            is unpickled or run. Memory use is at most twice the file's size, plus the network, plus one bit a masked
            weight, plus the bits of coded planes, plus 256 MiB.
        model: a network to fill that is not converted. Needed only if the file's architecture is `custom`, which no
            library builds. It is changed only after all checks have passed.
        base: for a mask on pretrained weights: the network that has these weights, or a file of them. Default: the
            weights of `model`, or without `model` the library's weights that the file names. Other weights are refused.
        packed: hold each masked weight as two bits, and make its values when its layer runs. Under `torch.no_grad` or
            `torch.inference_mode` the outputs are to the bit those of the plain network; the masked weights take a
            sixteenth of the memory of float32. For masks on weights of one magnitude in each layer alone: constants,
            and what `biprop` learns. The network is for inference: its masked weights have no gradient, and cannot be
            assigned or loaded. Its `state_dict` makes the plain weights, in full.

    Returns:
        A network of ordinary layers, with float tensors in the file's dtypes; `model` itself if given.

    Raises:
        ArtifactError: the file is damaged, or does not fit `model` or `base`. The message names the file, the tensor,
            and what was expected.
        HubError: the file is on the Hub, and cannot be found or downloaded.
    """
    return Artifact.open(path).network(model, base, packed=packed)


def masks(source: nn.Module | str | Path | Artifact) -> dict[str, Tensor]:
    """Return the mask of each masked weight, by the weight's `state_dict` key: bool, of the weight's shape.

    Args:
        source: a converted network, whose masks are copied; a popup artifact, as a file or open; or the file of masks
            that a run writes beside dense weights. If the learner samples, the masks of a network are those that a
            file would store; inside `sampled` they are those of that sample.

    Raises:
        ConversionError: the network has no masked weight.
        ArtifactError: the file is damaged, or has no masks; the message says what it is.
    """
    if isinstance(source, nn.Module):
        if found := network_masks(source):
            return found
        raise ConversionError(
            f"the {type(source).__name__} has no masked weight, as plain networks, and those of load and bake; "
            "expected the network that convert returned, or the file"
        )
    if isinstance(source, Artifact):
        return source.masks()
    path = located(source)
    with naming(source):
        with open_file(path) as file:
            header = read_safetensors(file)
        if header.metadata is None and {tensor.dtype for tensor in header.tensors.values()} == {"BOOL"}:
            with open_file(local(path)) as file:
                return _bool_tensors(file, read_safetensors(file))
    return Artifact.open(path).masks()


def _bool_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Return the tensors of a file that has only those of bool. The header was just read from it."""
    if {tensor.dtype for tensor in header.tensors.values()} != {"BOOL"}:
        raise ArtifactError("the file changed while it was being read; try again")
    values = np.frombuffer(file.read(), np.uint8)
    if values.max(initial=0) > 1:
        raise ArtifactError("a mask has bytes other than 0 and 1")
    return {
        name: torch.from_numpy(values[tensor.start : tensor.stop].astype(bool)).view(tensor.shape)
        for name, tensor in header.tensors.items()
    }


def stored_masks(path: str | Path) -> dict[str, Tensor]:
    """Read the mask of each masked weight in a popup artifact, by `state_dict` key: bool, of the weight's shape.

    Raises:
        ArtifactError: the file is damaged.
    """
    return Artifact.open(path).masks()
