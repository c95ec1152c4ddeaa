"""One task of a bank: a file whose masks are for the bank's base, checked, and kept at a bit a weight."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.base_weights import checked_base
from ..artifact.compare import check_architecture, compare, entries_of
from ..artifact.container import DTYPES
from ..artifact.description import as_libraries_build, cast_like
from ..artifact.file import Artifact
from ..artifact.manifest import Manifest, TensorSpec
from ..artifact.planes import Bits, Packed
from ..artifact.reader import Contents, naming
from ..artifact.rebuild import effective_pieces, generated_pieces, stored_tensor
from ..errors import ArtifactError, ConversionError
from ..models.build import build_meta, build_uninitialised
from ..models.structure import difference
from ..weights.fill import fill
from ..weights.source import source_of
from .base import Base
from .heads import Heads, heads_for, put
from .parts import Filled, Held, Kept, Part, Signs, Whole


class Task:
    """A file in a bank. Coded masks stay as the file has them until the task is first used.

    Attributes:
        path: the file's, as given.
        manifest: what the file says.
        heads: the layers of its size.
    """

    def __init__(self, base: Base, path: str | Path, contents: Contents, heads: Heads) -> None:
        self.path = path
        self.manifest: Manifest = contents.manifest
        self.heads = heads
        self._base = base
        self._contents: Contents | None = contents  # until the parts are made of it
        self._parts: dict[str, Part] = {}
        if not contents.encoded or _is_packed(self.manifest):
            self.parts()

    def parts(self) -> dict[str, Part]:
        """Return what each tensor of the network is under this task.

        Raises:
            ArtifactError: a mask that is decoded only now is damaged.
        """
        if (contents := self._contents) is not None:
            with naming(self.path):
                self._parts = _parts(self._base, contents)
            self._contents = None
        return self._parts

    @property
    def nbytes(self) -> tuple[int, int]:
        """Memory of the masks, and of the task's own tensors, in bytes."""
        if self._contents is not None:
            encoded, stored = self._contents.encoded.values(), self._contents.stored.values()
            planes = sum(plane.nbytes for each in self._contents.planes.values() for plane in each.values())
            return planes + sum(part.nbytes for part in encoded), sum(part.nbytes for _, part in stored)
        shared = set(map(id, self._base.parts.values()))
        own = [part for part in self._parts.values() if id(part) not in shared]
        masks = sum(part.nbytes for part in own if isinstance(part, Kept))
        drawn = sum(part.source.nbytes for part in own if isinstance(part, Kept) and _is_own(part, self._base))
        return masks, drawn + sum(part.nbytes for part in own if not isinstance(part, Kept))


def _is_own(part: Kept, base: Base) -> bool:
    return all(part.source is not source for source in base.sources.values())


def read_task(base: Base, source: str | Path | Artifact, others: Iterable[Task]) -> Task:
    """Read a file, and check that its masks are for `base` and its network is the base's, apart from heads.

    Args:
        others: tasks of the bank. Heads of the same size are shared with them.

    Raises:
        ArtifactError: the file is damaged, or does not fit; the message names what differs.
    """
    artifact = Artifact.open(source)
    manifest = artifact.manifest
    with naming(artifact.path):
        _check_planes(manifest)
        _check_base(base, manifest)
        contents = artifact.contents
        heads = heads_for(base, entries_of(contents))
        heads = next((task.heads for task in others if task.heads.sizes == heads.sizes), heads)
        if manifest.architecture.library != "custom":
            _check_network(base, contents, heads)
        _check_entries(base, contents, heads)
        if not any(_shared(base, entry) for entry in manifest.masked):
            raise ArtifactError(f"none of its masks is for a weight that the bank's base has from {base.what}")
        if base.seed is None:
            checked_base(manifest, _values(base), base.digests)
        return Task(base, artifact.path, contents, heads)


def _check_planes(manifest: Manifest) -> None:
    """Check that a weight under each mask is the base's, or the base's with another sign."""
    for entry in manifest.masked:
        if other := [kind for kind in entry.planes if kind != "sign"]:
            raise ArtifactError(
                f"{entry.name!r} has the plane {other[0]!r}, so its weights are not those of the base; a bank takes "
                "masks, and the plane 'sign'"
            )


def _check_entries(base: Base, contents: Contents, heads: Heads) -> None:
    """Check that the file's tensors have the names, shapes and dtypes of the bank's network with these heads."""
    architecture, shapes = contents.manifest.architecture, dict(heads.sizes)
    mine = {
        name: torch.empty(shapes[name], dtype=tensor.dtype, device="meta") if name in shapes else tensor
        for name, tensor in base.entries().items()
    }
    try:
        compare(contents, mine | {name: mine[target] for name, target in base.aliases.items()})
    except ArtifactError as error:
        raise ArtifactError(
            f"it is for {architecture.library}/{architecture.name}, which is not the bank's network: {error}"
        ) from None


def _values(base: Base) -> dict[str, Tensor]:
    """Return the pretrained weights by name, in their shapes."""
    return {
        name: source.values.view(base.shapes[name][0])
        for name, source in base.sources.items()
        if isinstance(source, Held)
    }


