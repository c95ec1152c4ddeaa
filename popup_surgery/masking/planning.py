"""What conversion will do to a network: matched first, printed if asked for, and nothing touched."""

import fnmatch
from collections.abc import Sequence
from typing import Any, Unpack, cast

from torch import Tensor, nn

from ..errors import ConversionError, NothingToConvert, nearest
from ..learners import get_learner
from ..models.architecture import FRESH, KWARGS
from ..models.layer_types import Fans, layer_type_of
from ..selection import kept_count
from ..weights import PRETRAINED
from ..weights.source import source_of_scheme
from .plan import Plan, PlannedRest, PlannedWeight
from .ranking import score_name
from .settings import DEFAULTS, Patterns, Settings, Shares, by_pattern, checked, own_copy
from .state import CONVERTED, SETTINGS, slots_of
from .unmasked import UnmaskedRule, is_norm, treatment
from .walk import masked_weights, unwrap


def plan(model: nn.Module, k: Shares | None = None, **settings: Unpack[Settings]) -> Plan:
    """What `convert` with the same arguments would do. Touches nothing; works on the meta device.

    Raises:
        ConversionError, NothingToConvert, UnknownName: as `convert`.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model is {model!r}; expected a torch.nn.Module, or for convert also a network's name")
    core = unwrap(model)
    given = {**settings, **({} if k is None else {"k": k})}
    if unknown := given.keys() - DEFAULTS.keys():
        hint = "build takes it" if min(unknown) in KWARGS else f"the nearest: {nearest(min(unknown), DEFAULTS)}"
        raise TypeError(f"convert has no argument {min(unknown)!r}; {hint}")
    before = core.__dict__.get(SETTINGS)
    if before is None:
        return _plan(core, checked(given), first=True)
    for name, value in ((name, own_copy(value)) for name, value in given.items()):
        if value != before[name]:
            raise ConversionError(
                f"the network was converted with {name}={before[name]!r}, which {value!r} cannot change; "
                "bake it, or convert another copy"
            )
    return _plan(core, before, first=False)


def unconverted(core: nn.Module) -> list[str]:
    """Weights that came into a converted network after its conversion and that are not masked, by `state_dict` key."""
    found = []
    for prefix, module in core.named_modules():
        if (settings := module.__dict__.get(SETTINGS)) is not None:
            fans = _fans(module)
            for name, parameter in _chosen(fans, settings, check=False):
                if parameter not in slots_of(module.get_submodule(name)):
                    found.append(".".join(filter(None, (prefix, name, parameter))))
    return found


def _fans(core: nn.Module) -> dict[tuple[str, str], Fans]:
    return {(name, p): f for name, module in core.named_modules() for p, f in _maskable(name, module).items()}


def _chosen(fans: dict[tuple[str, str], Fans], settings: dict[str, Any], check: bool) -> dict[tuple[str, str], Fans]:
    """Of all weights that could be masked those that the settings' patterns choose."""
    layers = [name for name, _ in fans]
    patterns = {what: settings[what] for what in ("include", "exclude") if settings[what] is not None}
    if check:
        for what, given in patterns.items():
            _check_patterns(given, layers, what)
        for what in ("k", "scheme"):
            _check_patterns([p for p in by_pattern(settings, what) if p != "*"], layers, what)
    include, exclude = (_several(settings[what]) for what in ("include", "exclude"))
    chosen = {
        (name, parameter): fan
        for (name, parameter), fan in fans.items()
        if (settings["include"] is None or any(_matches(name, pattern) for pattern in include))
        and not any(_matches(name, pattern) for pattern in exclude)
    }
    if check and not chosen:
        raise NothingToConvert(
            f"include={settings['include']!r} and exclude={settings['exclude']!r} leave none of {len(layers)} layers"
        )
    return chosen


def _check_patterns(given: Any, layers: list[str], what: str) -> None:
    patterns = _several(given)
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConversionError(f"{what} is {given!r}; expected glob patterns on module names")
    for pattern in patterns:
        if not any(_matches(layer, pattern) for layer in layers):
            raise ConversionError(
                f"{what} has {pattern!r}, which matches no layer; nearest: {nearest(pattern, layers)}"
            )


def _several(patterns: Patterns) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns or ()


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches the module `name` or one that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _last_match(name: str, by_pattern: dict[str, Any]) -> Any:
    return [value for pattern, value in by_pattern.items() if _matches(name, pattern)][-1]


def _maskable(name: str, module: nn.Module) -> dict[str, Fans]:
    layer_type = layer_type_of(module)
    if layer_type is None:
        return {}
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        raise ConversionError(f"{name or 'the root'} is lazy and has no shape yet; pass one batch through the network")
    scores = {score_name(p) for p in slots_of(module)}
    found = {p: fan for p, fan in layer_type.weights(module).items() if p not in scores}
    return {p: fan for p, fan in found.items() if _is_weight(f"{name}.{p}", module._parameters.get(p))}


