"""Reading a file that somebody else made: everything is checked before anything of its sizes is made (section 3)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..codecs.bitpack import ones, padding_is_zero
from ..errors import ArtifactError, ConversionError, PopupError
from ..masking.planning import masked_weights, unwrap
from ..models.build import (
    KWARGS,
    LIBRARIES,
    Architecture,
    Base,
    build_bare,
    build_blank,
    build_described,
    check_kwargs,
    check_tag,
    names,
    read_weights,
)
from ..weights import BASE
from ..weights.fill import fill
from .container import DTYPE_NAMES, DTYPES, Container, Stored, open_file, read_header
from .manifest import Manifest, read_manifest
from .probe import check_probe
from .rebuild import (
    Packed,
    effective_pieces,
    generated_pieces,
    masks_digest,
    tensors_digest,
    values_digest,
    weights_digest,
)
from .verification import Verification


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


def verify(
    path: str | Path, model: nn.Module | None = None, *, base: nn.Module | str | Path | None = None
) -> Verification:
    """Rebuild everything that a file describes and compare it with the file's digests and its probe.

    Args:
        path: the file.
        model: as for `load`; without it a `custom` network's weights are verified, and its architecture is not.
        base: as for `load`.

    Returns:
        Each check with its outcome; true where all hold.

    Raises:
        ArtifactError: the file is damaged, or is no popup artifact.
    """
    with naming(path):
        artifact = read(path)
        manifest = artifact.manifest
        checks = [("manifest, masks, stored tensors", True, "match their digests")]
        entries = [(entry, artifact.masks[entry.name]) for entry in manifest.masked]
        word = f"{manifest.weights:,} of {len(manifest.masked)} layers, rebuilt from "
        if manifest.base is None:
            same = weights_digest(entries, manifest.seed, {}) == manifest.weights_sha256
            checks.append(_weights_check(same, f"{word}seed {manifest.seed}"))
        library, name = manifest.architecture.library, manifest.architecture.name
        if model is None and library == "custom":
            if manifest.base is not None and base is None:
                checks.append(("masked weights", True, "of a pretrained base: not checked, no base was given"))
            elif manifest.base is not None:
                weights = _base_weights(manifest, None, base)
                same = weights_digest(entries, manifest.seed, weights) == manifest.weights_sha256
                checks.append(_weights_check(same, f"{word}the base"))
            checks.append(("architecture", True, f"custom ({name}): not checked, no module was given"))
            return Verification(tuple(checks))
        if model is None and base is None and manifest.base is not None and not manifest.base.tag:
            checks.append(("masked weights", True, "of a pretrained base: not checked, no base was given"))
            return Verification(tuple(checks))
        try:
            network = fill_network(artifact, model, base)
        except ArtifactError as error:
            return Verification((*checks, ("architecture", False, str(error))))
        if manifest.base is not None:
            tensors = unwrap(network).state_dict()
            same = values_digest(tensors[entry.name] for entry in manifest.masked) == manifest.weights_sha256
            checks.append(_weights_check(same, f"{word}the base {manifest.base.name} {manifest.base.tag}".rstrip()))
        checks.append(("architecture", True, f"{library}/{name} takes every tensor"))
        if (probe := manifest.probe) is not None:
            checks.append(("probe", *check_probe(network, manifest.seed, probe)))
        return Verification(tuple(checks))


def _weights_check(same: bool, word: str) -> tuple[str, bool, str]:
    return "masked weights", same, word if same else f"{word}, do not match weights_sha256"


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


def fill_network(artifact: Artifact, model: nn.Module | None, base: nn.Module | str | Path | None) -> nn.Module:
    """The network that `artifact` describes, in `model` if it is given."""
    manifest = artifact.manifest
    if base is not None and manifest.base is None:
        raise ArtifactError("a base was given, and the file's weights are those of its seed")
    if model is None:
        _check_architecture(manifest.architecture)
        tag = _library_tag(manifest) if manifest.base is not None and base is None else None
        dtype = _common_dtype(artifact)
        try:
            bare = build_bare(manifest.architecture)
            _compare(artifact, bare.to(dtype) if dtype else bare)
            network = build_described(manifest.architecture, tag) if tag else build_blank(manifest.architecture)[0]
        except ConversionError as error:
            raise ArtifactError(f"the architecture cannot be built: {error}") from error
        core = network.to(dtype) if dtype else network
    elif not isinstance(model, nn.Module):
        raise ArtifactError(f"model is {model!r}; expected a plain torch.nn.Module to fill")
    else:
        network, core = model, unwrap(model)
        if any(True for _ in masked_weights(core)):
            raise ArtifactError("the model to fill is converted; expected a plain network")
    _compare(artifact, core)
    _fill(artifact, core, _base_weights(manifest, core, base))
    return network.eval()


def _library_tag(manifest: Manifest) -> str:
    """The tag of the library's weights that the masks are for."""
    architecture, base = manifest.architecture, cast(Base, manifest.base)
    if not base.tag or (base.library, base.name) != (architecture.library, architecture.name):
        raise ArtifactError(
            f"the masks are for weights of {base.library[:60]}/{base.name[:60]} that no library has; pass the network "
            "or the file that holds them as `base` (--base)"
        )
    try:
        return check_tag(architecture, base.tag)
    except PopupError as error:
        raise ArtifactError(f"base.tag: {error}") from error


