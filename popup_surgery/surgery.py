"""Turn a network into a hidden one and back: `plan` looks, `convert` does as planned, `bake` ends in plain layers."""

import copy
import fnmatch
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from . import zoo
from .errors import ConversionError, NothingToConvert, nearest
from .filling import fill
from .kinds import Fans, kind_of
from .layers import Ranking, Slot, drop_hooks, is_masked, score_name, slots_of, swap, unswap
from .learners import get_learner
from .rest import GENERATED, Generated, Treatment, treatment
from .selection import kept_count
from .streams import check_seed, draw
from .weights import get_scheme
from .zoo import DESCRIPTION, Architecture

DEFAULT_K = 0.3
Patterns = str | Sequence[str] | None
Shares = float | Mapping[str, float]

log = logging.getLogger("popup_surgery")


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that will be masked.

    Attributes:
        key: its `state_dict` key, the first of several; its stream's name.
        layer: its layer's class.
        shape: of the weight and of its scores.
        k, kept: the share asked for, and the number of weights that gives (`scope="global"` spreads the sum freely).
        fan_in, std: inputs summed into one output; standard deviation of the weights.
        owners: every (module, parameter name) that holds it.
    """

    key: str
    layer: str
    shape: tuple[int, ...]
    k: float
    kept: int
    fan_in: float
    std: float
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedRest:
    """One parameter that will not be masked: its `state_dict` key, shape, owner, and what becomes of it."""

    key: str
    shape: tuple[int, ...]
    owner: tuple[nn.Module, str]
    treatment: Treatment

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What `convert` will do to a network, printable as a table.

    Attributes:
        masked: the weights to be masked, in `state_dict` order.
        rest: all other parameters.
        scheme, scaled, seed, learner, scope: as given to `convert`.
    """

    masked: tuple[PlannedWeight, ...]
    rest: tuple[PlannedRest, ...]
    scheme: str
    scaled: bool
    seed: int
    learner: str
    scope: str

    @property
    def weights(self) -> int:
        """How many weights are masked."""
        return sum(weight.numel for weight in self.masked)

    @property
    def kept(self) -> int:
        """How many of them take part."""
        return sum(weight.kept for weight in self.masked)

    def totals(self) -> str:
        """The totals in three lines."""
        rest = sum(other.numel for other in self.rest)
        share = self.weights / max(self.weights + rest, 1)
        return (
            f"{len(self.masked)} layers masked, {self.weights:,} weights, {self.kept:,} kept "
            f"({self.kept / self.weights:.1%})\n"
            f"{len(self.rest)} tensors not masked, {rest:,} parameters; {share:.2%} of all parameters are masked\n"
            f"{self.scheme}{', scaled' if self.scaled else ''}, seed {self.seed}, {self.learner}, "
            f"ranked {'over all layers' if self.scope == 'global' else 'layer by layer'}"
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "layer",
            "class",
            "shape",
            "weights",
            "kept",
            "fan_in",
            "std",
            box=None,
            header_style="",
        )
        for weight in self.masked:
            shape = " × ".join(map(str, weight.shape))
            numbers = f"{weight.numel:,}", f"{weight.kept:,}", f"{weight.fan_in:g}", f"{weight.std:.5g}"
            table.add_row(weight.key, weight.layer, shape, *numbers)
        for column in table.columns[3:]:
            column.justify = "right"
        left = Table("not masked", "shape", "becomes", "because", box=None, header_style="")
        for other in self.rest:
            action, value = other.treatment.action, other.treatment.value
            becomes = {"constant": f"{value:g}", "generated": f"normal, std {value:g}", "left": "stays, frozen"}[action]
            left.add_row(other.key, " × ".join(map(str, other.shape)), becomes, other.treatment.why)
        longest = max(len(key) for key in [*(w.key for w in self.masked), *(r.key for r in self.rest)])
        console = Console(file=io.StringIO(), width=longest + 120, color_system=None)
        console.print(table, *([left] if self.rest else []), self.totals(), sep="\n", highlight=False)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def plan(
    model: nn.Module,
    k: Shares = DEFAULT_K,
    *,
    scheme: str = "signed_kaiming_constant",
    scaled: bool = True,
    seed: int = 0,
    learner: str = "edge_popup",
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> Plan:
    """What `convert` with the same arguments would do. Touches nothing; works on the meta device.

    Raises:
        ConversionError, NothingToConvert, UnknownName: as `convert`.
    """
    core = unwrap(model)
    get_learner(learner)
    weight_scheme, seed = get_scheme(scheme), check_seed(seed)
    if scope not in ("layer", "global"):
        raise ConversionError(f"scope is {scope!r}; expected 'layer' or 'global'")
    shares = {"*": k} if not isinstance(k, Mapping) else dict(k) if "*" in k else {"*": DEFAULT_K, **k}
    for pattern, share in shares.items():
        if not isinstance(pattern, str):
            raise ConversionError(f"k has the key {pattern!r}; expected a glob pattern on layer names")
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            where = f" for {pattern!r}" if isinstance(k, Mapping) else ""
            raise ConversionError(f"k{where} is {share!r}; expected a number above 0 and up to 1, the share kept")
    if scope == "global" and len(set(shares.values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")

    modules = list(core.named_modules())
    if masked := [name or "the root" for name, module in modules if is_masked(module)]:
        raise ConversionError(
            f"the network is converted already: {masked[0]} and {len(masked) - 1} more layers are masked; bake it first"
        )
    fans = {(name, p): f for name, module in modules for p, f in _maskable(name, module).items()}
    if not fans:
        raise NothingToConvert(f"{type(core).__name__} has no Conv or Linear layer whose weight could be masked")
    layers = [name for name, _ in fans]
    chosen = {
        name
        for name in layers
        if (include is None or _any_match(name, include, layers, "include"))
        and not (exclude is not None and _any_match(name, exclude, layers, "exclude"))
    }
    if not chosen:
        raise NothingToConvert(f"include={include!r} and exclude={exclude!r} leave none of {len(layers)} layers")
    for pattern in shares.keys() - {"*"}:
        _any_match(layers[0], pattern, layers, "k")

    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in modules:
        for parameter, tensor in module._parameters.items():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((name, module, parameter))
    weights, rest = [], []
    for held in owners.values():
        name, module, parameter = held[0]
        tensor = module._parameters[parameter]
        assert tensor is not None
        key = f"{name}.{parameter}" if name else parameter
        layer = next(((n, p) for n, _, p in held if n in chosen and (n, p) in fans), None)
        if layer is None:
            how = treatment(module, parameter, tensor, swapped=name in chosen)
            rest.append(PlannedRest(key, tuple(tensor.shape), (module, parameter), how))
            continue
        share = [float(share) for pattern, share in shares.items() if _matches(layer[0], pattern)][-1]
        kept = kept_count(tensor.numel(), share)
        if kept == 0 and scope == "layer":
            raise ConversionError(f"k={share!r} keeps none of the {tensor.numel():,} weights of {key}")
        fan = fans[layer]
        std = weight_scheme.std(fan.fan_in, fan.fan_out, share, scaled)
        held_by = tuple((m, p) for _, m, p in held)
        shape = tuple(tensor.shape)
        weights.append(PlannedWeight(key, type(module).__name__, shape, share, kept, fan.fan_in, std, held_by))
    if scope == "global":
        total = sum(weight.numel for weight in weights)
        if kept_count(total, shares["*"]) == 0:
            raise ConversionError(f"k={shares['*']!r} keeps none of the network's {total:,} weights")
    return Plan(tuple(weights), tuple(rest), scheme, scaled, seed, learner, scope)


def convert(
    model: nn.Module,
    k: Shares = DEFAULT_K,
    *,
    scheme: str = "signed_kaiming_constant",
    scaled: bool = True,
    seed: int = 0,
    learner: str = "edge_popup",
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
    architecture: Architecture | str | None = None,
) -> nn.Module:
    """Turn a network into a hidden one, in place: random frozen weights, and a score for each that training changes.

    Every Conv1d/2d/3d, ConvTranspose and Linear layer, subclasses too, is swapped for one whose `weight` is the masked
    weight. Weights and scores are drawn from the seed (a pretrained network loses its own), biases become 0, norm
    scales 1 and norm biases 0, running statistics start anew. Nothing but the scores, float32 of their weight's shape,
    requires a gradient. Method: "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, sections 3 and 4.

    Args:
        model: any network, also one layer alone, also wrapped by DDP or `torch.compile`.
        k: share of a layer's weights that is kept, in (0, 1]; or shares by glob pattern on layer names, of which the
            last that matches a layer counts, and 0.3 where none does.
        scheme: a key of `weights.SCHEMES`.
        scaled: widen the weights by √(1/k), which keeps the variance of a layer's output.
        seed: 0 … 2⁶⁴ − 1.
        learner: a key of `learners.LEARNERS`.
        scope: `layer` ranks each layer by itself, `global` all layers together.
        include, exclude: glob patterns on module names; a pattern that matches a module covers all within it.
        architecture: what `save` shall record, such as `timm/resnet50`; `build` has recorded it already.

    Returns:
        `model` itself, or the swapped layer if `model` is a layer.

    Raises:
        ConversionError: bad k, seed, scope or pattern; a layer would keep nothing; the network is converted already.
        NothingToConvert: there is no layer to mask, or the patterns leave none.
        UnknownName: no such scheme, learner or architecture.
    """
    if architecture is not None and not isinstance(architecture, str | Architecture):
        raise ConversionError(f"architecture is {architecture!r}; expected a name such as 'timm/resnet50'")
    if torch.is_inference_mode_enabled():
        raise ConversionError("convert was called under torch.inference_mode, where its scores could never learn")
    settings = {"scheme": scheme, "scaled": scaled, "seed": seed, "learner": learner, "scope": scope}
    planned = plan(model, k, include=include, exclude=exclude, **settings)  # type: ignore[arg-type]
    core = unwrap(model)
    if isinstance(architecture, str):
        architecture = zoo.architecture(architecture)
    # whoever let `build` make the network knows that its weights were random
    level = logging.INFO if DESCRIPTION in core.__dict__ else logging.WARNING
    _apply(core, planned)
    if architecture is not None:
        core.__dict__[DESCRIPTION] = architecture
    log.log(
        level,
        "the weights of %d layers were drawn anew from seed %d; what they were is gone",
        len(planned.masked),
        seed,
    )
    return model


def bake(model: nn.Module) -> nn.Module:
    """A plain copy of a converted network: original classes and `state_dict` keys, effective weights, all trainable.

    The copy shares no memory with `model`, which stays as it is.
    """
    core = unwrap(model)
    memo: dict[int, object] = {}
    with torch.no_grad():
        for _, module, name, slot in masked_weights(core):
            raw, effective = module._parameters[name], slot.read(module, name)
            memo[id(raw)] = nn.Parameter(effective.detach(), requires_grad=False)
            memo[id(module._parameters[score_name(name)])] = nn.Parameter(torch.empty(0))
            memo[id(slot.ranking)] = Ranking(slot.ranking.learner, 0)
    baked = copy.deepcopy(core, memo)
    for module in baked.modules():
        if is_masked(module):
            unswap(module)
        module.__dict__.pop(GENERATED, None)
        drop_hooks(module)
    for parameter in baked.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return baked


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of each masked weight, by the weight's `state_dict` key: bool, of the weight's shape, a copy."""
    return {key: slot.ranking.mask(slot.index).clone() for key, _, _, slot in masked_weights(unwrap(model))}


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


def _maskable(name: str, module: nn.Module) -> dict[str, Fans]:
    kind = kind_of(module)
    if kind is None:
        return {}
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        raise ConversionError(f"{name or 'the root'} is lazy and has no shape yet; pass one batch through the network")
    found = kind.weights(module)
    return {p: f for p, f in found.items() if (t := module._parameters.get(p)) is not None and t.numel()}


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches the module `name` or one that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _any_match(name: str, patterns: str | Sequence[str], layers: Sequence[str], what: str) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConversionError(f"{what} is {patterns!r}; expected glob patterns on module names")
    for pattern in patterns:
        if not any(_matches(layer, pattern) for layer in layers):
            raise ConversionError(
                f"{what} has {pattern!r}, which matches no layer; nearest: {nearest(pattern, layers)}"
            )
    return any(_matches(name, pattern) for pattern in patterns)


def _apply(core: nn.Module, planned: Plan) -> None:
    # all that could run out of memory comes before the first change
    scores = []
    for weight in planned.masked:
        module, name = weight.owners[0]
        raw = module._parameters[name]
        assert raw is not None
        score = torch.empty_like(raw, dtype=torch.float32, requires_grad=False)
        drawn = get_learner(planned.learner).initial_scores(weight.numel, weight.fan_in, planned.seed, weight.key)
        scores.append(nn.Parameter(fill(score, drawn)))

    shared = Ranking(planned.learner, kept_count(planned.weights, planned.masked[0].k))
    if planned.scope == "global":
        shared.hold_during_forward(core)
    distribution = get_scheme(planned.scheme).distribution
    slots: dict[nn.Module, dict[str, Slot]] = {}
    new_scores: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for parameter in core.parameters():
        parameter.requires_grad_(False)
    for weight, score in zip(planned.masked, scores, strict=True):
        module, name = weight.owners[0]
        _draw(module, name, distribution, weight.std, planned.seed, "weight", weight.key)
        ranking = shared if planned.scope == "global" else Ranking(planned.learner, weight.kept)
        slot = Slot(
            weight.key, planned.seed, planned.scheme, planned.scaled, weight.k, distribution, weight.std, weight.fan_in,
            ranking, len(ranking.members),
        )  # fmt: skip
        ranking.members.append((module, name))
        for owner, held in weight.owners:
            slots.setdefault(owner, {})[held] = replace(slot)
            new_scores.setdefault(owner, {})[held] = score
    for module in slots:
        swap(module, slots[module], new_scores[module])

    for other in planned.rest:
        module, name = other.owner
        value = other.treatment.value
        if other.treatment.action == "constant":
            with torch.no_grad():
                module._parameters[name].fill_(value)  # type: ignore[union-attr]
        elif other.treatment.action == "generated":
            _draw(module, name, "normal", value, planned.seed, "other", other.key)
            module.__dict__.setdefault(GENERATED, {})[name] = Generated(other.key, planned.seed, value)
    for module in core.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()


def _draw(module: nn.Module, name: str, distribution: str, std: float, seed: int, purpose: str, stream: str) -> None:
    tensor = module._parameters[name]
    assert tensor is not None
    fill(tensor, draw(distribution, tensor.numel(), std, seed, purpose, stream))
