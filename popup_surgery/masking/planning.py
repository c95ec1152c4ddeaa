"""What conversion will do to a network: matched first, printed if asked for, and nothing touched."""

import fnmatch
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypedDict, Unpack, cast

from torch import Tensor, nn

from ..errors import ConversionError, NothingToConvert, nearest
from ..learners import get_learner
from ..models.build import FRESH, KWARGS
from ..models.layer_types import Fans, kind_of
from ..selection import kept_count
from ..weights import BASE, PRETRAINED, get_scheme
from ..weights.streams import check_seed
from .layer import Slot, score_name, slots_of
from .unmasked import Treatment, is_norm, treatment

Patterns = str | Sequence[str] | None
Shares = float | Mapping[str, float]
Schemes = str | Mapping[str, str]

SETTINGS = "_popup_settings"
CONVERTED = "_popup_converted"


class Settings(TypedDict, total=False):
    """The keyword arguments of `convert` and `plan`, which explain them; a converted network keeps its own."""

    scheme: Schemes
    scaled: bool
    seed: int
    learner: str
    learner_options: Mapping[str, Any]
    scope: Literal["layer", "global"]
    include: Patterns
    exclude: Patterns
    others: Literal["frozen", "train"]
    norm: Literal["frozen", "train"]


DEFAULTS: dict[str, Any] = {
    "k": 0.3,
    "scheme": "signed_kaiming_constant",
    "scaled": True,
    "seed": 0,
    "learner": "edge_popup",
    "learner_options": {},
    "scope": "layer",
    "include": None,
    "exclude": None,
    "others": "frozen",
    "norm": "frozen",
}
WITHOUT_K = {"k": None, "scaled": False, "scope": "layer"}  # what learners that take no k allow
_WORDS = {"scope": ("layer", "global"), "others": ("frozen", "train"), "norm": ("frozen", "train")}


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that will be masked.

    Attributes:
        key: its `state_dict` key, the first of several; its stream's name.
        layer: its layer's class.
        shape: of the weight and of its scores.
        k, kept: the share asked for, and the number of weights that gives (`scope="global"` spreads the sum freely);
            None where the learner takes no k.
        scheme, distribution, std: where its values come from; of pretrained ones the distribution is `base`, std 0.
        fan_in: inputs summed into one output.
        owners: every (module, parameter name) that holds it.
    """

    key: str
    layer: str
    shape: tuple[int, ...]
    k: float | None
    kept: int | None
    scheme: str
    distribution: str
    std: float
    fan_in: float
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedRest:
    """One parameter that will not be masked.

    Attributes:
        key, shape, owner: its `state_dict` key, its shape, and the (module, parameter name) that holds it.
        treatment: what becomes of it, or became of it where it is `done`.
        train: whether it is trained.
        done: an earlier conversion saw its module.
    """

    key: str
    shape: tuple[int, ...]
    owner: tuple[nn.Module, str]
    treatment: Treatment
    train: bool
    done: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Coverage:
    """A network's parameters by what becomes of them: numbers of elements by `state_dict` key.

    `left` ones keep the values that they have. `missed` are those of them that look like weights, with two dimensions
    or more above 1, and that no kind of layer claims.
    """

    masked: dict[str, int]
    generated: dict[str, int]
    constant: dict[str, int]
    left: dict[str, int]
    missed: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters, each once."""
        return sum(sum(group.values()) for group in (self.masked, self.generated, self.constant, self.left))

    def share(self, group: str) -> float:
        """The share of all parameters in `masked`, `generated`, `constant` or `left`: 0 … 1."""
        return sum(getattr(self, group).values()) / max(self.total, 1)

    @property
    def of_weights(self) -> float:
        """The share of weights that are masked: those masked and those missed make up the whole."""
        masked, missed = sum(self.masked.values()), sum(self.missed.values())
        return masked / max(masked + missed, 1)

    def __str__(self) -> str:
        groups = ("masked", "generated", "constant", "left")
        return ", ".join(f"{name} {self.share(name):.2%}" for name in groups) + f" of {self.total:,} parameters"