def _base_weights(manifest: Manifest, core: nn.Module | None, base: nn.Module | str | Path | None) -> dict[str, Tensor]:
    """The weights under the masks that are not the seed's, by name, after their digest was checked."""
    if manifest.base is None:
        return {}
    if isinstance(base, str | Path):
        try:
            source = read_weights(Path(base))
        except ConversionError as error:
            raise ArtifactError(f"base: {error}") from error
    else:
        holder = core if base is None else base
        if not isinstance(holder, nn.Module):
            raise ArtifactError(f"base is a {type(holder).__name__}; expected a network, or a file of weights")
        source = unwrap(holder).state_dict(keep_vars=True)
    found = {}
    for entry in manifest.masked:
        if entry.distribution == BASE:
            tensor = source.get(entry.name)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape or tensor.is_meta:
                has = f"{tuple(tensor.shape)}" if isinstance(tensor, Tensor) else "nothing"
                raise ArtifactError(f"the base has {has} for {entry.name!r}; expected {entry.shape}")
            found[entry.name] = tensor.detach().to(DTYPES[entry.dtype])
    if (digest := values_digest(found.values())) != manifest.base.sha256:
        of = f"{manifest.base.library}/{manifest.base.name} {manifest.base.tag}".rstrip()
        raise ArtifactError(
            f"the masks are for other weights: those of {of} with the SHA-256 {manifest.base.sha256[:12]}…, and the "
            f"base at hand has {digest[:12]}…"
        )
    return found


def _check_architecture(architecture: Architecture) -> None:
    library, name = architecture.library, architecture.name
    if library == "custom":
        raise ArtifactError(
            f"the architecture is custom ({name}), which no library builds; pass the network to fill to "
            "popup_surgery.load as `model`"
        )
    if library not in LIBRARIES:
        raise ArtifactError(f"architecture.library is {library!r}; expected one of {', '.join(LIBRARIES)}, custom")
    if not re.fullmatch("[a-z0-9_]+", name) or name not in names(library):
        raise ArtifactError(f"architecture.name is {name[:60]!r}, which {library} does not have")
    if unknown := architecture.kwargs.keys() - KWARGS.keys():
        raise ArtifactError(f"architecture.kwargs has {min(unknown)!r}; expected some of {', '.join(KWARGS)}")
    try:
        check_kwargs(architecture.kwargs)
    except PopupError as error:
        raise ArtifactError(f"architecture.kwargs: {error}") from error


def _common_dtype(artifact: Artifact) -> torch.dtype | None:
    """The floating dtype that the network was cast to, where the masked weights have one in common, not float32."""
    dtypes = {entry.dtype for entry in artifact.manifest.masked}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 and dtypes != {"F32"} else None


def _compare(artifact: Artifact, core: nn.Module) -> None:
    """Check that the file has each `state_dict` entry of the network, in its shape and dtype, and no other."""
    manifest = artifact.manifest
    file: dict[str, tuple[str, tuple[int, ...]]] = {
        entry.name: (entry.dtype, entry.shape) for entry in (*manifest.masked, *manifest.generated)
    }
    file |= {name: (constant.dtype, constant.shape) for name, constant in manifest.constants.items()}
    file |= {name: (tensor.dtype, tensor.shape) for name, (tensor, _) in artifact.stored.items()}
    file |= {name: file[target] for name, target in manifest.aliases.items()}
    entries = core.state_dict(keep_vars=True)
    if missing := [name for name in entries if name not in file]:
        raise ArtifactError(f"the network has {missing[0]!r} (and {len(missing) - 1} more) that the file does not hold")
    if extra := [name for name in file if name not in entries]:
        raise ArtifactError(f"the file holds {extra[0]!r} (and {len(extra) - 1} more) that the network does not have")
    first: dict[int, str] = {}
    place = {name: i for i, name in enumerate(entries)}
    for name, tensor in entries.items():
        dtype, shape = file[name]
        if place[name] < place[manifest.aliases.get(name, name)]:
            raise ArtifactError(f"aliases[{name!r}] is {manifest.aliases[name]!r}; expected an earlier key")
        if shape != tuple(tensor.shape):
            raise ArtifactError(f"{name!r}: the file's tensor is for {shape}, the network has {tuple(tensor.shape)}")
        if dtype != DTYPE_NAMES.get(tensor.dtype):
            raise ArtifactError(f"{name!r}: the file's tensor is {dtype}, the network's {tensor.dtype}")
        tied = first.setdefault(id(tensor), name)
        if manifest.aliases.get(name, name) != manifest.aliases.get(tied, tied):
            raise ArtifactError(f"{name!r}: the network ties it to {tied!r}, the file does not")


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
