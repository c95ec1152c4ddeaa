"""Plans: what happens to each parameter, as names and numbers. A plan prints, compares, pickles and goes to JSON."""

import io
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConversionError
from ..selection.pattern import Pattern
from ..weights.fixed import Fixed
from ..weights.source import source_of
from .settings import MaskingSettings, is_rule
from .unmasked import FRESH, NAMED, UnmaskedRule


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that will be masked.

    Attributes:
        key: its first `state_dict` key, which is also its stream name.
        layer: the class of its layer.
        shape: the shape of the weight and of its scores.
        k, kept: the requested share, and the number of weights that it gives; None if the learner takes no k. With
            `scope="global"` the sum of all `kept` is spread freely over the layers.
        scheme, distribution, std: where its values come from. For pretrained values the distribution is `base` and std
            is 0.
        fan_in: inputs summed into one output.
        owners: all of its `state_dict` keys, `key` first.
        pattern: which weights are neighbours, and how many of them are kept; None if all are ranked together.
        fixed: how many of its weights the seed fixes before training; None if it fixes none.
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
    owners: tuple[str, ...]
    pattern: Pattern | None = None
    fixed: Fixed | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedRest:
    """One parameter that will not be masked.

    Attributes:
        key, shape: its first `state_dict` key, and its shape.
        treatment: what happens to it, or what happened to it if `done` is True.
        train: whether it is trained.
        done: whether an earlier conversion covered its module.
    """

    key: str
    shape: tuple[int, ...]
    treatment: UnmaskedRule
    train: bool
    done: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Coverage:
    """A network's parameters, grouped by what happens to them: in each group, numbers of elements by `state_dict` key.

    Parameters in `left` keep their values, unless they are trained. `missed` are those among them that look like
    weights, with two or more dimensions above 1, but belong to no known type of layer. What `train` names, or has no
    pretrained weights and is trained instead of masked, is not among them.
    """

    masked: dict[str, int]
    generated: dict[str, int]
    constant: dict[str, int]
    left: dict[str, int]
    missed: dict[str, int]

    @property
    def total(self) -> int:
        """The number of all parameters, each counted once."""
        return sum(sum(group.values()) for group in (self.masked, self.generated, self.constant, self.left))

    def share(self, group: str) -> float:
        """Return the share, 0 … 1, of all parameters that is in `masked`, `generated`, `constant` or `left`."""
        return sum(getattr(self, group).values()) / max(self.total, 1)

    @property
    def of_weights(self) -> float:
        """The share of weights that are masked, among those masked and those missed."""
        masked, missed = sum(self.masked.values()), sum(self.missed.values())
        return masked / max(masked + missed, 1)

    def __str__(self) -> str:
        groups = ("masked", "generated", "constant", "left")
        return ", ".join(f"{name} {self.share(name):.2%}" for name in groups) + f" of {self.total:,} parameters"


