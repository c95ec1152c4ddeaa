"""Turn a network into a hidden one: `convert` makes a plan and does what it says."""

import logging
from collections.abc import Mapping
from typing import Any, Never

import torch
from torch import nn

from ..errors import ConversionError
from ..models.architecture import Architecture, note_origin, origin_of
from ..models.build import build, build_architecture, build_uninitialised
from ..models.libraries import architecture_of
from ..torch_compat import renew_reducer
from ..weights import is_pretrained
from ..weights.source import source_of
from .apply import apply
from .plan import Plan
from .planning import plan_as_given
from .settings import DEFAULT, Choice, MaskingSettings, Patterns, Schemes, Scope, Shares, given_in
from .walk import places_of, unwrap

log = logging.getLogger("popup_surgery")


def convert(
    model: nn.Module | str | Architecture,
    k: Shares | None = DEFAULT.k,
    *,
    scheme: Schemes = DEFAULT.scheme,
    scaled: bool = DEFAULT.scaled,
    seed: int = DEFAULT.seed,
    learner: str = DEFAULT.learner,
    learner_options: Mapping[str, Any] = DEFAULT.learner_options,
    scope: Scope = DEFAULT.scope,
    include: Patterns = DEFAULT.include,
    exclude: Patterns = DEFAULT.exclude,
    others: Choice = DEFAULT.others,
    norm: Choice = DEFAULT.norm,
    architecture: Architecture | str | None = None,
    **unknown: Never,
) -> nn.Module:
    """Turn a network into a hidden one, in place: random frozen weights, and a score for each that training changes.

    Every Conv, ConvTranspose and Linear layer, subclasses too, attention's packed projections, the weights of LSTM, GRU
    and RNN, timm's CondConv2d and transformers' Conv1D are read through a mask from then on. docs/surgery.md says what
    becomes of everything else. Only scores, float32 of their weight's shape, require a gradient. Method: "What's Hidden
    in a Randomly Weighted Neural Network?", CVPR 2020, sections 3 and 4.

    A converted network is completed: new layers in it, as by `reset_classifier`, are masked with the same settings.

    Args:
        model: any network, also one layer alone, also wrapped by DDP or `torch.compile`; or a name or description, as
            for `build`: the network is then built without its own initialisation, which takes the most time.
        k: share of a layer's weights that is kept, in (0, 1]; or shares by glob pattern on layer names: the last match
            counts, and the default where none matches. Not for a learner whose scores decide how many are kept.
        scheme: a key of `weights.SCHEMES`; or `pretrained`, which leaves all weights as they are (Piggyback, Mallya et
            al., ECCV 2018) but those that `build` found no pretrained ones for; or schemes by pattern, as for k.
        scaled: widen drawn weights by √(1/k), which keeps the variance of a layer's output.
        seed: 0 … 2⁶⁴ − 1.
        learner, learner_options: a key of `learners.LEARNERS`, and its options by name, as its class explains them.
        scope: `layer` ranks each layer by itself, `global` all layers together.
        include, exclude: glob patterns on module names; a pattern that matches a module covers all within it.
        others, norm: `train` makes what is not masked trainable; or scales and biases of normalisation layers alone.
        architecture: what `save` shall record, such as `timm/resnet50`; `build` has recorded it already.

    Returns:
        `model` itself, or the swapped layer if `model` is a layer, or the network of that name.

    Raises:
        ConversionError: a bad argument; a layer would keep nothing; it was converted with other settings.
        NothingToConvert: there is no layer to mask, or the patterns leave none.
        UnknownName: no such scheme, learner or architecture.
    """
    return convert_as_given(model, given_in(locals()), architecture)[0]


def convert_as_given(
    model: nn.Module | str | Architecture, given: Mapping[str, Any], architecture: Architecture | str | None = None
) -> tuple[nn.Module, Plan]:
    """As `convert`, for the settings that a caller gave; and the plan that it followed, the only one it made."""
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise ConversionError(f"architecture is {architecture!r}; expected a name such as 'timm/resnet50'")
    if torch.is_inference_mode_enabled():
        raise ConversionError("convert was called under torch.inference_mode, where its scores could never learn")
    if isinstance(architecture, str):
        architecture = architecture_of(architecture)
    if isinstance(model, str | Architecture):
        model, planned = _build(model, given)
    else:
        planned = plan_as_given(model, given)
    core = unwrap(model)
    # whoever let `build` make the network knows that its weights were random
    level = logging.WARNING if origin_of(core).architecture is None else logging.INFO
    apply(core, planned)
    _synchronise(model)
    if architecture is not None:
        note_origin(core, architecture=architecture)
    _tell(planned, level)
    return model, planned


def _build(described: str | Architecture, given: Mapping[str, Any]) -> tuple[nn.Module, Plan]:
    """The network of that name and the plan for it: whatever conversion will not fill is initialised."""
    architecture = architecture_of(described) if isinstance(described, str) else described
    settings = MaskingSettings.of(given)
    if is_pretrained(settings.scheme):
        model = build(f"{architecture.library}/{architecture.name}", pretrained=True, **architecture.kwargs)
        return model, plan_as_given(model, given)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model, blank = build_uninitialised(architecture)
        planned = plan_as_given(model, given)
        left = {other.key for other in planned.rest if other.treatment.action == "left"}
        if any(place.key in left and blank.is_blank(place.tensor) for place in places_of(model)):
            torch.manual_seed(settings.seed)
            model = build_architecture(architecture)
    return model, planned


def _tell(planned: Plan, level: int) -> None:
    """Log what was lost, and which weights are not masked."""
    if drawn := sum(source_of(weight.distribution).drawn for weight in planned.masked):
        if drawn < len(planned.masked):
            level = logging.WARNING  # a head that was trained, perhaps
        seed = planned.settings.seed
        log.log(level, "the weights of %d layers were drawn anew from seed %d; what they were is gone", drawn, seed)
    if (coverage := planned.coverage).of_weights < 0.99:
        log.warning(
            "%.0f %% of the weights are not masked: %s", 100 * (1 - coverage.of_weights), ", ".join(coverage.missed)
        )


def _synchronise(model: nn.Module) -> None:
    """Let DistributedDataParallel around a network that was wrapped first know what is trained now."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            renew_reducer(module)
