"""Sweeps: many runs of one or several recipes, on one machine or a cluster, and one table of their results.

`Sweep.load` lists the runs, `execute` runs those that are not finished, and `points` makes the table of results.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout

from ..atomic import check_writable
from ..data.open import check_root
from ..errors import PopupError, RunError, Stopped
from ..signals import asked_to_stop
from .engines import Engine, Local, OnRay
from .grid import Run, Sweep
from .names import as_text
from .picture import draw
from .results import Outcome, Point, State, points, write

__all__ = ["Engine", "Local", "OnRay", "Outcome", "Point", "Run", "State", "Sweep", "as_text", "execute", "points"]

Report = Callable[[Sequence[Outcome], Outcome | None], None]


def execute(
    sweep: Sweep,
    output: str | Path,
    engine: Engine | None = None,
    report: Report = lambda outcomes, changed: None,
) -> list[Outcome]:
    """Run the unfinished runs of a sweep.

    results.json, results.csv and runs.csv are written at the start and whenever a run ends, and results.png at the end.
    A run that fails does not stop the others.

    Args:
        output: the sweep's folder, with one folder in it for each run. Several sweeps can use it, one after another.
        engine: where the runs take place; `Local()` if not given. Artifacts do not depend on it.
        report: called with all outcomes and the one that changed, if any: at the start, at each change, and about ten
            times a second.

    Returns the outcomes, in the sweep's order.

    Raises:
        DataError: a run's data set needs a folder, and none is given.
        RunError: another sweep runs in `output`, or `output` is a run's folder.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came. The runs have saved checkpoints, and the next call resumes them.
        PopupError: `output` cannot be written, or the engine is not available.
    """
    output, engine = Path(output), engine or Local()
    for run in sweep.runs:
        check_root(run.recipe.data)
    if os.path.exists(output / "recipe.yaml"):
        raise RunError(f"{output} is the folder of a run; expected the folder of a sweep, which holds run folders")
    lock = FileLock(output / "lock", timeout=0)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"another sweep runs in {output}; wait for it, or choose another folder") from None
    except OSError as error:
        raise PopupError(f"{output} cannot be written: {error.strerror}") from error
    try:
        with engine.ready(), asked_to_stop() as stop:
            check_writable(output / "results.png")
            outcomes = {run.name: Outcome.read(run, output) for run in sweep.runs}
            write(sweep.name, list(outcomes.values()), output)
            report(list(outcomes.values()), None)
            todo = [outcome.run for outcome in outcomes.values() if outcome.state is State.WAITING]
            with closing(engine.run(todo, output, stop)) as events:
                for event in events:
                    changed = None
                    if event is not None:
                        changed = _after(*event, output)
                        outcomes[changed.run.name] = changed
                        if changed.state is not State.RUNNING:
                            write(sweep.name, list(outcomes.values()), output)
                    report(list(outcomes.values()), changed)
            draw(sweep.name, points(list(outcomes.values())), output / "results.png")
    finally:
        (output / "lock").unlink(missing_ok=True)  # before the release: afterwards it may be another process's
        lock.release()
    states = [outcome.state for outcome in outcomes.values()]
    if {State.STOPPED, State.WAITING} & set(states):
        raise Stopped(f"stopped with {states.count(State.FINISHED)} of {len(states)} runs finished")
    return list(outcomes.values())


def _after(run: Run, state: State, error: str, output: Path) -> Outcome:
    if state is not State.FINISHED:
        return Outcome(run, state, error=error)
    outcome = Outcome.read(run, output)
    if outcome.state is State.WAITING:
        return Outcome(run, State.FAILED, error="the run has ended, but its file is missing")
    return outcome
