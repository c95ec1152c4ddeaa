"""The masks of a sweep in one bank: a table of tasks × accuracy, with and without being told the task."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..atomic import write_atomically
from ..data.batches import Progress, quiet
from ..experiment.tasks import TaskResult, TaskTable, evaluate_tasks
from ..models.pretrained import weights_file
from .results import Outcome, State


def evaluate_bank(outcomes: Sequence[Outcome], output: str | Path, progress: Progress = quiet) -> TaskTable | None:
    """Put the masks of a sweep's finished runs in one bank, measure each task, and write tasks.csv into `output`.

    Tasks have the titles of their runs, such as `permute_seed=3`.

    Args:
        outcomes: as `execute` returns them.
        output: the sweep's folder.
        progress: as for `evaluate`.

    Returns the table; None if no run is finished.

    Raises:
        ArtifactError: a file is damaged, or for other weights than the first.
        DataError: a data set is missing or does not fit.
    """
    output = Path(output)
    runs = [outcome.run for outcome in outcomes if outcome.state is State.FINISHED]
    if not runs:
        return None
    titles = [run.title or run.label for run in runs]
    names = {
        t if titles.count(t) == 1 else run.folder(output).path.name: run for t, run in zip(titles, runs, strict=True)
    }
    found = evaluate_tasks(
        {name: run.folder(output).final for name, run in names.items()},
        base=weights_file(runs[0].recipe.model.pretrained),
        data={name: run.recipe.data for name, run in names.items()},
        progress=progress,
    )
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(TaskResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(task) for task in found.tasks)
    write_atomically(output / "tasks.csv", file.getvalue().encode())
    return found
