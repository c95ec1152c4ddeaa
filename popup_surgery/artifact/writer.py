"""Write a subnetwork: every entry of the `state_dict` has exactly one place in the file."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import write_atomically
from ..codecs import generations, get_codec, sources
from ..codecs.bitpack import ones, pack
from ..errors import ArtifactError
from ..learners import name_of
from ..learners.sampling import as_saved
from ..masking.bake import bake, in_one_piece
from ..masking.packed import refuse_packed
from ..masking.planning import unconverted
from ..masking.ranking import origin_name, parameter_of, score_name, score_of
from ..masking.state import MaskedParam, slots_of, state_of
from ..masking.unmasked import Generated
from ..masking.walk import ranked_within, unwrap
from ..selection.fixed import FixedTensor
from ..weights.fill import equals, fill, pieces_of
from ..weights.fixed import Fixed
from ..weights.source import source_of
from ..weights.streams import SIGNS, draw
from .assemble import assemble
from .base_record import base_record, tell_moved
from .container import DTYPE_NAMES
from .description import describe_network
from .manifest import Constant, Manifest, TensorSpec
from .planes import GENERATION, OF_MANY, SOURCE, Bits, Packed
from .probe import take_probe
from .reader import naming
from .rebuild import effective_pieces, masks_digest, weights_digest

log = logging.getLogger("popup_surgery")

Slots = dict[int, MaskedParam | None]  # by tensor identity: the record of a masked weight, None for a score


def save(
    model: nn.Module,
    path: str | Path,
    *,
    provenance: dict[str, Any] | None = None,
    probe: tuple[int, ...] | None = None,
    encoding: str = "bitpack",
) -> Manifest:
    """Write a converted network as a popup artifact: a seed, one bit per masked weight, and what no seed can rebuild.

    The file records the name of a library's network: one from `build` or timm, or the `architecture` that `convert` was
    given. Other networks are recorded as `custom`, with a warning, and so are those that compute something else than
    the network of that name. `load` then needs the network.

    Args:
        model: a network that `convert` returned, before or after training. It may be wrapped by DDP or `torch.compile`.
            If `fully_shard` has spread it over processes, all of them must call this, each with a path of its own.
        path: the file to write. An existing file is replaced atomically.
        provenance: JSON values to record: recipe, accuracies, versions. Numbers that are not finite become null. If
            the learner samples, the key `mask` says which network the file holds.
        probe: shape of an input, batch first. The first outputs for such an input are recorded, so that `verify`
            notices if a library has changed the network of that name.
        encoding: how masks are stored: the name of a codec in `popup_surgery.codecs`. `pattern_coded` is for networks
            that were converted with a `pattern`. With it and `range_coded`, planes such as coats are coded too, where
            that saves bytes.

    Returns:
        The manifest: the description in the file, as written.

    Raises:
        ArtifactError: the network is not converted, or has a new layer without a mask; it is on the meta device; its
            weights are no longer those of the seed, or were trained; or a file cannot hold one of its `state_dict`
            entries. The message names the layer or entry.
        UnknownName: there is no such codec.
        PopupError: the file cannot be written. An existing file is unchanged.
    """
    core = in_one_piece(unwrap(model))
    refuse_packed(core, "be saved, as the file has it", ArtifactError)
    get_codec(encoding)
    with as_saved(), ranked_within(core):
        manifest, bits, stored = _describe(core, provenance or {}, probe)
    with naming(path):
        manifest, data = assemble(manifest, bits, stored, encoding)
    write_atomically(path, data)
    return manifest


def _describe(
    core: nn.Module, provenance: dict[str, Any], probe: tuple[int, ...] | None
) -> tuple[Manifest, dict[str, Bits], dict[str, Tensor]]:
    """Return the manifest of a converted network, its packed masks and planes, and the tensors that the file stores."""
    slots, generated = _origins(core)
    seed = _check_whole(core, slots)
    learners = [slot.ranking.learner for slot in slots.values() if slot is not None]
    if shown := {learner.describe_sample() for learner in learners if learner.samples}:
        provenance = provenance | {"mask": ", ".join(sorted(shown))}
    entries = _entries(core)
    places = _sort(entries, slots, generated, seed)
    masked = places.masked
    own = {name: tensor for name, tensor in entries.items() if slots.get(id(tensor), tensor) is not None}
    architecture, reason = describe_network(core, own)
    if architecture.library == "custom":
        provenance = provenance | _tell_custom(architecture.name, reason)
    live = {entry.name: entries[entry.name] for entry, _ in masked if source_of(entry.distribution).in_base}
    base, weights = base_record(core, architecture, live)
    if places.moved:
        tell_moved("random", places.moved, f"seed {seed}")
    manifest = Manifest(
        architecture=architecture,
        seed=seed,
        masked=tuple(entry for entry, _ in masked),
        generated=tuple(places.generated),
        constants=places.constants,
        aliases=places.aliases,
        masks_sha256=masks_digest([bits.mask for _, bits in masked]),
        weights_sha256=weights_digest(masked, seed, weights),
        tensors_sha256="",  # which `assemble` knows
        provenance=_finite(provenance),
        probe=take_probe(_as_restored(core, masked, seed, weights), seed, probe) if probe is not None else None,
        base=base,
    )
    return manifest, {entry.name: bits for entry, bits in masked}, places.stored


def _entries(core: nn.Module) -> dict[str, Any]:
    """Return the `state_dict`, with the network's own masked weights and scores where a hook put copies of them.

    What computes a score, such as the mask of `prune` or a parametrisation, is left out; so is what says where weights
    are from.

    Raises:
        ArtifactError: a masked weight is not in it, or is not what it is in the network.
    """
    entries = core.state_dict(keep_vars=True)
    found = {id(tensor) for tensor in entries.values()}
    beside: list[str] = []  # how the keys begin of what computes a score or says where a weight came from
    for layer, module in core.named_modules():
        prefix = f"{layer}." if layer else ""
        for name, slot in slots_of(module).items():
            score = score_name(name)
            beside += [f"{prefix}{score}_", f"{prefix}parametrizations.{score}."]
            for part, tensor in (name, parameter_of(module, name)), (score, score_of(module, name)):
                key = prefix + part
                if id(tensor) in found or (key not in entries and part == score):
                    continue
                if key not in entries or not torch.equal(entries[key], tensor):
                    raise ArtifactError(
                        f"the network's state_dict has {'another' if key in entries else 'no'} {key}: a hook or a "
                        "method of the network's own changes it; save the network without that"
                    )
                entries[key] = tensor
            beside += [prefix + origin_name(name, what) for what in slot.origins]
    return {name: tensor for name, tensor in entries.items() if not name.startswith(tuple(beside))}


def _check_whole(core: nn.Module, slots: Slots) -> int:
    """Return the network's one seed. Check that it is converted as a whole and that its weights were not trained."""
    if not slots:
        raise ArtifactError(f"{type(core).__name__} has no masked layer; convert it before saving")
    seeds = {slot.seed for slot in slots.values() if slot is not None}
    if len(seeds) > 1:
        raise ArtifactError(
            f"the layers have the seeds {sorted(seeds)}; a file holds one seed, so convert all layers with the same"
        )
    if new := unconverted(core):
        raise ArtifactError(
            f"{', '.join(new[:5])}{' and more' if len(new) > 5 else ''} came into the network after its conversion and "
            "would have no mask; mask new layers with convert(model) again, and save before layers are fused"
        )
    learners = [slot.ranking.learner for slot in slots.values() if slot is not None]
    if dense := next((name_of(learner) for learner in learners if learner.learns_weights), None):
        raise ArtifactError(
            f"the learner {dense} trains the weights themselves, which no seed can restore; write "
            "bake(model).state_dict() as an ordinary file of weights, as train does"
        )
    return seeds.pop()


