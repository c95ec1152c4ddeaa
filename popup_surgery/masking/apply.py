"""Apply a plan to a network: find its parameters, prepare everything that can fail, and only then change anything."""

import torch
from torch import nn

from ..errors import ConversionError
from ..learners import Learner, get_learner
from ..models.architecture import note_origin
from ..selection import kept_count
from ..selection.fixed import FixedTensor, FreeWeights
from ..torch_compat import NormWithStatistics
from ..weights.fill import fill, values_digest
from ..weights.source import source_of
from ..weights.streams import draw, untied
from .checks import check_memory, check_rest, check_score_name, check_writable
from .layer import masked_class, swap
from .plan import Plan, PlannedRest, PlannedWeight
from .ranking import STATE, RankGroup, mark_forwards
from .settings import MaskingSettings
from .shares import floor_count
from .state import MaskedParam, ModuleState, slots_of, state_of
from .unmasked import FROZEN, Generated
from .walk import Place, masked_weights, places_of


def apply(core: nn.Module, planned: Plan) -> None:
    """Apply `planned` to `core`, the network that it was made for or an equal one, in place.

    Raises:
        ConversionError: the plan is for another network. `core` is unchanged.
    """
    settings = planned.settings
    learner = get_learner(settings.learner, settings.learner_options)
    places = {place.key: place for place in places_of(core)}
    masked = [(weight, _held(places, weight)) for weight in planned.masked]
    check_memory(core, planned)
    rest = [(other, _place(places, other.key, other.shape)) for other in planned.rest]
    for other, place in rest:
        check_rest(other, place.tensor)
    scores = [_first_scores(weight, held[0], learner, settings.seed) for weight, held in masked]
    for module, names in _by_module(masked).items():
        masked_class(type(module), names)
    norms = _norms_to_reset(core, planned, rest)

    _mask(masked, scores, learner, planned)
    for module in core.modules():
        module.__dict__.setdefault(STATE, ModuleState())
    rules = {id(place.tensor): other.treatment for other, place in rest}
    for other, place in rest:
        _treat(other, place, settings.seed)
    for place in places.values():
        if (rule := rules.get(id(place.tensor))) is not None:  # in all modules that share a parameter
            place.module.__dict__[STATE].others.setdefault(place.name, rule)
    for norm in norms:
        norm.reset_running_stats()
    core.__dict__[STATE].settings = settings
    _note_digest(core)
    if settings.scope == "global":
        _rank_together(core, learner, settings)
    elif learner.one_pass:
        mark_forwards(core)


# find and prepare: what can fail

Weights = list[tuple[PlannedWeight, list[Place]]]
Rest = list[tuple[PlannedRest, Place]]


def _place(places: dict[str, Place], key: str, shape: tuple[int, ...]) -> Place:
    found = places.get(key)
    if found is None or tuple(found.tensor.shape) != shape:
        has = "nothing" if found is None else tuple(found.tensor.shape)
        raise ConversionError(f"{key}: the plan is for {shape}, the network has {has}")
    return found


def _held(places: dict[str, Place], weight: PlannedWeight) -> list[Place]:
    held = [_place(places, key, weight.shape) for key in weight.owners]
    for place in held:
        if place.name in slots_of(place.module):
            raise ConversionError(f"{place.key} is masked already; the plan was made before")
        check_score_name(place)
        check_writable(place.key, place.tensor)
    return held


def _first_scores(weight: PlannedWeight, place: Place, learner: Learner, seed: int) -> nn.Parameter:
    own = source_of(weight.distribution).values(weight.numel, weight.std, seed, weight.key, place.tensor)
    values = untied(own, seed, weight.key)
    score = torch.empty_like(place.tensor, dtype=torch.float32, requires_grad=False)
    fill(score, learner.initial_scores(weight.numel, weight.fan_in, seed, weight.key, values))
    return nn.Parameter(score, requires_grad=learner.trains)


def _by_module(masked: Weights) -> dict[nn.Module, tuple[str, ...]]:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for _, held in masked:
        for place in held:
            names[place.module] = (*names.get(place.module, ()), place.name)
    return names