def _is_weight(key: str, tensor: Tensor | None) -> bool:
    """Whether there is such a weight, of floating values; `ConversionError` if its values could not be replaced."""
    if tensor is None or not tensor.numel() or not tensor.is_floating_point():
        return False
    if tensor.is_inference():
        raise ConversionError(f"{key} was made under torch.inference_mode; build the network outside it")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ConversionError(f"{key} is an expanded tensor, whose elements share memory; make it contiguous first")
    return True


def _plan(core: nn.Module, settings: dict[str, Any], first: bool) -> Plan:
    fans = _fans(core)
    if not fans and first:
        raise NothingToConvert(
            f"{type(core).__name__} has no layer whose weight could be masked (Conv, Linear, attention, recurrent)"
        )
    chosen = _chosen(fans, settings, check=first)
    layers = {name for name, _ in chosen}
    shares, schemes = by_pattern(settings, "k"), by_pattern(settings, "scheme")
    fresh = core.__dict__.get(FRESH, ()) if first else tuple(layers)
    before = {key: module._parameters[name].numel() for key, module, name, _ in masked_weights(core)}  # type: ignore[union-attr]
    if before and first and settings["scope"] == "global":
        raise ConversionError(f"scope='global' ranks all layers together, and {len(before)} are masked already")

    masked = {
        id(module._parameters[held])
        for module in core.modules()
        for weight in slots_of(module)
        for held in (weight, score_name(weight))
    }
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in core.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in masked:
                owners.setdefault(id(tensor), []).append((name, module, parameter))
    weights, rest = [], []
    for held in owners.values():
        name, module, parameter = held[0]
        tensor = cast(Tensor, module._parameters[parameter])
        key = f"{name}.{parameter}" if name else parameter
        layer = next(((n, p) for n, _, p in held if (n, p) in chosen), None)
        if layer is None:
            drawn = any(n in layers and _scheme(n, schemes, fresh) != PRETRAINED for n, _, _ in held)
            done = module.__dict__.get(CONVERTED)
            if done is not None:
                how = done.get(parameter, UnmaskedRule("left", "came into the module after its conversion"))
            elif PRETRAINED in schemes.values() and not drawn:
                how = UnmaskedRule("left", "pretrained")
            else:  # a bias may belong to several modules, of which one is masked
                owner = next(((m, p) for n, m, p in held if n in layers), (module, parameter))
                how = treatment(*owner, swapped=any(n in layers for n, _, _ in held))
            of_norm = is_norm(module) and parameter in ("weight", "bias")
            train = settings["others"] == "train" or (settings["norm"] == "train" and of_norm)
            train = train and tensor.is_floating_point()
            rest.append(PlannedRest(key, tuple(tensor.shape), (module, parameter), how, train, done is not None))
            continue
        share = _last_match(layer[0], shares)
        share = share if share is None else float(share)
        kept = None if share is None else kept_count(tensor.numel(), share)
        if kept == 0 and settings["scope"] == "layer":
            raise ConversionError(f"k={share!r} keeps none of the {tensor.numel():,} weights of {key}")
        scheme = _scheme(layer[0], schemes, fresh)
        fan = chosen[layer]
        source, std = source_of_scheme(scheme, fan.fan_in, fan.fan_out, share or 1.0, settings["scaled"])
        if not source.drawn and get_learner(settings["learner"], settings["learner_options"]).rescale:
            raise ConversionError(
                f"{settings['learner']}: rescale is True, and {key} is pretrained, which no file could hold rescaled"
            )
        cls, shape, held_by = type(module).__name__, tuple(tensor.shape), tuple((m, p) for _, m, p in held)
        weights.append(
            PlannedWeight(key, cls, shape, share, kept, scheme, source.distribution, std, fan.fan_in, held_by)
        )
    total = sum(weight.numel for weight in weights) + sum(before.values())
    if settings["scope"] == "global" and kept_count(total, shares["*"]) == 0:
        raise ConversionError(f"k={shares['*']!r} keeps none of the network's {total:,} weights")
    return Plan(tuple(weights), tuple(rest), before, settings)


def _scheme(layer: str, schemes: dict[str, str], fresh: Sequence[str]) -> str:
    """The scheme of a layer; one that pretrained weights lacked is drawn, unless a pattern of its own says else."""
    pattern = [pattern for pattern in schemes if _matches(layer, pattern)][-1]
    new = layer in fresh and pattern == "*" and schemes[pattern] == PRETRAINED
    return DEFAULTS["scheme"] if new else schemes[pattern]
