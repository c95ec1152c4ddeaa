import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from ..errors import PopupError, Stopped
from .shared import busy, messages, printable, progress, refuse_file, show

if TYPE_CHECKING:
    from ..sweep import Local, OnRay, Outcome, Point, Report, Sweep


class On(StrEnum):
    ray = "ray"


Seeds = Annotated[str | None, typer.Option(help="Number of seeds, counted from 0, or a list such as [3, 4].")]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at a time on this machine; default: one for each GPU, or else for each CPU core."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of each run, in place of training.threads; results depend on it.")
]
Pack = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Runs at a time on each GPU, which share it by NVIDIA's MPS; default: 1; auto: the number that is fastest "
        "in a short trial.",
    ),
]
OnOption = Annotated[On | None, typer.Option(help="Run on a Ray cluster.")]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; default: the one of this machine, or a new one.")
]
GpusPerRun = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each run on Ray; default: 1 if the cluster has GPUs.")
]
DryRun = Annotated[
    bool, typer.Option(help="Measure a few steps, print the number of runs and their time, and run nothing.")
]


def run(
    sweep: Annotated[str, typer.Argument(help="A sweep's YAML file (docs/sweeps.md), or a recipe as for train.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key=value of any recipe key; key=[value, …] makes a grid over its values; repeatable."
        ),
    ] = None,
    seeds: Seeds = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the sweep; default: runs/sweeps/<sweep>.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set, in place of data.root.")] = None,
    jobs: Jobs = None,
    threads: Threads = None,
    pack: Pack = None,
    on: OnOption = None,
    address: Address = None,
    gpus_per_run: GpusPerRun = None,
    dry_run: DryRun = False,
) -> int:
    """Run a grid over recipe keys × seeds; write a folder for each run, and tables and a picture.

    \b
    $ popup-surgery sweep digits --set training.epochs=1 --set 'surgery.k=[0.3, 0.5]' --seeds 2
    1/4  digits surgery.k=0.3 seed 0  accuracy 45.96 %  0.4 s
    2/4  digits surgery.k=0.3 seed 1  accuracy 30.92 %  0.3 s
    3/4  digits surgery.k=0.5 seed 0  accuracy 72.42 %  0.3 s
    4/4  digits surgery.k=0.5 seed 1  accuracy 78.83 %  0.5 s
            surgery.k  runs  accuracy         time   file         kept
    digits  0.3        2/2   38.44 ± 10.64 %  0.4 s  7,334 bytes  30.0 %
    digits  0.5        2/2   75.63 ± 4.53 %   0.4 s  7,326 bytes  50.0 %
    wrote runs/sweeps/digits/results.csv, runs.csv, results.json and results.png
    """
    refuse_file(sweep, "sweep or recipe")
    with busy("starting"):
        from .. import sweep as sweeps
        from ..config.yaml import parse_yaml
        from ..sweep.grid import default_folder

        engine = chosen(jobs, threads, pack, on, address, gpus_per_run, data_dir)
        number = None if seeds is None else parse_yaml(seeds, f"--seeds {seeds}")
        loaded = sweeps.Sweep.load(sweep, set_ or (), seeds=number, data_dir=data_dir, output=output)
    folder = output or default_folder(loaded.name)
    if dry_run:
        estimate(loaded, folder, engine)
        return 0
    try:
        with shown(folder) as report:
            outcomes = sweeps.execute(loaded, folder, engine, report)
    except Stopped as error:
        messages.print(f"{error}; run the same command again to resume", markup=False, soft_wrap=True)
        return error.status
    show(_table(sweeps.points(outcomes)))
    more = ""
    if loaded.bank and (tasks := sweeps.evaluate_bank(outcomes, folder, progress)) is not None:
        show(f"\n{tasks}")
        more = "tasks.csv, "
    show(f"wrote {folder}/results.csv, runs.csv, {more}results.json and results.png")
    return 1 if any(outcome.state is sweeps.State.FAILED for outcome in outcomes) else 0


def chosen(
    jobs: int | None,
    threads: int | None,
    pack: str | None,
    on: On | None,
    address: str | None,
    gpus_per_run: float | None,
    data_dir: Path | None,
) -> "Local | OnRay":
    """Return the engine that a command's options select."""
    from ..sweep import Local, OnRay

    if on is None and data_dir is not None and not data_dir.exists():
        raise PopupError(f"--data-dir is {data_dir}, which does not exist")
    for name, value in (("--address", address), ("--gpus-per-run", gpus_per_run)):
        if on is None and value is not None:
            raise PopupError(f"{name} is {value}; it works only with --on ray")
    if on is not None and jobs is not None:
        raise PopupError(f"--jobs is {jobs}; it works only without --on ray, which fills the cluster by itself")
    if pack is not None and on is not None:
        raise PopupError(f"--pack is {pack}; it works only without --on ray, which takes --gpus-per-run")
    if pack is not None and jobs is not None:
        raise PopupError(f"--pack is {pack} and --jobs is {jobs}; expected one of them: both set the runs at a time")
    return OnRay(address, gpus_per_run, threads) if on else Local(jobs, threads, pack=_number(pack or "1"))


def _number(pack: str) -> int | Literal["auto"]:
    """Return the value of `--pack`."""
    if pack == "auto":
        return "auto"
    if not re.fullmatch("[1-9][0-9]{0,8}", pack):
        raise PopupError(f"--pack is {pack}; expected an integer from 1, or auto")
    return int(pack)