@dataclass(frozen=True)
class _Places:
    """Where each entry of a `state_dict` goes: into a list of the manifest, or among the stored tensors.

    `moved` has the largest difference of each masked weight that lies within rounding of the seed's.
    """

    masked: list[tuple[TensorSpec, Bits]] = field(default_factory=list)
    generated: list[TensorSpec] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)


def _sort(entries: dict[str, Any], slots: Slots, generated: dict[int, Generated], seed: int) -> _Places:
    """Assign each entry that is not a score to its one place."""
    places, first = _Places(), dict[int, str]()
    for name, tensor in entries.items():
        if id(tensor) in slots and slots[id(tensor)] is None:
            continue  # a score
        _check_entry(name, tensor)
        if id(tensor) in first:
            places.aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        if slot := slots.get(id(tensor)):
            masked = _masked_entry(name, tensor, slot)
            for part in ("mask", *masked[0].planes):
                if f"{name}.{part}" in entries:
                    raise ArtifactError(
                        f"{name}.{part} is a state_dict entry of its own, where the {part} of {name} must stand"
                    )
            largest = source_of(slot.distribution).check(name, tensor, slot.values(tensor), slot.seed)
            if largest:
                places.moved.append(largest)
            places.masked.append(masked)
        elif (origin := generated.get(id(tensor))) and (entry := _generated_entry(name, tensor, origin, seed)):
            places.generated.append(entry)
        elif (constant := _constant(tensor)) is not None:
            places.constants[name] = constant
        else:
            places.stored[name] = tensor.detach().cpu().contiguous()
    return places


