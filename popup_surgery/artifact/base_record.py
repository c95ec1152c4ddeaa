"""The pretrained weights that a file records under its masks: those that the network was converted with."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..errors import PopupError
from ..masking.state import slots_of
from ..models.architecture import Architecture, Base, Origin, origin_of
from ..models.build import build
from ..weights.fill import deviation, pieces_of, values_digest
from ..weights.source import source_of

log = logging.getLogger("popup_surgery")


def base_record(
    core: nn.Module, described: Architecture, live: Mapping[str, Tensor]
) -> tuple[Base | None, dict[str, Tensor]]:
    """Return the record of a network's pretrained weights, None if it has none; and the weights themselves, by name.

    Weights that have moved within rounding since conversion are replaced by those they were. If they have moved
    further, or what they were cannot be obtained again, they are a base of their own, which no library has.

    Args:
        live: the network's masked pretrained weights as they are now, by name.
    """
    if not live:
        return None, {}
    origin = origin_of(core)
    base = origin.base or Base(described.library, described.version, described.name, "")
    slots = ((name, slot) for name, module in core.named_modules() for slot in slots_of(module).values())
    if {name for name, slot in slots if source_of(slot.distribution).in_base} & set(origin.fresh):
        base = replace(base, tag="")
    digest, weights = values_digest(live.values()), dict(live)
    if origin.digest is not None and origin.digest[1] != digest:
        original = _built_again(origin, live)
        if original is not None:
            weights, base = _settle(original, weights, base)
        elif all(tensor.dtype == origin.digest[0] for tensor in live.values()):
            base = _of_its_own(base, "(what they were cannot be obtained again)")
    return replace(base, sha256=values_digest(weights.values())), weights


def _built_again(origin: Origin, live: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the weights that `build` gave the network, in the dtypes of `live`; None if they are out of reach."""
    described, source = origin.architecture, origin.pretrained
    if described is None or source is None:
        return None
    try:
        model = build(f"{described.library}/{described.name}", pretrained=source, **described.kwargs)
    except PopupError:
        return None
    state = model.state_dict()
    if any(name not in state or state[name].shape != tensor.shape for name, tensor in live.items()):
        return None
    return {name: state[name].to(tensor.dtype) for name, tensor in live.items()}


def _settle(original: dict[str, Tensor], live: dict[str, Tensor], base: Base) -> tuple[dict[str, Tensor], Base]:
    """Return `original` if `live` lies within rounding of it, else `live` as a base of its own. Tell what differs."""
    found = {
        name: deviation(tensor, (piece.float().numpy() for piece in pieces_of(original[name])))
        for name, tensor in live.items()
    }
    moved = [largest for largest, _ in found.values() if largest]
    if not moved:
        return original, base
    if all(rounding for _, rounding in found.values()):
        tell_moved("pretrained", moved, f"{base.library}/{base.name} {base.tag}".rstrip())
        return original, base
    return live, _of_its_own(base, f"by up to {max(moved):.3g}")


def _of_its_own(base: Base, why: str) -> Base:
    """Return `base` without its tag, and warn that the weights are no longer those of that tag."""
    log.warning(
        "the pretrained weights have changed since conversion %s; the file's masks are for the weights as they are "
        "now, which load needs as `base`: keep model.state_dict() in a file beside it",
        why,
    )
    return replace(base, tag="")


def tell_moved(kind: str, moved: list[float], source: str) -> None:
    """Warn that frozen weights had moved within rounding, and that the file holds the masks for the exact ones."""
    log.warning(
        "the %s weights of %d layers had moved by up to %.2g since conversion, which is within rounding; the file is "
        "for the exact weights of %s",
        kind, len(moved), max(moved), source,
    )  # fmt: skip
