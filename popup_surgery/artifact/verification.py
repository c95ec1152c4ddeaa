"""Rebuild what a file describes and compare the two: `verify`."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import ArtifactError
from ..masking.walk import unwrap
from ..weights.fill import values_digest
from .base_weights import base_weights
from .file import Artifact
from .probe import check_probe
from .reader import naming
from .rebuild import weights_digest
from .restore import fill_network

Check = tuple[str, bool | None, str]
_SIGNS = {True: "ok  ", False: "FAIL", None: "-   "}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`, true if no check failed.

    Attributes:
        checks: of each check its name; whether it passed, or None if it could not be made; and a short description.
    """

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(holds is not False for _, holds, _ in self.checks)

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.checks)
        return "\n".join(f"{_SIGNS[holds]}  {name:{width}}  {word}" for name, holds, word in self.checks)


def verify(
    path: str | Path | Artifact, model: nn.Module | None = None, *, base: nn.Module | str | Path | None = None
) -> Verification:
    """Rebuild everything that a file describes and compare it with the file's digests and its probe.

    Args:
        path: the file, or an open `Artifact`.
        model: as for `load`. Without it, the weights of a `custom` network are verified, but not its architecture.
        base: as for `load`.

    Returns:
        The outcome of each check; true if none failed.

    Raises:
        ArtifactError: the file is damaged, or is not a popup artifact.
    """
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    with naming(artifact.path):
        contents = artifact.contents
        library, name = manifest.architecture.library, manifest.architecture.name
        custom = model is None and library == "custom"
        lacks_base = model is None and base is None and manifest.base is not None and (custom or not manifest.base.tag)
        network = failed = None
        if not custom and not lacks_base:
            try:
                network = fill_network(contents, model, base)  # first, as masks wait for shapes that match
            except ArtifactError as error:
                failed = error
        bits = contents.bits
        entries = [(entry, bits[entry.name]) for entry in manifest.masked]
        checks: list[Check] = [("manifest, masks, stored tensors", True, "match their digests")]
        word = f"{manifest.weights:,} of {len(manifest.masked)} layers, rebuilt from "
        if manifest.base is None:
            same = weights_digest(entries, manifest.seed, {}) == manifest.weights_sha256
            checks.append(_weights_check(same, f"{word}seed {manifest.seed}"))
        elif lacks_base:
            checks.append(_NO_BASE)
        elif custom:
            weights = base_weights(manifest, None, base)
            same = weights_digest(entries, manifest.seed, weights) == manifest.weights_sha256
            checks.append(_weights_check(same, f"{word}the base"))
        elif network is not None:
            tensors = unwrap(network).state_dict()
            same = values_digest(tensors[entry.name] for entry in manifest.masked) == manifest.weights_sha256
            checks.append(_weights_check(same, f"{word}the base {manifest.base.name} {manifest.base.tag}".rstrip()))
        if custom:
            checks.append(("architecture", None, f"custom ({name}): not checked, because no library builds it"))
        elif failed is not None:
            checks.append(("architecture", False, str(failed)))
        elif network is not None:
            checks.append(("architecture", True, f"{library}/{name} takes every tensor"))
            if (probe := manifest.probe) is not None:
                checks.append(("probe", *check_probe(network, manifest.seed, probe)))
        return Verification(tuple(checks))


_NO_BASE = ("masked weights", None, "on a pretrained base: not checked; pass the base with --base to check them")


def _weights_check(same: bool, word: str) -> Check:
    return "masked weights", same, word if same else f"{word}, but they do not match weights_sha256"
