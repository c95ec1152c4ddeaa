"""A picture of a sweep's results: accuracy over what varies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import Group, Series, draw_groups, draw_series
from .names import titles
from .results import Point

MOST = 60  # rows of a picture


def draw(name: str, points: Sequence[Point], path: Path) -> None:
    """Draw the accuracy of the finished runs of a sweep, a dot for each, as a PNG. Nothing is drawn without any.

    If a key has different numbers, it is the x axis, with a line through the means of each series. Otherwise each point
    of the grid has a row.
    """
    done = [point for point in points if point.mean is not None]
    if not done:
        return
    key = _numeric(done)
    if key is None:
        names = titles([_Row(point.label, dict(point.values)) for point in done])
        groups = [Group(title or point.label, _accuracies(point), []) for title, point in zip(names, done, strict=True)]
        best = sorted(groups, key=lambda group: -max(group.accuracies))[:MOST]
        shown = [group for group in groups if group in best][:MOST]
        more = f", the best {MOST} of {len(groups)} points" if len(groups) > MOST else ""
        draw_groups(path, f"{name}{more}", shown)
        return
    rest = [_Row(point.label, {k: v for k, v in point.values.items() if k != key}) for point in done]
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for title, point in zip(titles(rest), done, strict=True):
        series.setdefault(title or point.label, []).append((float(point.values[key]), _accuracies(point)))
    draw_series(path, name, key, [Series(title, sorted(places)) for title, places in series.items()])


class _Row:
    """A point of the grid, for its title: without a seed of its own."""

    seed = 0

    def __init__(self, label: str, values: dict[str, Any]) -> None:
        self.label, self.values = label, values


def _numeric(points: Sequence[Point]) -> str | None:
    """Return the first key that has different numbers, and has one in every point."""
    for key in points[0].values:
        values = [point.values.get(key) for point in points]
        if all(type(value) in (int, float) for value in values) and len(set(values)) > 1:
            return key
    return None


def _accuracies(point: Point) -> list[float]:
    return [outcome.numbers.accuracy for outcome in point.outcomes if outcome.numbers is not None]
