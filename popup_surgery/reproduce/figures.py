"""The figures: what each one shows, and the paper's own numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

K, WIDTH, NET = "surgery.k", "model.kwargs.width", "model.name"


@dataclass(frozen=True)
class Reported:
    """An accuracy in % that the paper or its authors' table reports.

    Attributes:
        label: label of the series.
        values: values of the grid keys that it belongs to; other keys may have any value.
        best: whether it is the best of the series over x.
        read: where the number was read. Those read from a figure are accurate to about half a point.
    """

    label: str
    values: Mapping[str, Any]
    accuracy: float
    read: str
    best: bool = False


@dataclass(frozen=True)
class Figure:
    """One figure or table.

    Attributes:
        sweep: its sweep in recipes/.
        x, x_label: the grid key on the x axis, or one of a run's `Numbers`; and the label of the axis.
        panels: the grid key with one panel for each of its values.
        reported: the paper's numbers.
        protocol: what it is trained on and for how long, a key of each of `SCALES`.
        baseline: label of the series that the others are compared with at the same x, in place of the paper's numbers.
        rounded: whether dense networks are shown pruned and rounded too.
    """

    title: str
    sweep: str
    x: str
    x_label: str
    panels: str | None = None
    reported: tuple[Reported, ...] = ()
    protocol: str = "cifar10"
    baseline: str = ""
    rounded: bool = False


_FIGURE3, _TABLE2 = "figure 3", "the authors' table"
_BEST = {"conv2": 77.5, "conv4": 86.0, "conv6": 88.0, "conv8": 88.5}
_TENTH = {"conv2": 65.0, "conv4": 74.0, "conv6": 77.0, "conv8": 70.0}
_DENSE = {"conv2": 79.5, "conv4": 86.5, "conv6": 88.5, "conv8": 88.0}
_RESNETS = {"resnet50": (61.7, 68.6), "resnet101": (66.15, 72.3), "wide_resnet50_2": (67.9, 73.3)}


def _of(net: str) -> dict[str, Any]:
    return {NET: f"popup_surgery/{net}"}


_DISTRIBUTION = (
    *(Reported("Signed Constant", _of(net), value, _FIGURE3, best=True) for net, value in _BEST.items()),
    *(Reported("Signed Constant", _of(net) | {K: 0.1}, value, _FIGURE3) for net, value in _TENTH.items()),
)
_LEARNED = ("dense, SGD", "dense, Adam")
_DEEPER = _DISTRIBUTION + tuple(
    Reported(label, _of(net), value, _FIGURE3) for net, value in _DENSE.items() for label in _LEARNED
)
_WIDE = tuple(
    Reported(label, _of(net) | {WIDTH: 1.0}, _DENSE[net], _FIGURE3) for net in ("conv4", "conv6") for label in _LEARNED
)
_ZHOU = tuple(
    Reported(f"Zhou et al., {weights}", _of(net), value, "Zhou et al., signed constants, rescaled")
    for net, value in {"conv2": 66.0, "conv4": 72.5, "conv6": 76.5}.items()
    for weights in ("N_k", "U_k", "N_x (Xavier)", "U_x (Xavier)")
)
_LARGE = tuple(
    Reported(label, {NET: f"timm/{net}"}, value, _TABLE2)
    for net, values in _RESNETS.items()
    for label, value in zip(("Kaiming Normal", "Signed Constant"), values, strict=True)
)
_RESNET50 = tuple(
    Reported(label, {K: 0.3}, value, _TABLE2)
    for label, value in (
        ("edge-popup, Kaiming Normal", 61.7), ("edge-popup, Signed Constant", 68.6),
        ("Kaiming Normal, scaled", 61.7), ("Signed Constant, scaled", 68.6),
    )
)  # fmt: skip
_WEIGHTS = "weights kept (%)"

PAPER = {
    "figure3": Figure("Going deeper: CIFAR-10", "paper/figure3", K, _WEIGHTS, NET, _DEEPER),
    "figure4": Figure("Going wider: CIFAR-10, k = 50 %", "paper/figure4", WIDTH, "width multiplier", NET, _WIDE),
    "figure5": Figure("A fixed number of parameters: Conv4, CIFAR-10", "paper/figure5", WIDTH, "width multiplier"),
    "figure6": Figure("Against Zhou et al.: CIFAR-10", "paper/figure6", K, _WEIGHTS, NET, _ZHOU),
    "figure7": Figure("The distribution of the weights: CIFAR-10", "paper/figure7", K, _WEIGHTS, NET, _DISTRIBUTION),
    "figure8": Figure("ImageNet, k = 30 %", "paper/figure8", "kept", "parameters", None, _LARGE, "imagenet"),
    "table2": Figure("ImageNet, k = 30 %", "paper/figure8", "kept", "parameters", None, _LARGE, "imagenet"),
    "figure9": Figure(
        "ResNet-50 on ImageNet, against Zhou et al.", "paper/figure9", K, _WEIGHTS, None, _RESNET50, "imagenet"
    ),
    "figure10": Figure(
        "ResNet-50 on ImageNet, by distribution", "paper/figure10", K, _WEIGHTS, None, _RESNET50, "imagenet"
    ),
}
FIGURES = PAPER | {
    "equal-bytes": Figure(
        "Methods at equal bytes: CIFAR-10", "methods/equal_bytes", "stored", "bytes of masks and stored tensors", NET,
        protocol="equal-bytes", baseline="edge-popup", rounded=True,
    ),
}  # fmt: skip