def _norms_to_reset(core: nn.Module, planned: Plan, rest: Rest) -> list[NormWithStatistics]:
    """Return the norms whose statistics are to be reset: those not converted before, except those that came frozen.

    None if weights are pretrained.
    """
    if any(source_of(weight.distribution).in_base for weight in planned.masked):
        return []
    learning = {place.module for other, place in rest if other.treatment != FROZEN}
    frozen = {place.module for other, place in rest if other.treatment == FROZEN} - learning
    found = [m for m in core.modules() if isinstance(m, NormWithStatistics) and state_of(m) is None and m not in frozen]
    for norm in found:
        for name, buffer in norm._buffers.items():
            if buffer is not None:
                check_writable(f"{name} of {type(norm).__name__}", buffer)
    return found


# change: what cannot fail


def _mask(masked: Weights, scores: list[nn.Parameter], learner: Learner, planned: Plan) -> None:
    """Give the weights to mask their values, freeze them, and swap their layers."""
    settings = planned.settings
    slots: dict[nn.Module, dict[str, MaskedParam]] = {}
    new_scores: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for (weight, held), score in zip(masked, scores, strict=True):
        source = source_of(weight.distribution)
        source.fill(held[0].tensor, weight.std, settings.seed, weight.key)
        ranking = RankGroup(learner, weight.kept or 0, weight.pattern, _free(weight, settings.seed))
        index = ranking.add(held[0].module, held[0].name, weight.key)
        for _, module, name in held:
            slots.setdefault(module, {})[name] = MaskedParam(
                weight.key, settings.seed, weight.scheme, settings.scaled and source.drawn,
                weight.k, weight.distribution, weight.std, weight.fan_in, ranking, index,
            )  # fmt: skip
            new_scores.setdefault(module, {})[name] = score
        held[0].tensor.requires_grad_(False)
    for module in slots:
        swap(module, slots[module], new_scores[module])


def _free(weight: PlannedWeight, seed: int) -> FreeWeights | None:
    """Return which of its weights are not fixed; None if none is."""
    if (fixed := weight.fixed) is None:
        return None
    return FreeWeights.of([FixedTensor(fixed.dropped, fixed.kept, weight.numel, seed, weight.key)])


def _treat(other: PlannedRest, place: Place, seed: int) -> None:
    """Apply its rule to a parameter that is not masked, and record the rule."""
    rule, parameter, state = other.treatment, place.tensor, place.module.__dict__[STATE]
    parameter.requires_grad_(other.train)
    state.others[place.name] = rule
    if other.done:
        return
    if rule.action == "constant":
        with torch.no_grad():
            parameter.fill_(rule.value)
    elif rule.action == "generated":
        fill(parameter, draw("normal", other.numel, rule.value, seed, "other", other.key))
        state.generated[place.name] = Generated(other.key, seed, rule.value)


def _note_digest(core: nn.Module) -> None:
    """Record what the masked pretrained weights are now, so that `save` notices when something moves them."""
    masked = {
        id(module._parameters[name])
        for _, module, name, slot in masked_weights(core)
        if source_of(slot.distribution).in_base
    }
    kept = [tensor for tensor in core.state_dict(keep_vars=True).values() if id(tensor) in masked]
    unique = list({id(tensor): tensor for tensor in kept}.values())
    if unique and not any(tensor.is_meta for tensor in unique):
        note_origin(core, digest=(unique[0].dtype, values_digest(unique)))


def _rank_together(core: nn.Module, learner: Learner, settings: MaskingSettings) -> None:
    """Put all masked weights of `core` into one ranking group, in place of the groups they had."""
    ranking = RankGroup(learner, 0)
    place: dict[int, int] = {}
    fixed: list[FixedTensor] = []
    for _, module, name, slot in masked_weights(core):
        place[id(module._parameters[name])] = ranking.add(module, name, slot.stream)
        fixed += [] if slot.ranking.fixed is None else [slot.ranking.fixed.members[slot.index]]
    ranking.fixed = FreeWeights.of(fixed) if fixed else None
    for module in core.modules():
        for name, slot in slots_of(module).items():
            slot.ranking, slot.index = ranking, place[id(module._parameters[name])]
    ranking.kept = kept_count(ranking.numel, settings.by_pattern("k")["*"])
    if settings.floor is not None:
        ranking.floors = tuple(floor_count(score.numel(), settings) for score in ranking.scores())
    mark_forwards(core, ranking)
