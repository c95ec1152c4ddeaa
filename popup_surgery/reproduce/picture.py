"""The figures themselves, with the paper's axes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..plots import canvas, write_figure
from ..sweep import Point
from .figures import Figure
from .table import rows, series_of

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes serve those who print in grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")


def draw(figure: Figure, points: Sequence[Point], note: str, path: Path) -> None:
    """Accuracy over x, mean and a band of one standard deviation, and the paper's numbers as crosses.

    What has no x is a horizontal line. The format is that of the path's suffix.
    """
    panels: dict[str, dict[str, list[tuple[float | None, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        panel, label, x = series_of(figure, point)
        if point.mean is not None:
            panels[panel][label].append((x, 100 * point.mean.accuracy, 100 * (point.std or 0.0)))
    percent = figure.x == "surgery.k"
    factor = 100 if percent else 1
    names = list(dict.fromkeys(series_of(figure, point)[1] for point in points))
    drawing, axes = canvas(max(3.4 * len(panels) + 1.2, 7.2), 4.2, max(len(panels), 1))
    known = [row for row in rows(figure, points) if row.paper is not None and row.accuracy is not None]
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
            xs = [factor * (x or 0.0) for x, _, _ in found]
            means, stds = [m for _, m, _ in found], [s for _, _, s in found]
            line = "" if figure.x == "kept" else style
            axis.plot(xs, means, color=colour, linestyle=line, marker=MARKERS[i % len(MARKERS)], label=name)
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        crosses = [
            (float(row.where[2].rsplit(" ", 1)[-1].replace(",", "")), row.paper)
            for row in known
            if row.where[0] == panel and row.where[2]
        ]
        if crosses:
            axis.plot(*zip(*crosses, strict=True), "x", color="#000000", markersize=8, label="the paper")
        axis.set(xlabel=figure.x_label, title=panel, ylabel="" if place else "accuracy (%)")
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
