"""Drawing of the figures, with the paper's axes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plots import canvas, write_figure
from ..sweep import Point
from .figures import Figure, K
from .table import match, panel_of, x_of

# Okabe and Ito's colours are distinct for the colour-blind; markers and dashes are distinct in grey print
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
MARKERS = "osD^vPX*h"  # one more than there are colours, so that 72 series are distinct
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class _Measured:
    """Mean and standard deviation over seeds, in %, at x. Without x they hold for the whole axis."""

    x: float | None
    mean: float
    std: float


@dataclass
class _Panel:
    """Contents of one panel: series by name, and the paper's numbers as points."""

    series: dict[str, list[_Measured]] = field(default_factory=lambda: defaultdict(list))
    crosses: list[tuple[float, float]] = field(default_factory=list)


def draw(figure: Figure, points: Sequence[Point], note: str, path: Path) -> None:
    """Draw accuracy over x: means, a band of one standard deviation, and the paper's numbers as crosses.

    A series without x is a horizontal line, and so is the paper's best over x. The suffix of `path` selects the format.
    """
    panels = _panels(figure, points)
    names = list(dict.fromkeys(point.label for point in points))
    drawing, axes = canvas(max(3.4 * len(panels) + 1.2, 7.2), 4.2, max(len(panels), 1))
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        for name, measured in panel.series.items():
            _draw_series(axis, name, measured, names.index(name), joined=figure.x != "kept")
        _draw_paper(axis, figure, title, panel)
        axis.set(xlabel=figure.x_label, title=title, ylabel="" if axis is not axes[0] else "accuracy (%)")
        if figure.x == K:
            axis.set_xlim(0, 100)
        if figure.x == "stored":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    if panels:
        _draw_legend(drawing, axes)
    drawing.suptitle(f"{figure.title}\n{note}", fontsize=9)
    write_figure(drawing, path)


def _panels(figure: Figure, points: Sequence[Point]) -> dict[str, _Panel]:
    """Return the panels by their titles."""
    panels: dict[str, _Panel] = defaultdict(_Panel)
    for point in points:
        if point.mean is not None:
            panel, x, reported = panels[panel_of(figure, point.values)], x_of(figure, point), match(figure, point)
            panel.series[point.label].append(_Measured(x, 100 * point.mean.accuracy, 100 * (point.std or 0.0)))
            if reported and x is not None:
                panel.crosses.append((x, reported.accuracy))
    return panels


def _draw_series(axis: Any, name: str, measured: list[_Measured], number: int, joined: bool) -> None:
    """Draw the means of a series with their band, as markers and, if `joined`, a line. `number` selects the style."""
    colour, style = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    if measured[0].x is None:
        mean, std = measured[0].mean, measured[0].std
        axis.axhline(mean, color=colour, linestyle=style, label=name)
        axis.axhspan(mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        return
    measured = sorted(measured, key=lambda each: each.x or 0.0)
    xs, means = [each.x or 0.0 for each in measured], [each.mean for each in measured]
    marker = MARKERS[number % len(MARKERS)]
    axis.plot(xs, means, color=colour, linestyle=style if joined else "", marker=marker, label=name)
    low, high = ([each.mean + sign * each.std for each in measured] for sign in (-1, 1))
    axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_paper(axis: Any, figure: Figure, title: str, panel: _Panel) -> None:
    """Draw the paper's numbers for a panel."""
    if panel.crosses:
        axis.plot(*zip(*panel.crosses, strict=True), "x", color="#000000", markersize=8, label="the paper")
    for reported in figure.reported:
        if reported.best and reported.label in panel.series and panel_of(figure, reported.values) == title:
            axis.axhline(reported.accuracy, color="#000000", linestyle=":", linewidth=1, label="the paper's best")


def _draw_legend(drawing: Any, axes: Sequence[Any]) -> None:
    """Draw one legend for all panels, below them."""
    handles: dict[str, object] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    columns = 3 if len(axes) < 3 else 4
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
