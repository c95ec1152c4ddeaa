"""How much two masks of the same network have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artifact import Artifact, masks
from ..errors import ConversionError

Source = nn.Module | str | Path | Artifact | Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerOverlap:
    """Two masks of one weight, or of several together, compared.

    Attributes:
        name: the weight's `state_dict` key.
        weights: number of weights.
        kept_a, kept_b, kept_both: how many the first mask keeps, the second, and both.
        chance_both: how many both would keep on average if each kept as many, chosen at random: `kept_a · kept_b /
            weights` for one layer.
    """

    name: str
    weights: int
    kept_a: int
    kept_b: int
    kept_both: int
    chance_both: float

    @property
    def both(self) -> float:
        """Share of the weights that both masks keep, 0 … 1."""
        return self.kept_both / self.weights

    @property
    def one(self) -> float:
        """Share of the weights that exactly one of the masks keeps."""
        return (self.kept_a + self.kept_b - 2 * self.kept_both) / self.weights

    @property
    def neither(self) -> float:
        """Share of the weights that neither mask keeps."""
        return (self.weights - self.kept_a - self.kept_b + self.kept_both) / self.weights

    @property
    def chance(self) -> tuple[float, float, float]:
        """The average of `both`, `one` and `neither` for masks that keep as many weights, chosen at random."""
        both, kept = self.chance_both, self.kept_a + self.kept_b
        return both / self.weights, (kept - 2 * both) / self.weights, (self.weights - kept + both) / self.weights


@dataclass(frozen=True)
class Overlap:
    """The result of `overlap`; as text a table.

    Attributes:
        layers: the weights that both mask, in the first one's order.
        only_a, only_b: names of the weights that only the first masks, and only the second.
    """

    layers: tuple[LayerOverlap, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def total(self) -> LayerOverlap:
        """All layers together. Chance is still within each layer."""
        numbers = zip(*((e.weights, e.kept_a, e.kept_b, e.kept_both, e.chance_both) for e in self.layers), strict=True)
        return LayerOverlap(f"{len(self.layers)} layers", *map(sum, numbers))

    def to_json(self) -> dict[str, Any]:
        """Return the layers and the total as plain values, with their shares."""
        return {
            "layers": [_values(layer) for layer in self.layers],
            "total": _values(self.total),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
        }

    def __str__(self) -> str:
        rows = [("layer", "weights", "kept by both", "chance", "by one", "chance", "by neither", "chance")]
        for layer in (*self.layers, self.total):
            shares = zip((layer.both, layer.one, layer.neither), layer.chance, strict=True)
            cells = [f"{100 * share:.1f} %" for pair in shares for share in pair]
            rows.append((layer.name, f"{layer.weights:,}", *cells))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        for which, names in (("first", self.only_a), ("second", self.only_b)):
            if names:
                text.append(f"masked in the {which} alone: {', '.join(names)}")
        return "\n".join(text)


def overlap(a: Source, b: Source) -> Overlap:
    """Compare two masks of the same network: for each layer, which weights both keep, one of them, or neither.

    Chance is what two masks that keep as many weights of each layer would give on average if they were chosen at
    random: both keep the share `k_a · k_b`.

    Args:
        a, b: a converted network; a popup artifact, as a file or open; the file of masks that a run writes beside
            dense weights; or masks by name, as `masks` returns them.

    Raises:
        ArtifactError: a file is damaged, or has no masks.
        ConversionError: a network has no masks; the two have no masked weight in common, or one in two shapes.
    """
    first, second = _masks(a), _masks(b)
    common = [name for name in first if name in second]
    if not common:
        raise ConversionError(
            f"the two mask no weight of the same name: {next(iter(first), 'none')} and {next(iter(second), 'none')}; "
            "expected masks of the same network"
        )
    layers = []
    for name in common:
        one, other = first[name].cpu(), second[name].cpu()
        if one.shape != other.shape:
            raise ConversionError(
                f"{name!r} has the shape {tuple(one.shape)} in the first and {tuple(other.shape)} in the second; "
                "expected masks of the same network"
            )
        n, kept_a, kept_b = one.numel(), int(one.sum()), int(other.sum())
        layers.append(LayerOverlap(name, n, kept_a, kept_b, int((one & other).sum()), kept_a * kept_b / n))
    only_a, only_b = (tuple(name for name in each if name not in common) for each in (first, second))
    return Overlap(tuple(layers), only_a, only_b)


def _masks(source: Source) -> Mapping[str, Tensor]:
    return source if isinstance(source, Mapping) else masks(source)


def _values(layer: LayerOverlap) -> dict[str, Any]:
    names: Sequence[str] = ("both", "one", "neither")
    shares = {name: getattr(layer, name) for name in names}
    return asdict(layer) | shares | {f"chance_{name}": share for name, share in zip(names, layer.chance, strict=True)}
