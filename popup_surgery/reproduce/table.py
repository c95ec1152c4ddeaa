"""The table of a figure: our numbers beside the paper's."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from ..sweep import Point, as_text
from .figures import NET, Figure, K, Reported

NUMBERS = ("kept", "stored")  # what of a run's numbers may be the x axis


@dataclass(frozen=True)
class Row:
    """A row of the table: one point of the figure.

    Attributes:
        network, series: labels of the network and the series.
        x: the position on the x axis; None if the series is the same for all x.
        n: number of finished seeds.
        accuracy, std: mean and standard deviation over the seeds, in %; None if there is none.
        paper: the paper's accuracy, or that of the figure's baseline at the same x, in %; None if there is none.
        read: where the paper's number was read.
        best: whether it is the best of the series over x.
    """

    network: str
    series: str
    x: float | None
    n: int
    accuracy: float | None
    std: float | None
    paper: float | None = None
    read: str = ""
    best: bool = False

    @property
    def difference(self) -> float | None:
        """Accuracy minus the paper's or the baseline's, in percentage points."""
        return None if self.accuracy is None or self.paper is None else self.accuracy - self.paper


def rows(figure: Figure, points: Sequence[Point]) -> list[Row]:
    """Return a row for each point, and one for each best over x that the paper has a number for."""
    found = [_row(figure, point, match(figure, point)) for point in points]
    if figure.baseline:
        return [replace(row, paper=_baseline(figure, row, found)) for row in found]
    for reported in figure.reported:
        series = [point for point in points if _belongs(reported, point) and point.mean is not None]
        if reported.best and series:
            best = max(series, key=lambda point: point.mean.accuracy if point.mean else 0.0)
            found.append(replace(_row(figure, best, reported), best=True))
    return found


def match(figure: Figure, point: Point) -> Reported | None:
    """Return what the paper reports for a point, or None."""
    return next((each for each in figure.reported if not each.best and _belongs(each, point)), None)


def x_of(figure: Figure, point: Point) -> float | None:
    """Return the position of a point on the x axis, for k in %; None if the point is the same for all x."""
    if figure.x in NUMBERS:
        return getattr(point.mean, figure.x) if point.mean else None
    x = point.values.get(figure.x)
    return None if x is None else 100 * float(x) if figure.x == K else float(x)


def panel_of(figure: Figure, values: Mapping[str, Any]) -> str:
    """Return the panel of a run with these grid values: a network's name, or an empty text if there is one panel."""
    return short(values.get(figure.panels or "", ""))


def short(network: Any) -> str:
    """Return a network's name without its library."""
    return as_text(network).rsplit("/", 1)[-1]


def as_markdown(figure: Figure, table: Sequence[Row], note: str) -> str:
    """Return the table as Markdown, under the figure's title and scale."""
    lines = [f"# {figure.title}", "", f"Scale: {note}.", ""]
    other = figure.baseline or "paper"
    lines += [f"| network | series | {figure.x_label} | accuracy (%) | seeds | {other} (%) | difference |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in table:
        x = "" if row.x is None else f"{row.x:,.0f}" if figure.x in NUMBERS else f"{row.x:g}"
        x = ", ".join(["best"] * row.best + [x] * bool(x))
        ours = "" if row.accuracy is None else f"{row.accuracy:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")
        paper = "" if row.paper is None else f"{row.paper:g} ({row.read})" if row.read else f"{row.paper:.2f}"
        difference = "" if row.difference is None else f"{row.difference:+.1f}"
        lines.append(f"| {row.network} | {row.series} | {x} | {ours} | {row.n} | {paper} | {difference} |")
    return "\n".join(lines) + "\n"


def as_json(figure: Figure, table: Sequence[Row], note: str) -> str:
    """Return the table as JSON, with the figure's title and scale."""
    found = [asdict(row) | {"difference": row.difference} for row in table]
    return json.dumps({"title": figure.title, "scale": note, "rows": found}, indent=1) + "\n"


def _row(figure: Figure, point: Point, reported: Reported | None) -> Row:
    accuracy = None if point.mean is None else 100 * point.mean.accuracy
    std = None if point.std is None else 100 * point.std
    paper, read = (reported.accuracy, reported.read) if reported else (None, "")
    return Row(short(point.values.get(NET, "")), point.label, x_of(figure, point), point.n, accuracy, std, paper, read)


def _baseline(figure: Figure, row: Row, found: Sequence[Row]) -> float | None:
    """Return the baseline's accuracy at a row's x, on straight lines over log x; None outside of its range."""
    if row.series == figure.baseline or not row.x:
        return None
    curve = sorted(
        (math.log(each.x), each.accuracy)
        for each in found
        if each.series == figure.baseline and each.network == row.network and each.x and each.accuracy is not None
    )
    x = math.log(row.x)
    for (left, low), (right, high) in pairwise(curve):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left) if right > left else low
    return None


def _belongs(reported: Reported, point: Point) -> bool:
    return point.label == reported.label and all(point.values.get(k) == v for k, v in reported.values.items())