@dataclass(frozen=True)
class Plan:
    """What `convert` will do to a network, printable as a table.

    Attributes:
        masked: the weights to be masked, in `state_dict` order.
        rest: all other parameters.
        before: elements of the weights that are masked already, by `state_dict` key.
        settings: all arguments of `convert`.
    """

    masked: tuple[PlannedWeight, ...]
    rest: tuple[PlannedRest, ...]
    before: dict[str, int]
    settings: dict[str, Any]

    @property
    def weights(self) -> int:
        """How many weights are to be masked."""
        return sum(weight.numel for weight in self.masked)

    @property
    def kept(self) -> int:
        """How many of them take part, as far as k says so."""
        return sum(weight.kept or 0 for weight in self.masked)

    @property
    def coverage(self) -> Coverage:
        """What becomes of each parameter, in numbers."""
        groups: dict[str, dict[str, int]] = {"constant": {}, "generated": {}, "left": {}}
        for other in self.rest:
            groups[other.treatment.action][other.key] = other.numel
        missed = {
            other.key: other.numel
            for other in self.rest
            if other.treatment.action == "left" and sum(size > 1 for size in other.shape) > 1
        }
        masked = self.before | {weight.key: weight.numel for weight in self.masked}
        return Coverage(masked, **groups, missed=missed)

    def totals(self) -> str:
        """The totals in three lines."""
        rest = sum(other.numel for other in self.rest)
        settings, coverage = self.settings, self.coverage
        scheme = settings["scheme"]
        schemes = scheme if isinstance(scheme, str) else ", ".join(f"{p}: {name}" for p, name in scheme.items())
        if settings["scaled"] and (not self.masked or any(weight.distribution != BASE for weight in self.masked)):
            schemes += ", scaled"
        before = f", {len(self.before)} masked before" if self.before else ""
        kept = f"{self.kept:,} kept ({self.kept / max(self.weights, 1):.1%})"
        if settings["k"] is None:
            kept = "as many kept as the scores say"
        return (
            f"{len(self.masked)} layers masked, {self.weights:,} weights, {kept}{before}\n"
            f"{len(self.rest)} tensors not masked, {rest:,} parameters; {coverage.share('masked'):.2%} of all "
            "parameters are masked\n"
            f"{schemes}, seed {settings['seed']}, {settings['learner']}, "
            f"ranked {'over all layers' if settings['scope'] == 'global' else 'layer by layer'}"
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        headings = "layer", "class", "shape", "weights", "kept", "fan_in", "std"
        table = Table(*headings, box=None, header_style="")
        for weight in self.masked:
            shape = " × ".join(map(str, weight.shape))
            std = "pretrained" if weight.distribution == BASE else f"{weight.std:.5g}"
            kept = "" if weight.kept is None else f"{weight.kept:,}"
            numbers = f"{weight.numel:,}", kept, f"{weight.fan_in:g}", std
            table.add_row(weight.key, weight.layer, shape, *numbers)
        for column in table.columns[3:]:
            column.justify = "right"
        left = Table("not masked", "shape", "becomes", "because", box=None, header_style="")
        for other in self.rest:
            action, value = other.treatment.action, other.treatment.value
            becomes = {"constant": f"{value:g}", "generated": f"normal, std {value:g}", "left": "stays"}[action]
            becomes += ", trained" if other.train else ", frozen" if action == "left" else ""
            left.add_row(other.key, " × ".join(map(str, other.shape)), becomes, other.treatment.why)
        longest = max(len(key) for key in [*(w.key for w in self.masked), *(r.key for r in self.rest), ""])
        console = Console(file=io.StringIO(), width=longest + 120, color_system=None)
        tables = ([table] if self.masked else []) + ([left] if self.rest else [])
        console.print(*tables, f"{self.coverage}\n{self.totals()}", sep="\n", highlight=False)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


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
        return _plan(core, _checked(given), first=True)
    for name, value in ((name, _own(value)) for name, value in given.items()):
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


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and `torch.compile` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def masked_weights(core: nn.Module) -> Iterator[tuple[str, nn.Module, str, Slot]]:
    """Each masked weight once: its first `state_dict` key, its layer, its parameter's name and its slot."""
    seen = set()
    for prefix, module in core.named_modules():
        for name, slot in slots_of(module).items():
            if id(module._parameters[name]) not in seen:
                seen.add(id(module._parameters[name]))
                yield f"{prefix}.{name}" if prefix else name, module, name, slot


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """All settings, each of its type; a k or a scheme without a pattern for the rest has the default there."""
    settings = DEFAULTS | given
    if not get_learner(settings["learner"], settings["learner_options"]).takes_k:
        for name, expected in WITHOUT_K.items():
            if given.get(name, expected) != expected:
                raise ConversionError(
                    f"{name} is {given[name]!r}; expected {expected!r}; {settings['learner']} takes no k, its scores "
                    "decide what is kept"
                )
        settings |= WITHOUT_K
    k = settings["k"]
    for name, words in _WORDS.items():
        if settings[name] not in words:
            raise ConversionError(f"{name} is {settings[name]!r}; expected {' or '.join(map(repr, words))}")
    for pattern, share in _by_pattern(settings, "k").items() if k is not None else ():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
            where = f" for {pattern!r}" if isinstance(k, Mapping) else ""
            raise ConversionError(f"k{where} is {share!r}; expected a number above 0 and up to 1, the share kept")
    for name in _by_pattern(settings, "scheme").values():
        if name != PRETRAINED:
            get_scheme(name)
    if settings["scope"] == "global" and len(set(_by_pattern(settings, "k").values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")
    if settings["scope"] == "global":
        k = next(iter(_by_pattern(settings, "k").values()))
    return {name: _own(value) for name, value in settings.items()} | {
        "k": _own(k),
        "seed": check_seed(settings["seed"]),
    }


def _own(value: Any) -> Any:
    """A copy that no caller can change later, equal for equal patterns."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def _by_pattern(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The setting `name` by glob pattern, `*` first unless it is given elsewhere."""
    value = settings[name]
    if not isinstance(value, Mapping):
        return {"*": value}
    for pattern in value:
        if not isinstance(pattern, str):
            raise ConversionError(f"{name} has the key {pattern!r}; expected a glob pattern on layer names")
    return dict(value) if "*" in value else {"*": DEFAULTS[name], **value}


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
            _check_patterns([p for p in _by_pattern(settings, what) if p != "*"], layers, what)
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
    kind = kind_of(module)
    if kind is None:
        return {}
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        raise ConversionError(f"{name or 'the root'} is lazy and has no shape yet; pass one batch through the network")
    scores = {score_name(p) for p in slots_of(module)}
    found = {p: fan for p, fan in kind.weights(module).items() if p not in scores}
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
    shares, schemes = _by_pattern(settings, "k"), _by_pattern(settings, "scheme")
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
                how = done.get(parameter, Treatment("left", "came into the module after its conversion"))
            elif PRETRAINED in schemes.values() and not drawn:
                how = Treatment("left", "pretrained")
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
        distribution, std, fan = BASE, 0.0, chosen[layer]
        if scheme != PRETRAINED:
            source = get_scheme(scheme)
            distribution = source.distribution
            std = source.std(fan.fan_in, fan.fan_out, share or 1.0, settings["scaled"])
        elif get_learner(settings["learner"], settings["learner_options"]).rescale:
            raise ConversionError(
                f"{settings['learner']}: rescale is True, and {key} is pretrained, which no file could hold rescaled"
            )
        cls, shape, held_by = type(module).__name__, tuple(tensor.shape), tuple((m, p) for _, m, p in held)
        weights.append(PlannedWeight(key, cls, shape, share, kept, scheme, distribution, std, fan.fan_in, held_by))
    total = sum(weight.numel for weight in weights) + sum(before.values())
    if settings["scope"] == "global" and kept_count(total, shares["*"]) == 0:
        raise ConversionError(f"k={shares['*']!r} keeps none of the network's {total:,} weights")
    return Plan(tuple(weights), tuple(rest), before, settings)


def _scheme(layer: str, schemes: dict[str, str], fresh: Sequence[str]) -> str:
    """The scheme of a layer; one that pretrained weights lacked is drawn, unless a pattern of its own says else."""
    pattern = [pattern for pattern in schemes if _matches(layer, pattern)][-1]
    new = layer in fresh and pattern == "*" and schemes[pattern] == PRETRAINED
    return DEFAULTS["scheme"] if new else schemes[pattern]
