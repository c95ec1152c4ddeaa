"""A plan: what becomes of each parameter. Names and numbers alone: it prints, compares, pickles and goes to JSON."""

import io
import json
import math
from dataclasses import asdict, dataclass

from ..errors import ConversionError
from ..weights.source import source_of
from .settings import MaskingSettings
from .unmasked import UnmaskedRule


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
        owners: every `state_dict` key that it stands under, `key` first.
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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedRest:
    """One parameter that will not be masked.

    Attributes:
        key, shape: its `state_dict` key, the first of several, and its shape.
        treatment: what becomes of it, or became of it where it is `done`.
        train: whether it is trained.
        done: an earlier conversion saw its module.
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
    """A network's parameters by what becomes of them: numbers of elements by `state_dict` key.

    `left` ones keep the values that they have. `missed` are those of them that look like weights, with two dimensions
    or more above 1, and that no type of layer claims.
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
    """What `convert` will do to a network, printable as a table. It holds no module, and says it of any equal network.

    Attributes:
        masked: the weights to be masked, in `state_dict` order.
        rest: all other parameters.
        before: elements of the weights that are masked already, by `state_dict` key.
        settings: all arguments of `convert`.
    """

    masked: tuple[PlannedWeight, ...]
    rest: tuple[PlannedRest, ...]
    before: dict[str, int]
    settings: MaskingSettings

    def to_json(self, indent: int | None = None) -> str:
        """The whole plan as a JSON object, from which `from_json` makes an equal one."""
        return json.dumps(asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote; `ConversionError` for any other text."""
        try:
            found = json.loads(text)
            given = {name: value for name, value in found["settings"].items() if name != "k" or value is not None}
            return cls(
                tuple(
                    PlannedWeight(**each | {"shape": tuple(each["shape"]), "owners": tuple(each["owners"])})
                    for each in found["masked"]
                ),
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
            raise ConversionError(f"this is no plan as Plan.to_json writes it: {error}") from error

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
        scheme = settings.scheme
        schemes = scheme if isinstance(scheme, str) else ", ".join(f"{p}: {name}" for p, name in scheme.items())
        if settings.scaled and (not self.masked or any(source_of(weight.distribution).drawn for weight in self.masked)):
            schemes += ", scaled"
        before = f", {len(self.before)} masked before" if self.before else ""
        kept = f"{self.kept:,} kept ({self.kept / max(self.weights, 1):.1%})"
        if settings.k is None:
            kept = "as many kept as the scores say"
        return (
            f"{len(self.masked)} layers masked, {self.weights:,} weights, {kept}{before}\n"
            f"{len(self.rest)} tensors not masked, {rest:,} parameters; {coverage.share('masked'):.2%} of all "
            "parameters are masked\n"
            f"{schemes}, seed {settings.seed}, {settings.learner}, "
            f"ranked {'over all layers' if settings.scope == 'global' else 'layer by layer'}"
        )

    def __str__(self) -> str:
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
