"""Turn a network into a hidden one: `convert` makes a plan and applies it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Never

import torch
from torch import nn

from ..errors import ConversionError, some
from ..models.architecture import Architecture, note_origin, origin_of
from ..models.build import build, build_architecture, build_uninitialised
from ..models.libraries import architecture_and_tag, architecture_of
from ..torch_compat import renew_reducer
from ..weights import is_pretrained
from ..weights.source import source_of
from .apply import apply
from .plan import Plan
from .planning import plan_as_given
from .settings import DEFAULT, Choice, MaskingSettings, Patterns, Schemes, Scope, Shares, given_in
from .unmasked import FROZEN
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
    pattern: str | None = DEFAULT.pattern,
    scope: Scope = DEFAULT.scope,
    floor: float | None = DEFAULT.floor,
    fixed: Mapping[str, float] | None = DEFAULT.fixed,
    include: Patterns = DEFAULT.include,
    exclude: Patterns = DEFAULT.exclude,
    others: Choice = DEFAULT.others,
    norm: Choice = DEFAULT.norm,
    train: Patterns = DEFAULT.train,
    architecture: Architecture | str | None = None,
    **unknown: Never,
) -> nn.Module:
    """Turn a network into a hidden one, in place: frozen random weights, each with a score that training changes.

    Afterwards, masks cover the weights of Conv, ConvTranspose and Linear layers and of their subclasses, the packed
    projections of attention, the weights of LSTM, GRU and RNN, and those of timm's CondConv2d and transformers' Conv1D.
    docs/surgery.md describes what happens to everything else. Only the scores require a gradient; they are float32, of
    their weight's shape. Method: "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, sections 3 and 4.

    If the network is converted already, only its new layers are masked, for example after `reset_classifier`. They get
    the same settings.

    Args:
        model: any network or single layer, which may be wrapped by DDP or `torch.compile`; or the name of a network as
            for `build`, or an `Architecture`. A named network is built without its own initialisation, which would take
            most of the time.
        k: share of each layer's weights that is kept, in (0, 1]; or shares by glob pattern on layer names. The last
            pattern that matches counts; a layer that none matches gets the default. Or a rule that spreads one share of
            the network over its layers: `{"rule": "erk", "k": 0.1}`, with `uniform`, `erk`, `balanced` or `fan`
            (docs/methods.md); patterns beside it set the share of single layers. Learners whose scores decide how many
            weights are kept, such as `supermask`, take no k.
        scheme: how weights are made: a key of `weights.SCHEMES`, such as `kaiming_normal`, for random ones; or
            `pretrained`, which leaves weights unchanged (Piggyback, Mallya et al., ECCV 2018), except those to mask for
            which `build` found no pretrained values; or schemes by pattern, as for k.
        scaled: whether random weights are multiplied by √(1/k), which keeps the variance of a layer's output.
        seed: the seed of random weights and initial scores, 0 … 2⁶⁴ − 1.
        learner, learner_options: how scores become a mask and are trained: a key of `learners.LEARNERS`, and options of
            that learner by name, documented in its class. With the one scheme `pretrained`, and neither a learner nor
            k, the learner is `piggyback`, which starts with the whole pretrained network.
        pattern: `2:4` keeps the 2 weights with the largest |score| of each 4 neighbours, in place of a share of the
            layer; likewise any N:M with 1 ≤ N < M ≤ 16. Neighbours are consecutive input channels of one output and one
            kernel position. Where the channels do not divide by M, a remainder of r keeps ⌈r·N/M⌉. It sets k to N/M.
        scope: `layer` ranks each layer by itself, `global` ranks all layers together.
        floor: with `scope="global"`, what each layer keeps at least, so that none loses all of its weights: a share
            below 1 of its weights, or a number of weights from 1.
        fixed: shares of each layer's weights that the seed fixes before training, such as
            `{"dropped": 0.5, "kept": 0.1}`; either may be left out. The scores choose among the others alone, and a
            file has bits for these alone. k is still the share of all weights, from `kept` to 1 − `dropped` (Otsuka et
            al., TMLR).
        include, exclude: glob patterns on module names. A pattern that matches a module covers all modules inside it.
            A layer that came frozen, in a network that did not, stays as it is unless `include` names it.
        others, norm: `train` makes unmasked parameters trainable: with `others` all of them, with `norm` only the
            scales and biases of normalisation layers.
        train: glob patterns on names of modules and parameters, such as `fc`, `*.bias` or `layer4.1.bn2.weight`: what
            they match is trained and stored. A pattern that matches a module covers all parameters inside it. A weight
            that one matches is not masked; it keeps its values and is trained. By default, `piggyback` trains the
            layers that `build` found no pretrained weights for, such as a new head, unless `include` or a pattern of
            `scheme` names them; if `train` is given, its patterns alone count, so `[]` has such layers masked.
        architecture: the name that `save` records, such as `torchvision/resnet50`. Networks from `build` and from timm
            bring theirs with them; those from torchvision do not.

    Returns:
        `model` itself; or the masked layer if `model` is a layer; or the network of that name.

    Raises:
        ConversionError: an argument is bad, a layer would keep no weights, or the network was converted with other
            settings.
        NothingToConvert: there is no layer to mask, or the patterns leave none.
        UnknownName: there is no such scheme, learner or architecture.
    """
    return convert_as_given(model, given_in(locals()), architecture)[0]


def convert_as_given(
    model: nn.Module | str | Architecture, given: Mapping[str, Any], architecture: Architecture | str | None = None
) -> tuple[nn.Module, Plan]:
    """Do what `convert` does, with the settings that a caller gave. Return the network and the plan it followed."""
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise ConversionError(f"architecture is {architecture!r}; expected a name such as 'timm/resnet50'")
    if torch.is_inference_mode_enabled():
        raise ConversionError(
            "convert was called under torch.inference_mode, where scores cannot learn; call it outside"
        )
    if isinstance(architecture, str):
        architecture = architecture_of(architecture)
    if isinstance(model, str | Architecture):
        model, planned = _build(model, given)
    else:
        planned = plan_as_given(model, given)
    core = unwrap(model)
    # who had the network made by `build` knows that its weights were random
    level = logging.WARNING if origin_of(core).architecture is None else logging.INFO
    apply(core, planned)
    _synchronise(model)
    if architecture is not None:
        note_origin(core, architecture=architecture)
    _tell(planned, level)
    return model, planned


def _build(described: str | Architecture, given: Mapping[str, Any]) -> tuple[nn.Module, Plan]:
    """Build the described network and plan its conversion. All that conversion does not fill is initialised."""
    architecture, tag = architecture_and_tag(described) if isinstance(described, str) else (described, "")
    name, settings = f"{architecture.library}/{architecture.name}", MaskingSettings.of(given)
    if is_pretrained(settings.scheme):
        with seeded(settings.seed):
            model = build(name, pretrained=tag or True, **architecture.kwargs)
        return model, plan_as_given(model, given)
    if tag:
        raise ConversionError(
            f"{described} names the pretrained weights {tag}, which the scheme {settings.scheme} would replace; "
            f"expected {name}, or scheme='pretrained'"
        )
    with seeded(settings.seed):
        model, blank = build_uninitialised(architecture)
        planned = plan_as_given(model, given)
        left = {other.key for other in planned.rest if other.treatment.action == "left"}
        if any(place.key in left and blank.is_blank(place.tensor) for place in places_of(model)):
            torch.manual_seed(settings.seed)
            model = build_architecture(architecture)
    return model, planned


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager: what is random in a network that is built, such as a new head, follows from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _tell(planned: Plan, level: int) -> None:
    """Log which layers lost their weights, and which weights are not masked."""
    if drawn := [weight.key for weight in planned.masked if source_of(weight.distribution).drawn]:
        if len(drawn) < len(planned.masked):
            level = logging.WARNING  # perhaps a trained head was replaced
        log.log(
            level,
            "replaced the weights of %d layer%s with random ones (seed %d): %s",
            len(drawn),
            "s" * (len(drawn) != 1),
            planned.settings.seed,
            some(drawn),
        )
    if frozen := [other.key for other in planned.rest if other.treatment == FROZEN and not other.done]:
        log.warning("left as they came, frozen: %s; name a layer in include to mask it", some(frozen))
    if (coverage := planned.coverage).of_weights < 0.99:
        log.warning(
            "%.0f %% of the weights are not masked: %s", 100 * (1 - coverage.of_weights), ", ".join(coverage.missed)
        )


def _synchronise(model: nn.Module) -> None:
    """Tell DistributedDataParallel which parameters are trained now, if the network was wrapped before conversion."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            renew_reducer(module)
