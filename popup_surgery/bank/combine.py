"""Combine the masks of several files: `combine`."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..artifact import Artifact
from ..artifact.base_weights import base_weights, library_tag
from ..artifact.manifest import Manifest, TensorSpec
from ..artifact.planes import Bits
from ..artifact.reader import naming
from ..artifact.rebuild import weights_digest
from ..codecs.bitpack import ones
from ..errors import ArtifactError, ConversionError, listed, unknown
from ..models.build import build_architecture
from ..weights.source import source_of
from ..weights.streams import CHUNK
from .parts import Packed

log = logging.getLogger("popup_surgery")

HOW = ("union", "intersection", "majority")


def combine(
    sources: Sequence[str | Path | Artifact], how: str, *, base: nn.Module | str | Path | None = None
) -> Artifact:
    """Combine the masks of several files on the same weights into one artifact, layer by layer.

    Every weight keeps the value that it has in the files. So the files must have been drawn with one standard
    deviation: of scaled weights, with one k. Everything that is not a mask, such as norms, statistics and a head, is
    that of the first file. Statistics were measured under its mask, so measure them again before you compare accuracies
    of a network with batch norms.

    Args:
        sources: two files or more, or open artifacts, of one network, with the same layers masked.
        how: `union` keeps a weight that any of the files keeps; `intersection` one that all keep; `majority` one that
            more than half keep. With an even number of files a tie is no majority.
        base: for masks on pretrained weights, as for `load`. The combined file's digest is over these weights.

    Returns:
        An artifact in memory: `write(path)` makes it a file, `network()` the network. Its provenance says what it was
        made of, and has no accuracy.

    Raises:
        ArtifactError: a file is damaged, or its weights are not those of the first, or their signs were learnt; the
            message names what differs.
        ConversionError: there are fewer than two files.
        UnknownName: there is no such `how`.
    """
    if how not in HOW:
        raise unknown("how", how, HOW)
    if isinstance(sources, str | Path | Artifact) or len(sources) < 2:
        raise ConversionError("combine takes a list of two files or more")
    files = [Artifact.open(source) for source in sources]
    first, manifest = files[0], files[0].manifest
    for file in files:
        if entry := next((entry for entry in file.manifest.masked if entry.planes), None):
            with naming(file.path):
                raise ArtifactError(
                    f"{entry.name!r} has the plane {entry.planes[0]!r}, so its weights are not those of the seed or "
                    "base alone; combine takes masks without planes"
                )
    for other in files[1:]:
        with naming(other.path):
            _check_same(first, other.manifest)
    masks: list[dict[str, Packed]] = []
    for file in files:
        with naming(file.path):
            masks.append(file.contents.masks)
    combined = {entry.name: _combine([each[entry.name] for each in masks], how) for entry in manifest.masked}
    entries = [_entry(entry, combined[entry.name]) for entry in manifest.masked]
    if empty := [entry.name for entry in entries if not entry.kept]:
        log.warning("the %s keeps no weight of %s", how, listed(empty))
    _tell_others(files)
    with naming(first.path):
        weights = _base(manifest, base)
        stored = first.contents.stored
    digest = weights_digest([(entry, Bits(combined[entry.name])) for entry in entries], manifest.seed, weights)
    made = replace(
        manifest, masked=tuple(entries), weights_sha256=digest, provenance=_provenance(files, how), probe=None
    )
    return Artifact.of(made, combined, stored, f"the {how} of {', '.join(str(file.path) for file in files)}")


def _check_same(first: Artifact, other: Manifest) -> None:
    """Check that a file's masks are for the weights of the first's."""
    mine = first.manifest
    for what in "library", "name":
        if getattr(mine.architecture, what) != getattr(other.architecture, what):
            names = [f"{each.architecture.library}/{each.architecture.name}" for each in (other, mine)]
            raise ArtifactError(f"its network is {names[0]}; that of {first.path} is {names[1]}")
    if (mine.base is None) != (other.base is None) or (mine.base is None and mine.seed != other.seed):
        raise ArtifactError(f"its weights are {_origin(other)}; those of {first.path} are {_origin(mine)}")
    if mine.base is not None and other.base is not None and mine.base.sha256 != other.base.sha256:
        raise ArtifactError(
            f"its masks are for pretrained weights with the SHA-256 {other.base.sha256[:12]}…; those of {first.path} "
            f"have {mine.base.sha256[:12]}…"
        )
    theirs = {entry.name: entry for entry in other.masked}
    names_differ = {entry.name for entry in mine.masked} ^ theirs.keys()
    if names_differ:
        name = min(names_differ)
        raise ArtifactError(
            f"{name!r} is {'masked' if name in theirs else 'not masked'}; in {first.path} it is "
            f"{'not masked' if name in theirs else 'masked'}"
        )
    for entry in mine.masked:
        for what in "shape", "stream", "dtype", "distribution", "std":
            one, two = getattr(theirs[entry.name], what), getattr(entry, what)
            if one != two:
                why = ", because the files have other k and scaled weights" if what == "std" and _scaled(entry) else ""
                raise ArtifactError(f"the {what} of {entry.name!r} is {one}; in {first.path} it is {two}{why}")
        if mine.seed != other.seed and source_of(entry.distribution).drawn:
            raise ArtifactError(
                f"{entry.name!r} is drawn from seed {other.seed}; in {first.path} from seed {mine.seed}"
            )


def _scaled(entry: TensorSpec) -> bool:
    return entry.note.get("scaled") is True


def _origin(manifest: Manifest) -> str:
    if manifest.base is None:
        return f"drawn from seed {manifest.seed}"
    return f"those of {manifest.base.library}/{manifest.base.name} {manifest.base.tag}".rstrip()


def _combine(masks: Sequence[Packed], how: str) -> Packed:
    """Combine packed masks of one weight."""
    if how == "union":
        return np.bitwise_or.reduce(masks)
    if how == "intersection":
        return np.bitwise_and.reduce(masks)
    return np.concatenate([*_majorities(masks)])


def _majorities(masks: Sequence[Packed]) -> Iterator[Packed]:
    for start in range(0, len(masks[0]), CHUNK // 8):
        counts = np.zeros(min(CHUNK // 8, len(masks[0]) - start) * 8, np.uint16)
        for mask in masks:
            counts += np.unpackbits(mask[start : start + CHUNK // 8], bitorder="little")
        yield np.packbits(2 * counts > len(masks), bitorder="little")


def _entry(entry: TensorSpec, mask: Packed) -> TensorSpec:
    """Return the entry of a combined mask. What informs of k is the share that is kept."""
    kept = ones(mask)
    return replace(entry, kept=kept, note=entry.note | {"k": kept / entry.numel})


def _tell_others(files: Sequence[Artifact]) -> None:
    """Warn if the files differ in more than masks, of which the first file's is taken."""
    first = files[0].manifest
    rest = [
        str(file.path)
        for file in files[1:]
        if (file.manifest.tensors_sha256, file.manifest.generated, file.manifest.constants)
        != (first.tensors_sha256, first.generated, first.constants)
    ]
    if rest:
        log.warning(
            "norms, statistics and other tensors without a mask are those of %s; those of %s differ",
            files[0].path,
            listed(rest),
        )


def _base(manifest: Manifest, base: nn.Module | str | Path | None) -> dict[str, Tensor]:
    """Return the pretrained weights under the masks, by name; none if the seed gives all."""
    if manifest.base is None:
        if base is not None:
            raise ArtifactError("`base` was given, but the file's weights come from its seed; leave out `base`")
        return {}
    core = build_architecture(manifest.architecture, library_tag(manifest)) if base is None else None
    return base_weights(manifest, core, base)


def _provenance(files: Sequence[Artifact], how: str) -> dict[str, Any]:
    """Return what the file records: what it was made of, and of the first file the classes and how images are read."""
    first = files[0].manifest.provenance
    of = [
        {
            "file": Path(str(file.path)).name,
            "masks_sha256": file.manifest.masks_sha256,
            "kept": file.manifest.kept / max(file.manifest.weights, 1),
        }
        for file in files
    ]
    made: dict[str, Any] = {"combined": {"how": how, "of": of}}
    recipe = first.get("recipe")
    if isinstance(recipe, dict) and "data" in recipe:
        made["recipe"] = {"data": recipe["data"]}
    return made | {key: first[key] for key in ("classes", "custom") if key in first}
