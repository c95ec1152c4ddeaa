"""What the runs of a sweep gave, each by itself and over the seeds."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import PopupError
from ..experiment.results import counts
from .grid import Run, as_text


class State(StrEnum):
    """Where a run is; a stopped one was told to stop, and goes on when the sweep does."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Numbers:
    """What one run gave, or the means over several.

    Attributes:
        accuracy: of the last epoch on the validation images, 0 … 1.
        seconds: spent on the epochs.
        size: of the artifact or the dense weights, in bytes.
        weights, kept: masked weights and how many take part; a dense run keeps all.
    """

    accuracy: float
    seconds: float
    size: float
    weights: float
    kept: float


@dataclass(frozen=True)
class Outcome:
    """A run and what is known of it: numbers once it is finished, one sentence if it failed."""

    run: Run
    state: State = State.WAITING
    numbers: Numbers | None = None
    error: str = ""

    @classmethod
    def read(cls, run: Run, output: Path) -> "Outcome":
        """The outcome of a run from its folder in `output`: finished, waiting, or failed where that is damaged."""
        folder = run.folder(output)
        try:
            if not folder.finished:
                return cls(run)
            folder.check_recipe()
            epochs = folder.history()
            seconds = sum(epoch["seconds"] for epoch in epochs)
            numbers = Numbers(epochs[-1]["accuracy"], seconds, folder.final.stat().st_size, *counts(folder))
        except PopupError as error:
            return cls(run, State.FAILED, error=str(error))
        except (OSError, ValueError, LookupError) as error:
            return cls(run, State.FAILED, error=f"{folder.path} is damaged ({error!r}); remove it to run it anew")
        folder.finish()  # a run that was killed after its last file has left its checkpoints
        return cls(run, State.FINISHED, numbers)


@dataclass(frozen=True)
class Point:
    """One point of a grid, over its seeds.

    Attributes:
        outcomes: its runs.
        n: how many of them are finished.
        mean: over these; None where there is none.
        std: standard deviation of their accuracies, of the sample (n − 1); None for less than two.
    """

    label: str
    values: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    n: int
    mean: Numbers | None
    std: float | None


def points(outcomes: Sequence[Outcome]) -> list[Point]:
    """The grid points of a sweep's outcomes, in its order."""
    found = []
    for _, group in groupby(outcomes, lambda outcome: outcome.run.point):
        runs = tuple(group)
        done = [outcome.numbers for outcome in runs if outcome.numbers is not None]
        mean = Numbers(*map(statistics.mean, zip(*map(astuple, done), strict=True))) if done else None
        std = statistics.stdev(numbers.accuracy for numbers in done) if len(done) > 1 else None
        found.append(Point(runs[0].run.label, runs[0].run.values, runs, len(done), mean, std))
    return found


def write(name: str, outcomes: Sequence[Outcome], output: Path) -> None:
    """Write results.json and results.csv into the folder `output`."""
    found = points(outcomes)
    states = [outcome.state for outcome in outcomes]
    tally = {state.value: states.count(state) for state in (State.FINISHED, State.FAILED)}
    values = {"sweep": name, "runs": len(outcomes), **tally, "points": [_as_json(point) for point in found]}
    write_atomically(output / "results.json", (json.dumps(values, indent=1, default=str) + "\n").encode())
    write_atomically(output / "results.csv", _as_csv(found).encode())


def _columns(point: Point) -> dict[str, Any]:
    """n, accuracy, std, seconds, size, weights, kept; None for what is not known yet."""
    mean = asdict(point.mean) if point.mean else dict.fromkeys(field.name for field in fields(Numbers))
    return {"n": point.n, "accuracy": mean.pop("accuracy"), "std": point.std, **mean}


def _as_json(point: Point) -> dict[str, Any]:
    runs = [
        {
            "seed": outcome.run.seed,
            "folder": outcome.run.name,
            "state": outcome.state.value,
            "accuracy": outcome.numbers and outcome.numbers.accuracy,
            "error": outcome.error,
        }
        for outcome in point.outcomes
    ]
    return {"label": point.label, "values": point.values, **_columns(point), "runs": runs}


def _as_csv(found: Sequence[Point]) -> str:
    keys = list(dict.fromkeys(key for point in found for key in point.values))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *keys, *_columns(found[0])])
    for point in found:
        values = [as_text(point.values[key]) if key in point.values else "" for key in keys]
        writer.writerow([point.label, *values, *_columns(point).values()])
    return file.getvalue()
