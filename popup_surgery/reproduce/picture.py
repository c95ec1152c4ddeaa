"""The figures themselves, with the paper's axes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..plots import canvas, write_figure
from ..sweep import Point
from .figures import Figure, K
from .table import match, panel_of, x_of

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes serve those who print in grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")


def draw(figure: Figure, points: Sequence[Point], note: str, path: Path) -> None:
    """Accuracy over x, mean and a band of one standard deviation, and the paper's numbers as crosses.

    What has no x is a horizontal line, as is the paper's best over x. The format is that of the path's suffix.
    """
    panels: dict[str, dict[str, list[tuple[float | None, float, float]]]] = defaultdict(lambda: defaultdict(list))
    crosses: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        if point.mean is not None:
            panel, x, reported = panel_of(figure, point.values), x_of(figure, point), match(figure, point)
            panels[panel][point.label].append((x, 100 * point.mean.accuracy, 100 * (point.std or 0.0)))
            if reported and x is not None:
                crosses[panel].append((x, reported.accuracy))
    names = list(dict.fromkeys(point.label for point in points))
    drawing, axes = canvas(max(3.4 * len(panels) + 1.2, 7.2), 4.2, max(len(panels), 1))
    for place, (axis, (panel, series)) in enumerate(zip(axes, panels.items(), strict=False)):
        for name, found in series.items():
            i = names.index(name)
            colour, style = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            if found[0][0] is None:
                mean, std = found[0][1:]
                axis.axhline(mean, color=colour, linestyle=style, label=name)
                axis.axhspan(mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
                continue
            found.sort(key=lambda each: each[0] or 0.0)
            xs = [x or 0.0 for x, _, _ in found]
            means, stds = [m for _, m, _ in found], [s for _, _, s in found]
            line = "" if figure.x == "kept" else style
            axis.plot(xs, means, color=colour, linestyle=line, marker=MARKERS[i % len(MARKERS)], label=name)
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if panel in crosses:
            axis.plot(*zip(*crosses[panel], strict=True), "x", color="#000000", markersize=8, label="the paper")
        for reported in figure.reported:
            if reported.best and reported.label in series and panel_of(figure, reported.values) == panel:
                axis.axhline(reported.accuracy, color="#000000", linestyle=":", linewidth=1, label="the paper's best")
        axis.set(xlabel=figure.x_label, title=panel, ylabel="" if place else "accuracy (%)")
        if figure.x == K:
            axis.set_xlim(0, 100)
        axis.grid(alpha=0.3)
    if axes and panels:
        handles: dict[str, object] = {}
        for axis in axes:
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        drawing.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=3 if len(panels) < 3 else 4, fontsize=8
        )
    drawing.suptitle(f"{figure.title}\n{note}", fontsize=9)
    write_figure(drawing, path)