def _check_entry(name: str, tensor: Any) -> None:
    """Raise `ArtifactError` unless a file can hold this entry of a `state_dict`."""
    if not isinstance(tensor, Tensor):
        raise ArtifactError(f"the state_dict entry {name!r} is a {type(tensor).__name__}; expected a tensor")
    if tensor.is_meta:
        raise ArtifactError(f"{name!r} is on the meta device and has no values to save")
    if tensor.dtype not in DTYPE_NAMES:
        raise ArtifactError(f"{name!r} has the dtype {tensor.dtype}, which safetensors cannot hold")


def _tell_custom(name: str, reason: str) -> dict[str, str]:
    """Warn that no library builds the network that is saved. Return what the file's provenance says of it."""
    if reason:
        log.warning("the architecture is saved as custom, and load will need the network as `model`: %s", reason)
        return {"custom": reason}
    log.warning(
        "the architecture is saved as custom (%s), and load will need the network as `model`; if a library builds it, "
        "name it, as in convert(model, architecture='timm/resnet50')",
        name,
    )
    return {}


def _as_restored(
    core: nn.Module, masked: list[tuple[TensorSpec, Bits]], seed: int, base: Mapping[str, Tensor]
) -> nn.Module:
    """Return a plain copy of the network, with the masked weights that the file restores."""
    plain = bake(core)
    weights = plain.state_dict(keep_vars=True)
    for entry, bits in masked:
        fill(weights[entry.name], effective_pieces(entry, seed, bits, base.get(entry.name)))
    return plain


def _origins(core: nn.Module) -> tuple[Slots, dict[int, Generated]]:
    """Return by tensor identity: each masked weight's slot (None for a score); and each generated tensor's origin."""
    slots: Slots = {}
    generated: dict[int, Generated] = {}
    seen: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in core.named_modules():
        for name, slot in slots_of(module).items():
            weight, score, key = parameter_of(module, name), score_of(module, name), f"{prefix}.{name}".lstrip(".")
            first, of_first = seen.setdefault(id(weight), (key, score))
            if of_first is not score:
                raise ArtifactError(
                    f"{first} and {key} are one weight under two masks, which a file cannot hold; copy the layer with "
                    "copy.deepcopy"
                )
            slots[id(weight)] = slot
            slots[id(score)] = None
        state = state_of(module)
        for name, origin in state.generated.items() if state is not None else ():
            generated[id(module._parameters[name])] = origin
    return slots, generated