@contextmanager
def shown(folder: Path) -> "Iterator[Report]":
    """Context manager: yield a function that reports a sweep: a live table on a terminal, else a line for each run."""
    from ..sweep import State, points

    live = Live(console=messages, transient=True, refresh_per_second=4) if messages.is_terminal else None
    began = drawn = time.monotonic()
    earlier = -1  # runs that had ended before this call

    def report(outcomes: "Sequence[Outcome]", changed: "Outcome | None") -> None:
        """Show what has changed since the last call."""
        nonlocal drawn, earlier
        states = [outcome.state for outcome in outcomes]
        ended = states.count(State.FINISHED) + states.count(State.FAILED)
        new = [] if changed is None else [changed]
        if earlier < 0:
            earlier, new = ended, [outcome for outcome in outcomes if outcome.state is State.FAILED]
            if ended and live is None:
                show(f"{ended} of {len(outcomes)} runs had ended before")
        for outcome in new:
            if outcome.state is State.FAILED:
                where = outcome.run.folder(folder).path
                text = f"{outcome.run} failed: {outcome.error}; its folder is {where}"
                messages.print(printable(text), markup=False, soft_wrap=True)
            elif outcome.numbers is not None and live is None:
                accuracy, seconds = _percent(outcome.numbers.accuracy), outcome.numbers.seconds
                show(f"{ended}/{len(outcomes)}  {outcome.run}  accuracy {accuracy}  {seconds:.1f} s")
        if live is not None and time.monotonic() - drawn > 0.5:
            drawn = time.monotonic()
            line = f"{ended} of {len(outcomes)} runs have ended, {states.count(State.FAILED)} failed"
            if ended > earlier:
                line += f", {_clock((drawn - began) / (ended - earlier) * (len(outcomes) - ended))} left"
            live.update(Group(_table(points(outcomes), folder), line))

    with live or nullcontext():
        yield report


def _table(points: "Sequence[Point]", folder: Path | None = None) -> Table:
    """Return a table with a row for each grid point.

    With the sweep's folder it also shows the epochs of unfinished runs, and has only as many rows as fit the screen.
    """
    from ..sweep import as_text

    keys = list(dict.fromkeys(key for point in points for key in point.values))
    columns = ["", *keys, "runs", "accuracy", "time", "file", "kept", *(["epochs so far"] if folder else [])]
    table = Table(*columns, box=None, header_style="", padding=(0, 2, 0, 0))
    rows = [(point, _epochs(point, folder) if folder else "") for point in points]
    room = max(1, messages.height - 4)
    if folder and len(rows) > room:
        rows = sorted(rows, key=lambda row: not row[1])[:room]
    for point, epochs in rows:
        values = [as_text(point.values[key]) if key in point.values else "" for key in keys]
        cells = ["", "", "", ""]
        if (mean := point.mean) is not None:
            size, kept = f"{mean.size:,.0f} bytes", f"{100 * mean.kept / mean.weights:.1f} %"
            cells = [_percent(mean.accuracy, point.std), f"{mean.seconds:.1f} s", size, kept]
        failed = sum(outcome.state == "failed" for outcome in point.outcomes)
        runs = f"{point.n}/{len(point.outcomes)}" + (f", {failed} failed" if failed else "")
        table.add_row(point.label, *values, runs, *cells, *([epochs] if folder else []))
    return table


def _epochs(point: "Point", folder: Path) -> str:
    """Return the epochs done by each unfinished run that has begun, such as 2/10."""
    found = []
    for outcome in point.outcomes:
        if outcome.state in ("waiting", "running"):
            lines = outcome.run.folder(folder).path / "metrics.jsonl"
            count = lines.read_text().count('"accuracy"') if lines.exists() else 0
            if count or outcome.state == "running":
                found.append(f"{count}/{outcome.run.recipe.epochs}")
    return " ".join(found)


def _percent(accuracy: float, std: float | None = None) -> str:
    return f"{100 * accuracy:.2f}{'' if std is None else f' ± {100 * std:.2f}'} %"


def estimate(sweep: "Sweep", folder: Path, engine: "Local | OnRay") -> None:
    """Print how many runs a sweep has, and about how long the unfinished ones take."""
    from ..sweep import Local
    from ..sweep.estimate import measure

    todo = [run for run in sweep.runs if not run.folder(folder).finished]
    show(f"{len(sweep.runs)} runs, {len(sweep.runs) - len(todo)} of them finished")
    if sweep.base is not None and not sweep.base.folder(folder).finished:
        show(f"they start from the weights of {sweep.base}; once it is finished, they can be measured too")
        todo = [sweep.base]
    table = Table("runs", "such as", "start", "step", "each run", box=None, header_style="", padding=(0, 2, 0, 0))
    total = 0.0
    for kind in measure(todo, engine.threads, progress):
        seconds = sum(map(kind.seconds, kind.runs))
        total += seconds
        cells = f"{kind.start:.1f} s", f"{1000 * kind.step:.1f} ms", _clock(seconds / len(kind.runs))
        table.add_row(str(len(kind.runs)), str(kind.runs[0]), *cells)
    if todo:
        show(table)
        places = None
        if isinstance(engine, Local):
            if engine.pack == "auto":
                with engine.ready():
                    engine = engine.packed(todo)
            places = engine.places(todo)
        together = f", {_clock(total / min(places, len(todo)))} with {places} at a time" if places else ""
        show(f"about {_clock(total)} one after another{together}")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
