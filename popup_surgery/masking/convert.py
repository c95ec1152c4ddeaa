"""Turn a network into a hidden one: `convert` does what a plan says."""

import logging
from typing import Unpack, cast

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..learners import Learner, get_learner
from ..models.architecture import DESCRIPTION, Architecture
from ..models.build import build, build_architecture, build_uninitialised
from ..models.libraries import architecture_of
from ..selection import kept_count
from ..torch_compat import NormWithStatistics, renew_reducer
from ..weights import is_pretrained
from ..weights.fill import fill
from ..weights.source import source_of
from ..weights.streams import check_seed, draw
from .layer import masked_class, swap
from .plan import Plan, PlannedWeight
from .planning import plan
from .ranking import RankGroup, drop_hooks
from .settings import Settings, Shares
from .state import CONVERTED, SETTINGS, MaskedParam, slots_of
from .unmasked import GENERATED, Generated
from .walk import masked_weights, unwrap

log = logging.getLogger("popup_surgery")


def convert(
    model: nn.Module | str | Architecture,
    k: Shares | None = None,
    *,
    architecture: Architecture | str | None = None,
    **settings: Unpack[Settings],
) -> nn.Module:
    """Turn a network into a hidden one, in place: random frozen weights, and a score for each that training changes.

    Every Conv1d/2d/3d, ConvTranspose and Linear layer, subclasses too, attention's packed projections, the weights of
    LSTM, GRU and RNN, timm's CondConv2d and transformers' Conv1D are read through a mask from then on. Weights and
    scores are drawn from the seed (a pretrained network loses its own), biases become 0, norm scales and branch scales
    1 and norm biases 0, embeddings and tokens are drawn, running statistics start anew; docs/surgery.md says which.
    Nothing but the scores, float32 of their weight's shape, requires a gradient. Method: "What's Hidden in a Randomly
    Weighted Neural Network?", CVPR 2020, sections 3 and 4.

    A network that was converted before is completed: layers that came into it since, as by `reset_classifier`, are
    masked with the same settings, and everything else stays as it is.

    Args:
        model: any network, also one layer alone, also wrapped by DDP or `torch.compile`; or a name or description, as
            for `build`, of a network that is then built without its own initialisation, which takes the most time.
        k: share of a layer's weights that is kept, in (0, 1], 0.3 if not given; or shares by glob pattern on layer
            names, of which the last that matches a layer counts, and 0.3 where none does. Not for learners whose scores
            decide how many weights are kept, as `supermask`'s do.
        scheme: a key of `weights.SCHEMES`, `signed_kaiming_constant` if not given; or `pretrained`: the weights stay as
            they are, as in Piggyback (Mallya et al., ECCV 2018), and so does everything else; or schemes by glob
            pattern, as for k. Layers that `build` found no pretrained weights for are drawn.
        scaled: widen drawn weights by √(1/k), which keeps the variance of a layer's output; True if not given, where
            the learner takes a k.
        seed: 0 … 2⁶⁴ − 1; 0 if not given.
        learner: a key of `learners.LEARNERS`; `edge_popup` if not given.
        learner_options: its options by name, as its class explains them, such as `{"rescale": True}`.
        scope: `layer`, if not given, ranks each layer by itself, `global` all layers together.
        include, exclude: glob patterns on module names; a pattern that matches a module covers all within it.
        others: `train` makes everything that is not masked trainable, `frozen`, if not given, nothing of it.
        norm: `train` makes the scales and biases of normalisation layers trainable.
        architecture: what `save` shall record, such as `timm/resnet50`; `build` has recorded it already.

    Returns:
        `model` itself, or the swapped layer if `model` is a layer, or the network of that name.

    Raises:
        ConversionError: bad k, seed, scope, pattern, word or learner option; a layer would keep nothing; the network
            was converted with other settings.
        NothingToConvert: there is no layer to mask, or the patterns leave none.
        UnknownName: no such scheme, learner or architecture.
    """
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise ConversionError(f"architecture is {architecture!r}; expected a name such as 'timm/resnet50'")
    if torch.is_inference_mode_enabled():
        raise ConversionError("convert was called under torch.inference_mode, where its scores could never learn")
    if isinstance(architecture, str):
        architecture = architecture_of(architecture)
    if isinstance(model, str | Architecture):
        model = _build(model, k, settings)
    planned = plan(model, k, **settings)
    core = unwrap(model)
    # whoever let `build` make the network knows that its weights were random
    level = logging.INFO if DESCRIPTION in core.__dict__ else logging.WARNING
    _apply(core, planned)
    _synchronise(model)
    if architecture is not None:
        core.__dict__[DESCRIPTION] = architecture
    if drawn := sum(source_of(weight.distribution).drawn for weight in planned.masked):
        seed = planned.settings["seed"]
        if drawn < len(planned.masked):
            level = logging.WARNING  # a head that was trained, perhaps
        log.log(level, "the weights of %d layers were drawn anew from seed %d; what they were is gone", drawn, seed)
    if (coverage := planned.coverage).of_weights < 0.99:
        log.warning(
            "%.0f %% of the weights are not masked: %s", 100 * (1 - coverage.of_weights), ", ".join(coverage.missed)
        )
    return model


