"""Sweeps: many runs of one or several recipes, where there is room for them, and one table of what they gave.

`Sweep.load` says what the runs are, `execute` runs those that are not finished, `points` makes the table of outcomes.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.open import check_root
from ..errors import PopupError, RunError, Stopped
from ..training.run_folder import asked_to_stop
from .engines import Engine, Local, OnRay
from .grid import Run, Sweep, as_text
from .results import Outcome, Point, State, points, write

__all__ = ["Engine", "Local", "OnRay", "Outcome", "Point", "Run", "State", "Sweep", "as_text", "execute", "points"]

Report = Callable[[Sequence[Outcome], Outcome | None], None]


def execute(
    sweep: Sweep,
    output: str | Path,
    engine: Engine | None = None,
    report: Report = lambda outcomes, changed: None,
) -> list[Outcome]:
    """Run what of a sweep is not finished, and write results.json and results.csv now and whenever a run ends.

    Args:
        output: the sweep's folder, which has a folder of each run; several sweeps may follow each other in one.
        engine: where the runs run, `Local()` if not given. Artifacts do not depend on it.
        report: called with all outcomes at the start, with the one that changed too, and some ten times a second.

    Returns the outcomes, in the sweep's order. A run that fails stops no other.

    Raises:
        DataError: a run's data set needs a folder, and none is given.
        RunError: another sweep runs in `output`, or it is a run's folder.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came; the runs have kept checkpoints, and the next call goes on.
        PopupError: `output` cannot be written; the engine is not there.
    """
    output, engine = Path(output), engine or Local()
    for run in sweep.runs:
        check_root(run.recipe.data)
    if (output / "recipe.yaml").exists():
        raise RunError(f"{output} is the folder of a run; expected one for a sweep, which holds such folders")
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
    finally:
        (output / "lock").unlink(missing_ok=True)  # while it is held: after that it may be another's
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
        return Outcome(run, State.FAILED, error="the run has ended, and its file is not there")
    return outcome
