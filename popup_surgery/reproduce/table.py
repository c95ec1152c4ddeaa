"""Our numbers beside the paper's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..sweep import Point, as_text
from .figures import Figure, Reported


@dataclass(frozen=True)
class Row:
    """A point of the figure. Accuracies in %; None where there is none.

    Attributes:
        where: panel, series and x, as text.
        n: finished seeds.
    """

    where: tuple[str, str, str]
    n: int
    accuracy: float | None
    std: float | None
    paper: float | None = None
    read: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in points."""
        return None if self.accuracy is None or self.paper is None else self.accuracy - self.paper


def rows(figure: Figure, points: Sequence[Point]) -> list[Row]:
    """A row for each point, and one for each best over x that the paper has a number for."""
    found = [_row(figure, point, _match(figure, point)) for point in points]
    for reported in figure.reported:
        if reported.best:
            series = [point for point in points if _belongs(reported, point) and point.mean is not None]
            if series:
                best = max(series, key=lambda point: point.mean.accuracy if point.mean else 0.0)
                row = _row(figure, best, reported)
                panel, label, x = row.where
                found.append(Row((panel, label, f"best, {x}"), row.n, row.accuracy, row.std, row.paper, row.read))
    return found


def series_of(figure: Figure, point: Point) -> tuple[str, str, float | None]:
    """The panel and the series that a point belongs to, and its x; None where it is the same for all x."""
    kept = point.mean.kept if point.mean else None
    x = kept if figure.x == "kept" else point.values.get(figure.x)
    return panel_of(figure, point.values), point.label, None if x is None else float(x)


def panel_of(figure: Figure, values: Mapping[str, Any]) -> str:
    """The panel that a run with these values of the grid belongs to: a network's name; empty where there is one."""
    return as_text(values.get(figure.panels or "", "")).rsplit("/", 1)[-1]


def as_markdown(figure: Figure, table: Sequence[Row], note: str) -> str:
    """The table under the figure's title and scale."""
    lines = [f"# {figure.title}", "", f"Scale: {note}.", ""]
    lines += [f"| network | series | {figure.x_label} | accuracy (%) | seeds | paper (%) | difference |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in table:
        ours = "" if row.accuracy is None else f"{row.accuracy:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")
        paper = "" if row.paper is None else f"{row.paper:g} ({row.read})"
        difference = "" if row.difference is None else f"{row.difference:+.1f}"
        lines.append(f"| {' | '.join(row.where)} | {ours} | {row.n} | {paper} | {difference} |")
    return "\n".join(lines) + "\n"


def as_json(figure: Figure, table: Sequence[Row], note: str) -> str:
    """The same, for programs."""
    return json.dumps({"title": figure.title, "scale": note, "rows": [asdict(row) for row in table]}, indent=1) + "\n"


def _row(figure: Figure, point: Point, reported: Reported | None) -> Row:
    panel, label, x = series_of(figure, point)
    net = as_text(point.values.get("model.name", "")).rsplit("/", 1)[-1]
    text = "" if x is None else f"{100 * x:g}" if figure.x == "surgery.k" else f"{x:,g}"
    accuracy = None if point.mean is None else 100 * point.mean.accuracy
    std = None if point.std is None else 100 * point.std
    where = (panel or net, label, text)
    paper, read = (reported.accuracy, reported.read) if reported else (None, "")
    return Row(where, point.n, accuracy, std, paper, read)


def _match(figure: Figure, point: Point) -> Reported | None:
    return next((each for each in figure.reported if not each.best and _belongs(each, point)), None)


def _belongs(reported: Reported, point: Point) -> bool:
    values: dict[str, Any] = dict(point.values)
    return point.label.startswith(reported.label) and all(values.get(k) == v for k, v in reported.values.items())