def _check_base(base: Base, manifest: Manifest) -> None:
    """Check what the manifest says about the weights under the masks."""
    if base.seed is None:
        if manifest.base is None:
            raise ArtifactError(
                f"its weights are drawn from seed {manifest.seed}, and the bank's base has the weights of {base.what}"
            )
        return
    if manifest.base is not None:
        of = f"{manifest.base.library}/{manifest.base.name} {manifest.base.tag}".rstrip()
        raise ArtifactError(f"its masks are for the weights of {of}, and the bank's are drawn from {base.what}")
    if manifest.seed != base.seed:
        raise ArtifactError(f"its weights are drawn from seed {manifest.seed}, the bank's from {base.what}")
    for entry in manifest.masked:
        spec = base.drawn.get(entry.name)
        if spec is not None and spec.shape == entry.shape:
            for what in "stream", "dtype", "distribution", "std":
                if getattr(entry, what) != getattr(spec, what):
                    raise ArtifactError(
                        f"the {what} of {entry.name!r} is {_shown(entry, what)}, the bank's is {_shown(spec, what)}"
                    )


def _shown(entry: TensorSpec, what: str) -> str:
    """Return a value of an entry; for a standard deviation also what made it so."""
    value = getattr(entry, what)
    if what != "std":
        return str(value)
    note = entry.note
    scaled = "scaled" if note.get("scaled") else "not scaled"
    return f"{value:.6g} ({note.get('scheme')}, k = {note.get('k', 0):g}, {scaled})"


def _shared(base: Base, entry: TensorSpec) -> bool:
    """Return whether a masked weight has its values from the base, not from a draw of the task's own."""
    if base.seed is None:
        return source_of(entry.distribution).in_base
    spec = base.drawn.get(entry.name)
    return spec is not None and spec.shape == entry.shape


def _check_network(base: Base, contents: Contents, heads: Heads) -> None:
    """Check that the library's network that the file names computes what the bank's does.

    Raises:
        ArtifactError: it does not; or no library builds it.
    """
    manifest = contents.manifest
    architecture = manifest.architecture
    known = f"{architecture.library}/{architecture.name} {sorted(architecture.kwargs.items())} {heads.sizes}"
    if known in base.agreed:
        return
    check_architecture(architecture, manifest.provenance.get("custom"))
    entries = entries_of(contents)
    try:
        with as_libraries_build():
            bare = build_meta(architecture)
            cast_like(bare, entries)
            compare(contents, bare.state_dict(keep_vars=True))
            if {name: tuple(t.shape) for name, t in bare.state_dict().items()} != _sizes(base, heads):
                return  # names and shapes are refused by the comparison with the bank's own
            network = build_uninitialised(architecture)[0]
    except ConversionError as error:
        raise ArtifactError(f"the architecture cannot be built: {error}") from error
    cast_like(network, entries)
    differs = None
    for layer, mine in heads.layers.items():
        differs = differs or difference(mine, network.get_submodule(layer))
        put(network, layer, base.core.get_submodule(layer))
    if differs := differs or difference(base.core, network):
        raise ArtifactError(
            f"it is for {architecture.library}/{architecture.name}, which is not the bank's network: in the bank's, "
            f"{differs}"
        )
    base.agreed.add(known)


def _sizes(base: Base, heads: Heads) -> dict[str, tuple[int, ...]]:
    sizes = {name: tuple(tensor.shape) for name, tensor in base.entries().items()} | dict(heads.sizes)
    return sizes | {name: sizes[target] for name, target in base.aliases.items()}


def _parts(base: Base, contents: Contents) -> dict[str, Part]:
    """Return what each tensor of the network is under a file's masks. The file's packed masks are not copied."""
    manifest, bits = contents.manifest, contents.decode()
    parts: dict[str, Part] = {}
    packed = _is_packed(manifest)
    for entry in manifest.masked:
        given = bits[entry.name]
        parts[entry.name] = (
            Kept(base.sources[entry.name], given.mask, _negative(entry, given))
            if _shared(base, entry)
            else _own(entry, manifest, given)
        )
    for entry in manifest.generated:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        parts[entry.name] = Whole(fill(tensor, generated_pieces(entry, manifest.seed)))
    for name, constant in manifest.constants.items():
        parts[name] = Filled(constant.value, DTYPES[constant.dtype])
    for name, (stored, data) in contents.stored.items():
        tensor = stored_tensor(stored, data)
        parts[name] = Whole(tensor if packed else tensor.clone())  # otherwise the coded masks would stay in memory
    return parts


def _is_packed(manifest: Manifest) -> bool:
    return all(entry.encoding == "bitpack" for entry in manifest.masked)


def _negative(entry: TensorSpec, bits: Bits) -> Packed | None:
    """Return which weights are negative, packed, if their signs were learnt."""
    return bits.mask & ~bits.spread("sign", entry.numel) if "sign" in bits.planes else None


def _own(entry: TensorSpec, manifest: Manifest, bits: Bits) -> Part:
    """Return a masked weight that the base does not have, such as a new head, which the file's seed gives."""
    dtype = DTYPES[entry.dtype]
    if entry.distribution == "signed_constant":
        signs = Signs(entry.numel, entry.std, manifest.seed, entry.stream, dtype)
        return Kept(signs, bits.mask, _negative(entry, bits))
    return Whole(fill(torch.empty(entry.shape, dtype=dtype), effective_pieces(entry, manifest.seed, bits)))
