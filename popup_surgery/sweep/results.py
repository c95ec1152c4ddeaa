"""Results of a sweep: of each run, and averaged over the seeds."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import PopupError
from ..experiment.results import counts
from .grid import Run
from .names import as_text


class State(StrEnum):
    """State of a run. A stopped run was asked to stop and resumes with the sweep."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Numbers:
    """Results of one run, or means over several.

    Attributes:
        accuracy: accuracy on the validation images after the last epoch, 0 … 1.
        seconds: time spent on the epochs, in seconds.
        size: size of the artifact or the dense weights, in bytes.
        weights, kept: number of masked weights, and of those that the mask keeps; a dense run keeps all.
        stored: bytes of the file's tensors, which are masks and what stands beside them: without header and manifest.
    """

    accuracy: float
    seconds: float
    size: float
    weights: float
    kept: float
    stored: float = math.nan


@dataclass(frozen=True)
class Outcome:
    """A run and its state, with numbers once it is finished, or one sentence as `error` if it failed."""

    run: Run
    state: State = State.WAITING
    numbers: Numbers | None = None
    error: str = ""

    @classmethod
    def read(cls, run: Run, output: Path) -> "Outcome":
        """Read the outcome of a run from its folder in `output`: finished, waiting, or failed if it is damaged."""
        folder = run.folder(output)
        try:
            if not folder.finished:
                return cls(run)
            folder.check_recipe()
            epochs = folder.history()
            seconds = sum(epoch["seconds"] for epoch in epochs)
            size = folder.final.stat().st_size
            numbers = Numbers(epochs[-1]["accuracy"], seconds, size, *counts(folder), size - _header(folder.final))
        except PopupError as error:
            return cls(run, State.FAILED, error=str(error))
        except (OSError, ValueError, LookupError) as error:
            return cls(run, State.FAILED, error=f"{folder.path} is damaged ({error!r}); remove it to run it again")
        folder.finish()  # a run that was killed after it wrote its last file leaves its checkpoints behind
        return cls(run, State.FINISHED, numbers)


def _header(file: Path) -> int:
    """Return how many bytes of a safetensors file come before its tensors."""
    with file.open("rb") as start:
        return 8 + int.from_bytes(start.read(8), "little")


@dataclass(frozen=True)
class Point:
    """One point of a grid, over its seeds.

    Attributes:
        outcomes: its runs, one for each seed.
        n: number of finished runs.
        mean: means over the finished runs; None if there is none.
        std: sample standard deviation (n − 1) of their accuracies; None for fewer than two.
    """

    label: str
    values: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    n: int
    mean: Numbers | None
    std: float | None


def points(outcomes: Sequence[Outcome]) -> list[Point]:
    """Return the grid points of a sweep's outcomes, in its order."""
    found = []
    for _, group in groupby(outcomes, lambda outcome: outcome.run.point):
        runs = tuple(group)
        done = [outcome.numbers for outcome in runs if outcome.numbers is not None]
        mean = Numbers(*map(statistics.mean, zip(*map(astuple, done), strict=True))) if done else None
        std = statistics.stdev(numbers.accuracy for numbers in done) if len(done) > 1 else None
        found.append(Point(runs[0].run.label, runs[0].run.values, runs, len(done), mean, std))
    return found


def write(name: str, outcomes: Sequence[Outcome], output: Path) -> None:
    """Write results.json, results.csv and runs.csv into the folder `output`."""
    found = points(outcomes)
    states = [outcome.state for outcome in outcomes]
    tally = {state.value: states.count(state) for state in (State.FINISHED, State.FAILED)}
    values = {"sweep": name, "runs": len(outcomes), **tally, "points": [_as_json(point, output) for point in found]}
    write_atomically(output / "results.json", (json.dumps(values, indent=1, default=str) + "\n").encode())
    write_atomically(output / "results.csv", _as_csv(found).encode())
    write_atomically(output / "runs.csv", _runs_csv(found, output).encode())


def _written(numbers: Numbers | None) -> dict[str, Any]:
    """Return the numbers that a sweep's files have; None for what is not known yet."""
    names = [field.name for field in fields(Numbers) if field.name != "stored"]
    return {name: numbers and getattr(numbers, name) for name in names}


def _columns(point: Point) -> dict[str, Any]:
    """Return n, accuracy, std, seconds, size, weights and kept; None for what is not known yet."""
    mean = _written(point.mean)
    return {"n": point.n, "accuracy": mean.pop("accuracy"), "std": point.std, **mean}


def _as_json(point: Point, output: Path) -> dict[str, Any]:
    """Return a point and its runs as a JSON object."""
    runs = [
        {
            "seed": outcome.run.seed,
            "folder": outcome.run.folder(output).path.name,
            "state": outcome.state.value,
            "accuracy": outcome.numbers and outcome.numbers.accuracy,
            "error": outcome.error,
        }
        for outcome in point.outcomes
    ]
    return {"label": point.label, "values": point.values, **_columns(point), "runs": runs}


def _as_csv(found: Sequence[Point]) -> str:
    """Return the points as CSV, one row each."""
    rows = [(point.label, point.values, _columns(point)) for point in found]
    return _csv(rows)


def _runs_csv(found: Sequence[Point], output: Path) -> str:
    """Return the runs as CSV, one row each, with seed, state, numbers, folder and error."""
    rows = []
    for outcome in (outcome for point in found for outcome in point.outcomes):
        run, numbers = outcome.run, _written(outcome.numbers)
        about = {"seed": run.seed, "state": outcome.state.value, **numbers, "folder": run.folder(output).path.name}
        rows.append((run.label, run.values, {**about, "error": outcome.error}))
    return _csv(rows)


def _csv(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Return rows of a label, the grid's values and further columns as CSV."""
    keys = list(dict.fromkeys(key for _, values, _ in rows for key in values))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *keys, *rows[0][2]])
    for label, values, more in rows:
        writer.writerow([label, *(as_text(values[key]) if key in values else "" for key in keys), *more.values()])
    return file.getvalue()
