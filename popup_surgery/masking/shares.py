"""How many weights each layer keeps: the rules that spread one k over a network, floors, and fixed weights.

With N weights in all, and K of them kept, layer l of n_l weights keeps min(n_l, max(1, ε·w_l)), where ε is the one
number that makes the sum K. The rules differ in w_l:

rule       w_l                 what is equal in all layers that are neither full nor empty
uniform    n_l                 the share
erk        Σ of the shape      the share times n_l / Σ of the shape; Erdős–Rényi-Kernel (Evci et al., RigL, ICML 2020)
balanced   1                   the number of weights (Gadhikar et al., ICML 2023)
fan        n_l / fan_in_l      the mean number of inputs of an output
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConversionError
from ..models.layer_types import Fans
from ..selection import kept_count
from ..weights.fixed import Fixed
from .patterns import last_match, matches
from .ranking import parameter_of
from .settings import MaskingSettings, fixed_bounds, is_rule, own_shares
from .walk import Place, masked_weights


@dataclass(frozen=True)
class Layer:
    """What a rule knows of one masked weight."""

    shape: tuple[int, ...]
    numel: int
    fan_in: float

    def weight(self, rule: str) -> float:
        """Return w_l, to which the number of kept weights is proportional."""
        return {
            "uniform": self.numel, "erk": sum(self.shape), "balanced": 1.0, "fan": self.numel / self.fan_in,
        }[rule]  # fmt: skip


def spread(layers: Sequence[Layer], rule: str, kept: int) -> list[int]:
    """Return how many weights each layer keeps by a rule. Every layer keeps at least one, and the sum is `kept`.

    Args:
        layers: the masked weights.
        rule: one of `settings.RULES`.
        kept: from the number of layers to the number of their weights.
    """
    shares = [layer.weight(rule) for layer in layers]

    def at(factor: float) -> list[float]:
        return [min(float(layer.numel), max(1.0, factor * w)) for layer, w in zip(layers, shares, strict=True)]

    low = min(1 / w for w in shares)
    high = max(layer.numel / w for layer, w in zip(layers, shares, strict=True))
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(at(middle)) < kept else (low, middle)
    exact = at(high)
    counts = [int(count) for count in exact]
    # what rounding down leaves goes to the largest fractions, of equal ones to the first layers
    order = sorted(range(len(layers)), key=lambda i: counts[i] - exact[i])
    for i in [i for i in order if counts[i] < layers[i].numel][: kept - sum(counts)]:
        counts[i] += 1
    return counts


def fixed_counts(numel: int, settings: MaskingSettings) -> Fixed | None:
    """Return how many of a layer's weights are fixed before training; None if the settings fix none."""
    if settings.fixed is None:
        return None
    kept, most = fixed_bounds(settings.fixed)
    return Fixed(numel - kept_count(numel, most), kept_count(numel, kept))


def floor_count(numel: int, settings: MaskingSettings) -> int:
    """Return how many of a layer's weights the floor keeps at least: a share below 1, or a number of weights.

    It keeps all that are fixed as kept, and none that is fixed as dropped.
    """
    floor, fixed = settings.floor or 0, fixed_counts(numel, settings) or Fixed(0, 0)
    count = int(floor) if floor >= 1 else kept_count(numel, floor)
    return max(fixed.kept, min(numel - fixed.dropped, count))


def check_together(settings: MaskingSettings, sizes: Sequence[int]) -> None:
    """Raise `ConversionError` unless k keeps weights of layers of these sizes, as the floor and `fixed` ask."""
    total, k = sum(sizes), settings.by_pattern("k")["*"]
    kept = kept_count(total, k)
    if kept == 0:
        raise ConversionError(f"k={k!r} keeps none of the network's {total:,} weights")
    floor = settings.floor
    fixed = [found for size in sizes if (found := fixed_counts(size, settings)) is not None]
    together = Fixed(sum(one.dropped for one in fixed), sum(one.kept for one in fixed))
    check_fixed(settings, "the network", k, kept, total, together)
    if floor is not None and (least := sum(floor_count(size, settings) for size in sizes)) > kept:
        raise ConversionError(
            f"floor={floor!r} keeps {least:,} weights in {len(sizes)} layers; expected at most {kept:,}, as many as "
            f"k={k!r} keeps"
        )


def check_fixed(settings: MaskingSettings, what: str, k: float, kept: int, numel: int, fixed: Fixed) -> None:
    """Raise `ConversionError` if `kept` of `numel` weights cannot be kept, of which the seed fixes some.

    Args:
        what: whose weights they are.
        k: the share that asks for `kept`.
    """
    if not fixed.allows(numel, kept):
        asks = f"the rule {settings.k['rule']} with k={settings.k['k']!r}" if is_rule(settings.k) else f"k={k!r}"
        raise ConversionError(
            f"{asks} keeps {kept:,} of the {numel:,} weights of {what}, and fixed={settings.fixed!r} keeps "
            f"{fixed.kept:,} and drops {fixed.dropped:,}; expected k to keep {fixed.kept:,} to "
            f"{numel - fixed.dropped:,}"
        )


def counts_by_rule(
    core: nn.Module,
    unmasked: Sequence[Sequence[Place]],
    chosen: Mapping[tuple[str, str], Fans],
    settings: MaskingSettings,
    first: bool,
) -> dict[tuple[str, str], int]:
    """Return how many weights each of the chosen layers keeps, except those that a pattern of k matches.

    Where a network is completed, what its masked layers keep stays, and the new layers keep what is left of k.
    """
    k = settings.k
    assert is_rule(k)
    alone = own_shares(k)
    places = [p for held in unmasked if (p := next((p for p in held if (p.layer, p.name) in chosen), None))]
    free = [place for place in places if not any(matches(place.layer, pattern) for pattern in alone)]
    layers = [Layer(tuple(p.tensor.shape), p.tensor.numel(), chosen[p.layer, p.name].fan_in) for p in free]
    masked = [(parameter_of(module, name), slot) for _, module, name, slot in masked_weights(core)]
    total = sum(p.tensor.numel() for p in places) + sum(weight.numel() for weight, _ in masked)
    fixed = sum(slot.ranking.kept for _, slot in masked)
    shares = settings.by_pattern("k")
    fixed += sum(kept_count(p.tensor.numel(), shares[last_match(p.layer, shares)]) for p in places if p not in free)
    kept, least, most = kept_count(total, k["k"]) - fixed, len(free), sum(layer.numel for layer in layers)
    if first and not least <= kept <= most:
        raise ConversionError(
            f"k={k['k']!r} keeps {kept + fixed:,} of {total:,} weights, and the rule {k['rule']} cannot: "
            f"expected {least + fixed:,} to {most + fixed:,}, at least one in each layer"
            + (f" and {fixed:,} in those with a k of their own" if fixed else "")
        )
    counts = spread(layers, k["rule"], min(max(kept, least), most)) if free else []
    return {(place.layer, place.name): count for place, count in zip(free, counts, strict=True)}
