"""The pretrained weights that a file's masks are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import ArtifactError, ConversionError, PopupError
from ..masking.walk import unwrap
from ..models.architecture import Base
from ..models.pretrained import check_tag, prefix_note, read_weights, without_prefix
from ..weights.fill import values_digest
from ..weights.source import source_of
from .container import DTYPES
from .manifest import Manifest


def library_tag(manifest: Manifest) -> str:
    """Return the tag of the library's weights that the masks are for."""
    architecture, base = manifest.architecture, cast(Base, manifest.base)
    if not base.tag or (base.library, base.name) != (architecture.library, architecture.name):
        raise ArtifactError(
            f"the masks are for weights of {base.library[:60]}/{base.name[:60]} that no library provides; pass the "
            "network or the file that holds them as `base` (--base)"
        )
    try:
        return check_tag(architecture, base.tag)
    except PopupError as error:
        raise ArtifactError(f"base.tag: {error}") from error


def base_weights(manifest: Manifest, core: nn.Module | None, base: nn.Module | str | Path | None) -> dict[str, Tensor]:
    """Return the pretrained weights under the masks, by name, after checking their digest.

    The result is empty if the seed gives all weights.
    """
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
            raise ArtifactError(f"base is a {type(holder).__name__}; expected a network or a file of weights")
        source = unwrap(holder).state_dict(keep_vars=True)
    return checked_base(manifest, source)


def checked_base(
    manifest: Manifest, source: Mapping[str, Any], known: dict[Any, str] | None = None
) -> dict[str, Tensor]:
    """Return the weights under the masks among the tensors of `source`, after checking their digest.

    Args:
        known: digests of earlier calls with this `source`, by what they cover. A new one is added.
    """
    weights = without_prefix(source, [entry.name for entry in manifest.masked])
    found = {}
    for entry in manifest.masked:
        if source_of(entry.distribution).in_base:
            tensor = weights.get(entry.name)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape or tensor.is_meta:
                has = f"{tuple(tensor.shape)}" if isinstance(tensor, Tensor) else "nothing"
                note = "" if isinstance(tensor, Tensor) else prefix_note(weights, entry.name)
                raise ArtifactError(f"the base has {has} for {entry.name!r}; expected {entry.shape}{note}")
            found[entry.name] = tensor.detach().to(DTYPES[entry.dtype])
    assert manifest.base is not None
    known, covered = {} if known is None else known, tuple((name, tensor.dtype) for name, tensor in found.items())
    if covered not in known:
        known[covered] = values_digest(found.values())
    if (digest := known[covered]) != manifest.base.sha256:
        of = f"{manifest.base.library}/{manifest.base.name} {manifest.base.tag}".rstrip()
        raise ArtifactError(
            f"the masks are for other weights: those of {of} with the SHA-256 {manifest.base.sha256[:12]}…, and the "
            f"base at hand has {digest[:12]}…"
        )
    return found