def _masked_entry(name: str, weight: Tensor, slot: MaskedParam) -> tuple[TensorSpec, Bits]:
    """Return the manifest's entry for a masked weight, and its packed mask and planes."""
    mask, learner = slot.ranking.mask(slot.index), slot.ranking.learner
    packed = pack(mask.cpu().numpy())
    kept, std, distribution = ones(packed), slot.std * learner.scale(weight, mask), slot.distribution
    if learner.binary and kept and distribution in SIGNS:  # of constants, the factor is the constant
        std, distribution = float(learner.magnitude(weight, mask)), SIGNS[distribution]
    with torch.no_grad():
        planes = {
            kind: pack(learner.plane(kind, weight.detach(), slot.ranking.score(slot.index), mask).cpu().numpy())
            for kind in learner.planes
        }
    planes = _of_origins(slot, mask, weight) | planes
    group = slot.ranking
    k = kept / weight.numel() if slot.k is None else float(slot.k)
    if group.kept_now is not None:  # another share than that of the conversion, for now
        k = group.in_force / group.numel
    note = {"scheme": slot.scheme, "scaled": slot.scaled, "k": k, "fan_in": float(slot.fan_in)}
    dtype = DTYPE_NAMES[weight.dtype]
    entry = TensorSpec(
        name, slot.stream, tuple(weight.shape), dtype, distribution, std, kept, note,
        planes=tuple(planes), pattern=group.pattern,
        fixed=None if group.fixed is None else _fixed(group.fixed.members[slot.index]),
    )  # fmt: skip
    return entry, Bits(packed, planes)


def _fixed(member: FixedTensor) -> Fixed | None:
    """Return how many weights are fixed; None if no weight is, as in a small layer."""
    found = Fixed(member.dropped, member.kept)
    return found if found.free(member.numel) < member.numel else None


def _of_origins(slot: MaskedParam, mask: Tensor, weight: Tensor) -> dict[str, Packed]:
    """Return the planes of kept weights that were drawn again or copied, if any was.

    Those of constants are their signs, which learnt ones replace.
    """
    own = mask.cpu().reshape(-1).nonzero().view(-1)
    of_each = {what: tensor.view(-1)[own].numpy() for what, tensor in slot.origins.items()}
    drawn, found = of_each.get("generations"), of_each.get("sources")
    planes: dict[str, Packed] = {}
    if found is not None and (found != own.numpy()).any():
        planes[SOURCE] = sources.encode(own.numpy(), found, weight.numel())
    if drawn is not None and drawn.any():
        planes[GENERATION] = generations.encode(drawn)
    if planes and slot.distribution not in OF_MANY:
        return {"sign": pack(~weight.detach()[mask].signbit().cpu().numpy())}
    return planes


def _generated_entry(name: str, tensor: Tensor, origin: Generated, seed: int) -> TensorSpec | None:
    """Return the manifest's entry; None if the tensor has changed since conversion and must be stored."""
    pieces = draw(origin.distribution, tensor.numel(), origin.std, origin.seed, "other", origin.stream)
    if origin.seed != seed or not tensor.numel() or not equals(tensor, pieces):
        return None
    return TensorSpec(
        name, origin.stream, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], origin.distribution, origin.std
    )


def _constant(tensor: Tensor) -> Constant | None:
    """Return the one finite value that all elements equal; None if there is none, or if one is −0.0."""
    if not tensor.numel() or tensor.is_complex():
        return None
    value = tensor.detach().reshape(-1)[0].item()
    if tensor.is_floating_point():
        same = all(bool((piece.double() == value).all()) for piece in pieces_of(tensor))
        negative_zero = value == 0 and any(bool(piece.double().signbit().any()) for piece in pieces_of(tensor))
        if not same or negative_zero or not math.isfinite(value):
            return None
    elif not all(bool((piece == value).all()) for piece in pieces_of(tensor)):
        return None
    return Constant(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
