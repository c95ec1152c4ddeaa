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
from .tasks import evaluate_bank

__all__ = [
    "Engine", "Local", "OnRay", "Outcome", "Point", "Run", "State", "Sweep", "as_text", "evaluate_bank", "execute",
    "points",
]  # fmt: skip

Report = Callable[[Sequence[Outcome], Outcome | None], None]


def execute(
    sweep: Sweep,
    output: str | Path,
    engine: Engine | None = None,
    report: Report = lambda outcomes, changed: None,
) -> list[Outcome]:
    """Run the unfinished runs of a sweep.

    The sweep's base comes first. results.json, results.csv and runs.csv are written at the start and whenever a run
    ends, and results.png at the end. A run that fails does not stop the others.

    Args:
        output: the sweep's folder, with one folder in it for each run. Several sweeps can use it, one after another.
        engine: where the runs take place; `Local()` if not given. Artifacts do not depend on it.
        report: called with all outcomes and the one that changed, if any: at the start, at each change, and about ten
            times a second.

    Returns the outcomes, in the sweep's order.

    Raises:
        DataError: a run's data set needs a folder, and none is given.
        RunError: another sweep runs in `output`, or `output` is a run's folder; or the base failed, or the sweep was
            loaded for another folder than `output`, where its base would be.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came. The runs have saved checkpoints, and the next call resumes them.
        PopupError: `output` cannot be written, or the engine is not available.
    """
    output, engine = Path(output), engine or Local()
    for run in sweep.everything:
        check_root(run.recipe.data)
    if sweep.base is not None and sweep.runs[0].recipe.model.pretrained != str(sweep.base.folder(output).final):
        raise RunError(f"the sweep has a base, and was loaded for another folder; load it with output={str(output)!r}")
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
            if sweep.base is not None and outcomes:
                _train_base(sweep.base, output, engine, stop, lambda changed: report(list(outcomes.values()), changed))
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


def _train_base(
    run: Run, output: Path, engine: Engine, stop: Callable[[], bool], report: Callable[[Outcome | None], None]
) -> None:
    """Run a sweep's base, unless it is finished. `RunError` if it fails, `Stopped` if it is stopped."""
    outcome = Outcome.read(run, output)
    if outcome.state is State.WAITING:
        with closing(engine.run([run], output, stop)) as events:
            for event in events:
                outcome = outcome if event is None else _after(*event, output)
                report(None if event is None or outcome.state is State.FAILED else outcome)
    if outcome.state is State.FAILED:
        raise RunError(f"{run} failed: {outcome.error}; its folder is {run.folder(output).path}")
    if outcome.state is not State.FINISHED:
        raise Stopped(f"stopped before the end of {run}")


def _after(run: Run, state: State, error: str, output: Path) -> Outcome:
    if state is not State.FINISHED:
        return Outcome(run, state, error=error)
    outcome = Outcome.read(run, output)
    if outcome.state is State.WAITING:
        return Outcome(run, State.FAILED, error="the run has ended, but its file is missing")
    return outcome
