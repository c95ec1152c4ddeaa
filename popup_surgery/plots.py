"""Plots of runs."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import write_atomically

_DASHES = ("-", "--", "-.", ":")

PICTURES = (".png", ".svg", ".pdf")  # the suffixes of `write_figure`


def draw_curve(path: Path, title: str, train: Sequence[float], validation: Sequence[float]) -> None:
    """Draw the accuracy on both splits, 0 … 1, by epoch, and write it to `path` as a PNG."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = canvas(6, 3.6)
    epochs = range(1, len(train) + 1)
    marker = "o" if len(train) < 10 else None
    axes.plot(epochs, [100 * a for a in train], color="#999999", linestyle="--", marker=marker, label="training")
    axes.plot(epochs, [100 * a for a in validation], color="#0072b2", marker=marker, label="validation")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_figure(figure, path)


def draw_masks(
    path: Path, title: str, names: Sequence[str], density: Sequence[float], overlap: Sequence[float]
) -> None:
    """Draw the share of weights that each layer keeps, and how many of those it kept at the start, as a PNG.

    Args:
        density: for each layer, the share of its weights that is kept, 0 … 1.
        overlap: for each layer, the share of the kept weights that was kept at the start too, 0 … 1.
    """
    figure, (axes,) = canvas(max(6.0, min(16.0, 0.22 * len(names))), 4.2)
    places = range(len(names))
    axes.plot(places, [100 * share for share in density], "s", color="#999999", label="weights kept")
    axes.plot(places, [100 * share for share in overlap], "o", color="#0072b2", label="of them, kept at the start too")
    step = -(-len(names) // 60)
    axes.set_xticks(places[::step], names[::step], rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="share (%)", ylim=(0, 105), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_figure(figure, path)


def draw_mask(path: Path, title: str, names: Sequence[str], density: Sequence[float], piece: Any, what: str) -> None:
    """Draw the share of weights that each layer keeps, and beside it a piece of a mask, as a PNG.

    Args:
        density: for each layer, the share of its weights that is kept, 0 … 1.
        piece: bool [rows, columns]; kept weights are dark.
        what: says which piece it is.
    """
    figure, (shares, picture) = canvas(8, 3.2, panels=2, share=False)
    places = range(len(names))
    shares.bar(places, [100 * share for share in density], color="#0072b2", width=0.8)
    step = -(-len(names) // 24)
    shares.set_xticks(places[::step], names[::step], rotation=60, ha="right", fontsize=6)
    shares.set(ylabel="weights kept (%)", ylim=(0, 105), title=title)
    shares.grid(axis="y", alpha=0.3)
    picture.imshow(piece, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    picture.set(xticks=[], yticks=[])
    picture.set_xlabel(what, fontsize=8)
    write_figure(figure, path)


@dataclass(frozen=True)
class Group:
    """Accuracies, 0 … 1, of networks that have something in common.

    Attributes:
        recalibrated: the accuracies of the same networks with norm statistics of their own.
    """

    name: str
    accuracies: list[float]
    recalibrated: list[float]


def draw_sanity(path: Path, title: str, groups: Sequence[Group], chance: float) -> None:
    """Draw the accuracies of variations of a subnetwork as a PNG: a row for each group, a dot for each network."""
    figure, (axes,) = canvas(7, 1.2 + 0.32 * len(groups))
    series = [("o", "#0072b2", "a network", [group.accuracies for group in groups])]
    if any(group.recalibrated for group in groups):
        series.append(("D", "#d55e00", "with new statistics", [group.recalibrated for group in groups]))
    for i, (marker, colour, label, rows) in enumerate(series):
        points = [(100 * share, place + 0.25 * i) for place, row in enumerate(rows) for share in row]
        axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, alpha=0.7, label=label, zorder=3)
    if chance:
        axes.axvline(100 * chance, color="#666666", linestyle="--", label="chance")
    axes.set_yticks(range(len(groups)), [group.name for group in groups])
    axes.set(xlabel="accuracy (%)", xlim=(-2, 102), title=title)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_figure(figure, path)


@dataclass(frozen=True)
class Series:
    """Accuracies, 0 … 1, at several places of an x axis: pairs of the place and the accuracies there."""

    name: str
    places: list[tuple[float, list[float]]]


def draw_series(path: Path, title: str, x_label: str, series: Sequence[Series]) -> None:
    """Draw accuracies over x as a PNG: a dot for each, and for each series a line through the means."""
    figure, (axes,) = canvas(7, 4.2)
    for i, one in enumerate(series):
        colour = f"C{i % 10}"
        xs = [x for x, accuracies in one.places for _ in accuracies]
        axes.scatter(xs, [100 * share for _, group in one.places for share in group], color=colour, alpha=0.5, s=18)
        means = [100 * sum(group) / len(group) for _, group in one.places]
        axes.plot([x for x, _ in one.places], means, color=colour, linestyle=_DASHES[i // 10 % 4], label=one.name)
    axes.set(xlabel=x_label, ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    if 1 < len(series) <= 30:
        axes.legend(fontsize=8)
    write_figure(figure, path)


def draw_groups(path: Path, title: str, groups: Sequence[Group]) -> None:
    """Draw accuracies as a PNG: a row for each group, a dot for each accuracy."""
    figure, (axes,) = canvas(7, 1.2 + 0.32 * len(groups))
    points = [(100 * share, place) for place, group in enumerate(groups) for share in group.accuracies]
    axes.scatter(*zip(*points, strict=True), color="#0072b2", alpha=0.7, zorder=3)
    axes.set_yticks(range(len(groups)), [group.name for group in groups])
    axes.set(xlabel="accuracy (%)", title=title)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    write_figure(figure, path)


@dataclass(frozen=True)
class Bars:
    """One panel of bars.

    Attributes:
        title: what they show.
        values: their lengths; None for one that is not known.
        labels: what stands beside each.
    """

    title: str
    values: list[float | None]
    labels: list[str]


def draw_bars(path: Path, title: str, names: Sequence[str], panels: Sequence[Bars]) -> None:
    """Draw panels of bars side by side as a PNG: a row for each name. The first is what others are compared with."""
    figure, axes = canvas(2.2 + 1.9 * len(panels), 1.3 + 0.3 * len(names), len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        colours = ["#999999", *["#0072b2"] * len(names)][: len(names)]
        bars = axis.barh(range(len(names)), [value or 0 for value in panel.values], color=colours)
        axis.bar_label(bars, panel.labels, padding=3, fontsize=8)
        axis.set_title(panel.title, fontsize=9)
        axis.set(xticks=[], xlim=(0, 1.9 * (max(value or 0 for value in panel.values) or 1)))
        axis.set_yticks(range(len(names)), names)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    write_figure(figure, path)


def canvas(width: float, height: float, panels: int = 1, share: bool = True) -> tuple[Any, list[Any]]:
    """Return a figure of that size in inches, and its panels side by side; they share a y axis if `share` is true."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(FigureCanvasAgg(figure).figure.subplots(1, panels, sharey=share, squeeze=False)[0])


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the path's suffix names, one of `PICTURES`."""
    import matplotlib

    picture, kind = io.BytesIO(), path.suffix[1:].lower()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same picture gives the same file
        figure.savefig(picture, format=kind, dpi=120, metadata=metadata)
    write_atomically(path, picture.getvalue())