def _build(described: str | Architecture, k: Shares | None, settings: Settings) -> nn.Module:
    """The network of that name for conversion with these settings: whatever conversion will not fill is initialised."""
    architecture = architecture_of(described) if isinstance(described, str) else described
    if is_pretrained(settings.get("scheme", "")):
        return build(f"{architecture.library}/{architecture.name}", pretrained=True, **architecture.kwargs)
    seed = check_seed(settings.get("seed", 0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, blank = build_uninitialised(architecture)
        left = [other.owner for other in plan(model, k, **settings).rest if other.treatment.action == "left"]
        if not any(blank.is_blank(cast(Tensor, module._parameters[name])) for module, name in left):
            return model
        torch.manual_seed(seed)
        return build_architecture(architecture)


def _apply(core: nn.Module, planned: Plan) -> None:
    settings = planned.settings
    learner = get_learner(settings["learner"], settings["learner_options"])
    # all that could fail comes before the first change
    scores = [_initial_scores(weight, learner, settings["seed"]) for weight in planned.masked]
    names: dict[nn.Module, list[str]] = {}
    for weight in planned.masked:
        for owner, held in weight.owners:
            names.setdefault(owner, []).append(held)
    for owner, held_names in names.items():
        masked_class(type(owner), tuple(held_names))

    slots: dict[nn.Module, dict[str, MaskedParam]] = {}
    new_scores: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for weight, score in zip(planned.masked, scores, strict=True):
        module, name = weight.owners[0]
        source = source_of(weight.distribution)
        source.fill(cast(Tensor, module._parameters[name]), weight.std, settings["seed"], weight.key)
        ranking = RankGroup(learner, weight.kept or 0)
        index = ranking.add(module, name, weight.key)
        for owner, held in weight.owners:
            cast(Tensor, owner._parameters[held]).requires_grad_(False)
            slots.setdefault(owner, {})[held] = MaskedParam(
                weight.key, settings["seed"], weight.scheme, settings["scaled"] and source.drawn,
                weight.k, weight.distribution, weight.std, weight.fan_in, ranking, index,
            )  # fmt: skip
            new_scores.setdefault(owner, {})[held] = score
    for module in slots:
        swap(module, slots[module], new_scores[module])
    if settings["scope"] == "global":
        _rank_together(core, learner, settings["k"])

    for other in planned.rest:
        module, name = other.owner
        parameter, value = cast(Tensor, module._parameters[name]), other.treatment.value
        parameter.requires_grad_(other.train)
        if other.done:
            continue
        if other.treatment.action == "constant":
            with torch.no_grad():
                parameter.fill_(value)
        elif other.treatment.action == "generated":
            _draw(module, name, "normal", value, settings["seed"], "other", other.key)
            module.__dict__.setdefault(GENERATED, {})[name] = Generated(other.key, settings["seed"], value)
    pretrained = any(source_of(weight.distribution).in_base for weight in planned.masked)
    for module in core.modules():
        if isinstance(module, NormWithStatistics) and CONVERTED not in module.__dict__ and not pretrained:
            module.reset_running_stats()
        module.__dict__.setdefault(CONVERTED, {})
    for other in planned.rest:
        module, name = other.owner
        module.__dict__[CONVERTED][name] = other.treatment
    core.__dict__[SETTINGS] = settings


def _synchronise(model: nn.Module) -> None:
    """Let DistributedDataParallel around a network that was wrapped first know what is trained now."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            renew_reducer(module)


def _initial_scores(weight: PlannedWeight, learner: Learner, seed: int) -> nn.Parameter:
    module, name = weight.owners[0]
    tensor = cast(Tensor, module._parameters[name])
    values = source_of(weight.distribution).values(weight.numel, weight.std, seed, weight.key, tensor)
    score = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
    fill(score, learner.initial_scores(weight.numel, weight.fan_in, seed, weight.key, values))
    return nn.Parameter(score, requires_grad=learner.trains)


def _rank_together(core: nn.Module, learner: Learner, k: float) -> None:
    """One ranking for all masked weights of `core`, in place of those that they had."""
    ranking = RankGroup(learner, 0)
    place: dict[int, int] = {}
    for _, module, name, slot in masked_weights(core):
        place[id(module._parameters[name])] = ranking.add(module, name, slot.stream)
    for module in core.modules():
        for name, slot in slots_of(module).items():
            slot.ranking, slot.index = ranking, place[id(module._parameters[name])]
    ranking.kept = kept_count(sum(score.numel() for score in ranking.scores()), k)
    drop_hooks(core)
    ranking.hold_during_forward(core)


def _draw(module: nn.Module, name: str, distribution: str, std: float, seed: int, purpose: str, stream: str) -> None:
    tensor = cast(Tensor, module._parameters[name])
    fill(tensor, draw(distribution, tensor.numel(), std, seed, purpose, stream))