@dataclass(frozen=True)
class Plan:
    """What `convert` will do to a network, printable as a table. It has no modules, and applies to any equal network.

    Attributes:
        masked: the weights to mask, in `state_dict` order.
        rest: all other parameters.
        before: numbers of elements of the weights that are masked already, by `state_dict` key.
        settings: all arguments of `convert`.
    """

    masked: tuple[PlannedWeight, ...]
    rest: tuple[PlannedRest, ...]
    before: dict[str, int]
    settings: MaskingSettings

    def to_json(self, indent: int | None = None) -> str:
        """Return the whole plan as a JSON object, from which `from_json` makes an equal plan."""
        return json.dumps(asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that `to_json` wrote; `ConversionError` for any other text."""
        try:
            found = json.loads(text)
            given = {name: value for name, value in found["settings"].items() if name != "k" or value is not None}
            return cls(
                tuple(_weight(each) for each in found["masked"]),
                tuple(
                    PlannedRest(
                        **each | {"shape": tuple(each["shape"]), "treatment": UnmaskedRule(**each["treatment"])}
                    )
                    for each in found["rest"]
                ),
                dict(found["before"]),
                MaskingSettings.of(given),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConversionError(f"this is not a plan that Plan.to_json wrote: {error}") from error

    @property
    def weights(self) -> int:
        """The number of weights to mask."""
        return sum(weight.numel for weight in self.masked)

    @property
    def kept(self) -> int:
        """The number of these weights that take part, as far as k determines it."""
        return sum(weight.kept or 0 for weight in self.masked)

    @property
    def coverage(self) -> Coverage:
        """What happens to each parameter, in numbers of elements."""
        groups: dict[str, dict[str, int]] = {"constant": {}, "generated": {}, "left": {}}
        for other in self.rest:
            groups[other.treatment.action][other.key] = other.numel
        missed = {
            other.key: other.numel
            for other in self.rest
            if other.treatment.action == "left"
            and sum(size > 1 for size in other.shape) > 1
            and other.treatment not in (NAMED, FRESH)
        }
        masked = self.before | {weight.key: weight.numel for weight in self.masked}
        return Coverage(masked, **groups, missed=missed)

    def totals(self) -> str:
        """Return the totals in three lines."""
        rest = sum(other.numel for other in self.rest)
        learning = sum(other.numel for other in self.rest if other.train)
        trained = f", of which {learning:,} are trained" if learning else ""
        settings, coverage = self.settings, self.coverage
        scheme = settings.scheme
        schemes = scheme if isinstance(scheme, str) else ", ".join(f"{p}: {name}" for p, name in scheme.items())
        if settings.scaled and (not self.masked or any(source_of(weight.distribution).drawn for weight in self.masked)):
            schemes += ", scaled"
        before = f", {len(self.before)} masked before" if self.before else ""
        kept = f"{self.kept:,} kept ({self.kept / max(self.weights, 1):.1%})"
        if settings.k is None:
            kept = "the scores decide how many are kept"
        elif is_rule(settings.k):
            kept += f" by the rule {settings.k['rule']}"
        least = (
            ""
            if settings.floor is None
            else f", each keeps at least {settings.floor:g}{' of its weights' if settings.floor < 1 else ''}"
        )
        return (
            f"{len(self.masked)} layers masked, {self.weights:,} weights, {kept}{before}\n"
            f"{len(self.rest)} tensors not masked, {rest:,} parameters{trained}; {coverage.share('masked'):.2%} of all "
            "parameters are masked\n"
            f"{schemes}, seed {settings.seed}, {settings.learner}, "
            f"{settings.ranked}{least}{self._fixed}"
        )

    @property
    def _fixed(self) -> str:
        """What is fixed, as the end of a line."""
        fixed = [weight.fixed for weight in self.masked if weight.fixed is not None]
        if not fixed:
            return ""
        dropped, kept = (sum(getattr(one, name) for one in fixed) / self.weights for name in ("dropped", "kept"))
        return f", {dropped:.1%} fixed as dropped and {kept:.1%} as kept"

    def __str__(self) -> str:
        """Return the plan as tables: the masked weights, whatever is not masked, and the totals."""
        from rich.console import Console
        from rich.table import Table

        headings = "layer", "class", "shape", "weights", "kept", "fan_in", "std"
        table = Table(*headings, box=None, header_style="")
        for weight in self.masked:
            shape = " × ".join(map(str, weight.shape))
            std = source_of(weight.distribution).describe(weight.std)
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


def _weight(found: dict[str, Any]) -> PlannedWeight:
    """Return what `to_json` wrote as `found`."""
    pattern, fixed = found.get("pattern"), found.get("fixed")
    whole = {"shape": tuple(found["shape"]), "owners": tuple(found["owners"])}
    rules = {
        "pattern": None if pattern is None else Pattern(**pattern),
        "fixed": None if fixed is None else Fixed(**fixed),
    }
    return PlannedWeight(**found | whole | rules)
