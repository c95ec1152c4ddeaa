"""Use of limited GPU time: checks, a trial, the runs of the paper's figure 3, and then the methods at equal bytes.

    python benchmarks/gpu.py --minutes 9 --day-minutes 13 --data DIR --output OUT
    python benchmarks/gpu.py --minutes 9 --day-minutes 13 --data DIR --output OUT    # the rest of the day

1. Device and versions, the tests marked `gpu`, and benchmarks/step.py: 90 seconds at most.
2. A trial: 4, 8 and 16 runs of Conv4 at once under NVIDIA's MPS, and 4 whose steps are CUDA graphs, 80 seconds at
   most. The number with the most steps per second is used from then on, and graphs if 4 runs are faster with them.
3. Conv4 by the paper's protocol, then Conv2, Conv6 and Conv8, then the same with another seed.
4. The methods of `popup-surgery reproduce equal-bytes`: all seeds of Conv4, then those of the other networks. What
   figure 3 has of them, dense networks and edge-popup at k = 0.1, 0.3 and 0.5, does not run again.

The most valuable runs come first. A run starts only if it will end within the day, together with the runs beside it.
Each run is an ordinary run of a sweep.

A day is one or several calls with the same `--work` folder. When a call ends, its runs stop with a checkpoint, and the
next call resumes them. The day counts the time of its calls, not the time between them.

Files in OUT: `gpu.json`, everything measured so far (rewritten after every epoch); `runs.zip`, the finished runs, from
which `popup-surgery reproduce figure3 --from OUT/runs.zip` draws the figure, and `reproduce equal-bytes` the methods;
and the logs `checks.log` and `step.log`.

A machine without a network needs this checkout, PyTorch, torchvision, timm, accelerate, scikit-learn, matplotlib,
pytest and hypothesis. It also needs, as wheels if they are missing: pydantic, pydantic-core, annotated-types,
typing-inspection, filelock, psutil, typer, rich. The data is CIFAR-10 as a folder of `train/<class>/` and
`validation/<class>/`, or a tar archive of it, which is unpacked into the work folder. Enter, the second line twice:

    python -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site:. python benchmarks/gpu.py --minutes 9 --day-minutes 13 --data cifar10.tar.xz --output OUT
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import popup_surgery as ps
from popup_surgery.atomic import write_atomically
from popup_surgery.config import Recipe
from popup_surgery.config.keys import select
from popup_surgery.errors import PopupError, RunError, Stopped
from popup_surgery.models.architecture import input_size
from popup_surgery.reproduce import sweep_of
from popup_surgery.sweep import Local, Outcome, Run, State, Sweep, execute
from popup_surgery.sweep.archive import write_archive
from popup_surgery.sweep.engines import Events, Stop, start_run
from popup_surgery.sweep.gpus import shared

ROOT = Path(__file__).parents[1]
NETWORKS = ("conv4", "conv2", "conv6", "conv8")
SHARES = (0.5, 0.3, 0.7, 0.1, 0.9)  # of weights kept, the most informative first
SERIES = ("Signed Constant", "dense, SGD", "Kaiming Normal", "dense, Adam")
METHODS = (
    "edge-popup", "dense", "global ramp", "N:M", "ERK", "coats", "IteRand", "learnt signs", "edge-popup, scaled",
    "frozen parts", "Gem-Miner", "Zhou et al.",
)  # fmt: skip
ON_GPU = ("training.compile=reduce-overhead", "training.optimizer_kwargs={fused: true}")
GRAPHS = ("training.compile=false", "training.graph=auto")  # in place of the first, where that is faster
NO_GRAPHS = ("Gem-Miner", "Zhou et al.")  # whose learners work on the host too
CLOSING = 20.0  # seconds that a call needs at its end, for checkpoints and files
CHECKS, TRIAL = 90.0, 80.0  # time limits of these phases in seconds
MARGIN = 1.03  # safety factor of a forecast
LARGEST = 16_000_000  # maximum size of a file in OUT, in bytes
IMAGES = 50_000  # in CIFAR-10's training split


# What is run ----------------------------------------------------------------------------------------------------------


def places_of_the_day(
    scale: str,
    settings: Sequence[str],
    networks: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    data_dir: Path,
    with_graphs: bool = False,
) -> list[Run]:
    """Return the runs of figure 3, those of Zhou et al. in figure 6, and then those of `methods` in equal-bytes.

    The most valuable come first. A run of figure 3 that is one of equal-bytes too is there twice. In both places its
    masks are coded as there, which its name does not depend on. `with_graphs`, those whose steps can be graphs are.
    """
    found: list[Run] = []
    most = graphed(settings) if with_graphs else settings
    coded = "surgery.encoding=range_coded"
    for seed, network in itertools.product(seeds, networks):
        own: dict[str, Any] = {"only": [network], "seeds": [seed], "data_dir": data_dir}
        found += sorted(sweep_of("figure3", scale, [coded, *most], **own).runs, key=_worth)
        figure6 = sweep_of("figure6", scale, [coded, *settings], **own).runs
        found += [run for run in figure6 if run.label.startswith("Zhou")]
    for network, seed in itertools.product(networks, seeds):
        own = {"seeds": [seed], "data_dir": data_dir}
        runs: list[Run] = []
        for graphs in (False, True):
            labels = [label for label in methods if (label not in NO_GRAPHS) == graphs]
            if labels:
                chosen = most if graphs else settings
                runs += sweep_of("equal-bytes", scale, chosen, only=[network, *labels], **own).runs
        found += sorted(runs, key=_worth)
    return found


def graphed(settings: Sequence[str]) -> list[str]:
    """Return settings with `GRAPHS` in place of those of the same keys."""
    changed = {setting.partition("=")[0] for setting in GRAPHS}
    return [*(setting for setting in settings if setting.partition("=")[0] not in changed), *GRAPHS]


def runs_of_the_day(places: Sequence[Run]) -> Sweep:
    """Return a sweep with each run once."""
    found: dict[str, Run] = {}
    for run in places:
        found.setdefault(run.name, replace(run, point=len(found)))
    return Sweep("gpu", tuple(found.values()))


def _worth(run: Run) -> tuple[int, int]:
    k = run.values.get("surgery.k")
    return (*SERIES, *METHODS).index(run.label), SHARES.index(k) if k in SHARES else len(SHARES)


def kind_of(recipe: Recipe) -> str:
    """Return a text that is the same for recipes whose steps take about the same time."""
    method = "dense"
    if not isinstance(recipe.surgery, str):
        own = select(recipe.surgery, lambda each: each.key.affects_speed and each.value != each.key.first_default)
        method = " ".join([recipe.surgery.learner, *sorted(own.keys() - {"learner"})])
    network = f"{recipe.model.name.rsplit('/', 1)[-1]} {json.dumps(recipe.model.kwargs)}"
    return f"{network}, {method}, {recipe.training.optimizer}, batch {recipe.data.batch_size}"


def flops(recipe: Recipe) -> int:
    """Return the floating-point operations of one training step of a recipe's network, without its masks."""
    from torch.utils.flop_counter import FlopCounterMode

    model = ps.build(recipe.model.name, **recipe.model.kwargs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *(recipe.data.input_size or input_size(model) or (3, 32, 32))))
    return 3 * counter.get_total_flops() * recipe.data.batch_size


# When it will end -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A running or possible run: `start` seconds until its first step, and `work` reference steps until its end."""

    start: float
    work: float


@dataclass
class Forecast:
    """A forecast of when runs that share a GPU end. They share it equally; their total speed depends on their number.

    Attributes:
        speeds: reference steps per second of all runs together, by their number, as the trial measured them.
        start: seconds from a run's start to its first step.
        priors: estimated cost of a step of each kind of run, in reference steps.
        costs: measured cost of a step of each kind of run, in reference steps; it takes precedence over `priors`.
    """

    speeds: Mapping[int, float]
    start: float
    priors: Mapping[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def speed(self, count: float) -> float:
        """Return the reference steps per second of `count` runs together.

        Below the smallest number tried, each run is as fast as at that number.
        """
        numbers = sorted(self.speeds)
        return float(np.interp(count, [0, *numbers], [0, *(self.speeds[number] for number in numbers)]))

    def cost(self, kind: str) -> float:
        return self.costs.get(kind, self.priors.get(kind, 1.0))

    def ends(self, jobs: Sequence[Job]) -> list[float]:
        """Return the seconds from now until each job ends, if no other one starts."""
        now, left = 0.0, [job.work for job in jobs]
        found = [0.0] * len(jobs)
        open_ = set(range(len(jobs)))
        while open_:
            active = [i for i in open_ if jobs[i].start <= now]
            waiting = [jobs[i].start for i in open_ if jobs[i].start > now]
            if not active:
                now = min(waiting)
                continue
            pace = self.speed(len(active)) / len(active)
            until = now + min(left[i] for i in active) / pace
            then = min([until, *waiting])
            for i in active:
                left[i] -= (then - now) * pace
                if left[i] <= 1e-9 * max(jobs[i].work, 1.0):
                    found[i] = then
                    open_.remove(i)
            now = then
        return found


@dataclass
class Day:
    """The available time: of this call, and of the day.

    Attributes:
        minutes, day_minutes: length of a call, and of all calls of the day together.
        before: seconds that earlier calls took.
    """

    minutes: float
    day_minutes: float
    before: float = 0.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def spent(self) -> float:
        """Seconds of the day that have been used."""
        return self.before + self.clock() - self.began

    @property
    def here(self) -> float:
        """Seconds left to work in this call."""
        return min(60 * self.minutes - (self.clock() - self.began), 60 * self.day_minutes - self.spent) - CLOSING

    def left(self, start: float) -> float:
        """Return the seconds left to work in the whole day, if every further call needs `start` to resume its runs."""
        total = self.here
        rest = 60 * self.day_minutes - self.spent - max(total, 0.0) - CLOSING
        while rest > CLOSING + start:
            part = min(rest, 60 * self.minutes)
            total += max(part - CLOSING - start, 0.0)
            rest -= part
        return total


class Scheduler:
    """Decides which run may start, from the time that earlier runs took.

    Args:
        done: finished epochs of each run, by its name.
    """

    def __init__(self, day: Day, forecast: Forecast, done: Mapping[str, int]) -> None:
        self.day, self.forecast, self.done = day, forecast, dict(done)
        self.running: dict[str, Run] = {}
        self.began: dict[str, float] = {}  # when each running run was started
        self.warm: set[str] = set()  # running runs that have finished an epoch since then
        self.share: dict[str, float] = {}  # reference steps that each had time for since its last epoch
        self.taken: dict[str, tuple[float, float]] = {}  # total of these, and the steps, since its first epoch here
        self.looked = day.clock()

    def steps(self, run: Run) -> float:
        """Return the steps of one epoch of a run."""
        return -(-(run.recipe.data.max_train or IMAGES) // run.recipe.data.batch_size)

    def job(self, run: Run) -> Job:
        """Return what is left of a run."""
        epoch = self.steps(run) * self.forecast.cost(kind_of(run.recipe))
        work = epoch * (run.recipe.epochs - self.done.get(run.name, 0))  # 0 where the files alone are left
        start = self.forecast.start
        if run.name in self.running:
            start = 0.0 if run.name in self.warm else max(start - (self.day.clock() - self.began[run.name]), 0.0)
        return Job(start, max(work - self.share.get(run.name, 0.0), 0.01 * epoch))

    def admits(self, run: Run) -> bool:
        """Return whether a run will end within the day, and does not keep running ones from doing so."""
        self._look()
        if self.day.here < self.forecast.start:  # its first step would fall into the next call
            return False
        if not self.forecast.speeds:  # nothing is known yet: the first few runs will tell
            return len(self.running) < 4
        jobs = [self.job(other) for other in self.running.values()]
        before, after = self.forecast.ends(jobs), self.forecast.ends([*jobs, self.job(run)])
        left = self.day.left(self.forecast.start)
        return after[-1] * MARGIN <= left and all(
            new * MARGIN <= left or old * MARGIN > left for old, new in zip(before, after, strict=False)
        )

    def started(self, run: Run) -> None:
        """Note that a run has started."""
        self._look()
        self.running[run.name], self.began[run.name], self.share[run.name] = run, self.day.clock(), 0.0

    def ended(self, run: Run) -> None:
        """Note that a run has ended."""
        self._look()
        self.running.pop(run.name, None)
        self.warm.discard(run.name)
        for values in (self.began, self.share, self.taken):
            values.pop(run.name, None)

    def epochs(self, run: Run, done: int) -> None:
        """Note that a run has finished `done` epochs."""
        self._look()
        name, more = run.name, done - self.done.get(run.name, 0)
        if name in self.warm:
            share, steps = self.taken.get(name, (0.0, 0.0))
            self.taken[name] = share + self.share[name], steps + more * self.steps(run)
            alike = [share / steps for other, (share, steps) in self.taken.items() if self._alike(other, run)]
            self.forecast.costs[kind_of(run.recipe)] = statistics.median(alike)
        else:
            self.forecast.start = min(self.forecast.start, self.day.clock() - self.began[name])
        self.done[name], self.share[name] = done, 0.0
        self.warm.add(name)

    def _look(self) -> None:
        """Divide the time since the last call among the runs that were active."""
        now = self.day.clock()
        active = [n for n in self.running if n in self.warm or now - self.began[n] > self.forecast.start]
        for name in active:
            self.share[name] += (now - self.looked) * self.forecast.speed(len(active)) / len(active)
        self.looked = now

    def _alike(self, name: str, run: Run) -> bool:
        return kind_of(self.running[name].recipe) == kind_of(run.recipe)


# What is known of it --------------------------------------------------------------------------------------------------


class Ledger:
    """gpu.json: everything measured so far, in the work folder and in OUT."""

    def __init__(self, work: Path, output: Path, day: dict[str, Any]) -> None:
        self.work, self.output = work, output
        for folder in (work, output):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PopupError(f"{folder} cannot be written: {error.strerror}") from error
        file = work / "gpu.json"
        self.values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"day": day}
        if self.values["day"] != day:
            key = next(key for key in day if self.values["day"].get(key) != day[key])
            raise RunError(
                f"{work} holds a day with {key} {self.values['day'].get(key)!r}, and this one has {day[key]!r}; choose "
                "another folder with --work"
            )

    def write(self, day: Day) -> None:
        self.values["seconds_spent"] = round(day.spent, 1)
        data = (json.dumps(self.values, indent=1) + "\n").encode()
        for folder in (self.work, self.output):
            write_atomically(folder / "gpu.json", data)


def epochs_of(run: Run, output: Path) -> list[dict[str, Any]]:
    """Return the epochs in a run's metrics.jsonl."""
    with suppress(OSError):
        lines = (run.folder(output).path / "metrics.jsonl").read_text().split("\n")[:-1]  # the last may be half written
        return [epoch for line in lines if "step" not in (epoch := json.loads(line))]
    return []


# The phases -----------------------------------------------------------------------------------------------------------


def check(ledger: Ledger, day: Day) -> None:
    """Record device and versions, run the tests marked `gpu`, and a few rounds of step.py."""
    gpu = torch.cuda.is_available()
    versions = {name: __import__(name).__version__ for name in ("torch", "torchvision", "timm", "accelerate")}
    ledger.values |= {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
    }
    ledger.write(day)
    end = day.clock() + min(CHECKS, day.here)
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    log = ledger.output / "checks.log"
    call = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    status = _bounded(call, log, end - day.clock() - 30)
    lines = log.read_text(errors="replace").strip().splitlines()
    ledger.values["gpu_tests"] = {"status": status, "says": lines[-1] if lines else ""}
    ledger.write(day)
    file = ledger.work / "step.json"
    only = [] if gpu else ["--only", "conv2"]
    call = [sys.executable, str(ROOT / "benchmarks/step.py"), "--pairs", "3" if gpu else "1", *only]
    status = _bounded([*call, "--output", str(file)], ledger.output / "step.log", end - day.clock())
    ledger.values["step"] = {"status": status, **(json.loads(file.read_text()) if file.exists() else {})}
    ledger.write(day)


def _bounded(call: Sequence[str], log: Path, seconds: float) -> int | str:
    """Run a command for at most `seconds`. Returns its exit status, or a text if it was cut off or not run."""
    if seconds <= 1:
        return "not run: no time was left"
    with open(log, "wb") as file:
        process = subprocess.Popen(call, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()


class Trial:
    """Runs of Conv4, started together and stopped one after another, to measure the speed by their number."""

    def __init__(self, runs: Sequence[Run], folder: Path, day: Day) -> None:
        self.runs, self.folder, self.day = runs, folder, day
        self.end = day.clock() + min(TRIAL, day.here)
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.began = day.clock()
        self.children = {run.name: start_run(run, folder, environment) for run in runs}
        self.seen: dict[str, list[float]] = {run.name: [] for run in runs}  # when each epoch's line appeared

    def look(self) -> None:
        for run in self.runs:
            if self.children[run.name].poll() is None:
                more = len(epochs_of(run, self.folder)) - len(self.seen[run.name])
                self.seen[run.name] += [self.day.clock()] * more
        time.sleep(0.02)

    def wait(self, runs: Sequence[Run], until: Callable[[], bool]) -> bool:
        """Look until a condition is true. Returns False if the trial's time is over, or one of `runs` has failed."""
        while not until():
            if self.day.clock() > self.end or any(self.children[run.name].poll() for run in runs):
                return False
            self.look()
        return True

    def began_all(self, runs: Sequence[Run]) -> bool:
        """Return whether all of `runs` have finished an epoch."""
        return all(self.seen[run.name] for run in runs)

    def speed(self, runs: Sequence[Run], seconds: float, steps: float) -> float | None:
        """Return the steps per second of `runs` together, over whole epochs in about `seconds`; None if out of time."""
        first = {run.name: len(self.seen[run.name]) for run in runs}
        began = self.day.clock()
        if not self.wait(runs, lambda: all(len(self.seen[name]) > count for name, count in first.items())):
            return None
        over = began + seconds
        self.wait(
            runs, lambda: self.day.clock() > over and all(len(self.seen[name]) > n + 1 for name, n in first.items())
        )
        total = 0.0
        for name, count in first.items():
            lines = self.seen[name][count:]
            if len(lines) < 2:
                return None
            total += steps * (len(lines) - 1) / (lines[-1] - lines[0])
        return total

    def stop(self, runs: Sequence[Run]) -> None:
        """End runs, in ten seconds at most."""
        end = time.monotonic() + 10
        for run in runs:
            self.children[run.name].send_signal(signal.SIGCONT)
            self.children[run.name].terminate()
        for run in runs:
            child = self.children.pop(run.name)
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(end - time.monotonic(), 0))
            child.kill()
            child.wait()
        self.runs = [run for run in self.runs if run.name in self.children]


def trial(ledger: Ledger, day: Day, counts: Sequence[int], settings: Sequence[str], data_dir: Path, tiny: bool) -> None:
    """Measure the speed of each number of runs in `counts`, and of the smallest with graphs and in bfloat16."""
    small = ["data.max_train=64", "data.max_validation=32", "data.batch_size=16"] if tiny else [
        "data.max_train=6400", "data.max_validation=1280"
    ]  # fmt: skip
    own = [*settings, *small, "data.name=folder", "training.epochs=100000"]
    values = {"recipe": "cifar10/conv4", "seeds": max(counts)}
    runs = Sweep.parse(values, settings=own, data_dir=data_dir).runs
    others = {
        name: Sweep.parse(values | {"seeds": min(counts)}, settings=more, data_dir=data_dir).runs
        for name, more in (("graphs", graphed(own)), ("bfloat16", [*own, "training.precision=bfloat16"]))
        if torch.cuda.is_available()
    }
    steps = -(-(runs[0].recipe.data.max_train or 0) // runs[0].recipe.data.batch_size)
    window = 5.0  # seconds
    result: dict[str, Any] = {"runs": {}, "kind": kind_of(runs[0].recipe), "flops": flops(runs[0].recipe)}
    ledger.values["trial"] = result
    folder = ledger.work / "trial"
    tried = Trial([*runs, *(run for each in others.values() for run in each)], folder, day)
    try:
        for each in others.values():  # paused until their turn comes
            tried.wait(each, partial(tried.began_all, each))
            for run in each:
                tried.children[run.name].send_signal(signal.SIGSTOP)
        if tried.wait(runs, lambda: all(len(tried.seen[run.name]) > 1 for run in runs)):
            seen = [tried.seen[run.name] for run in runs]
            # doubled, because a whole data set takes longer to read
            result["start_seconds"] = round(2 * max(2 * lines[0] - lines[1] - tried.began for lines in seen), 2)
        left = list(runs)
        for count in sorted(counts, reverse=True):
            tried.stop(left[count:])
            left = left[:count]
            speed = tried.speed(left, window, steps)
            if speed is not None:
                result["runs"][str(count)] = round(speed, 2)
                ledger.write(day)
        tried.stop(left)
        for name, each in others.items():
            for run in each:
                tried.children[run.name].send_signal(signal.SIGCONT)
            if (speed := tried.speed(each, window, steps)) is not None:
                result[name] = {"runs": len(each), "steps_per_second": round(speed, 2)}
            tried.stop(each)
    finally:
        tried.stop(list(tried.runs))
        shutil.rmtree(folder, ignore_errors=True)
    result |= taken(result, counts)
    ledger.write(day)


def taken(result: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """Return how many runs at once to have, and whether with graphs."""
    measured = {int(count): speed for count, speed in result["runs"].items()}
    with_graphs, without = result.get("graphs", {}).get("steps_per_second", 0.0), measured.get(min(counts))
    return {
        "taken": max(measured, key=measured.__getitem__) if measured else min(counts),
        "with_graphs": without is not None and with_graphs > without,
    }


@dataclass(frozen=True)
class UntilItIsOver(Local):
    """`Local`, but its runs also stop when a call's time is over."""

    over: Callable[[], bool] = lambda: False

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        return super().run(runs, output, lambda: stop() or self.over())


def figures(ledger: Ledger, day: Day, places: Sequence[Run], about: Mapping[str, Any]) -> list[Outcome]:
    """Run those of the day's runs that will end within it, and record everything as it happens."""
    output, measured, sweep = ledger.work / "runs", ledger.values["trial"], runs_of_the_day(places)
    known = {run.name: run for run in sweep.runs}
    kinds = {kind_of(run.recipe): run.recipe for run in sweep.runs}
    forecast = Forecast(
        {int(count): speed for count, speed in measured["runs"].items()},
        measured.get("start_seconds", 30.0),
        {kind: flops(recipe) / measured["flops"] for kind, recipe in kinds.items()},
        dict(ledger.values.get("costs", {})),
    )
    done = {name: len(epochs_of(run, output)) for name, run in known.items()}
    scheduler = Scheduler(day, forecast, done)
    begun = sorted(sweep.runs, key=lambda run: not 0 < done[run.name] < run.recipe.epochs)  # stopped runs first
    entries: dict[str, dict[str, Any]] = ledger.values.setdefault("runs", {})

    def note(outcome: Outcome) -> None:
        run = outcome.run
        entry = entries.setdefault(run.name, {"label": run.label, "values": dict(run.values), "seed": run.seed})
        entry |= {"state": outcome.state.value, "accuracy": [epoch["accuracy"] for epoch in epochs_of(run, output)]}
        if outcome.state is State.FAILED:
            entry["error"] = outcome.error

    def report(outcomes: Sequence[Outcome], changed: Outcome | None) -> None:
        news = False
        for outcome in outcomes:
            run = outcome.run
            if outcome.state is State.RUNNING and (count := len(epochs_of(run, output))) > scheduler.done[run.name]:
                scheduler.epochs(run, count)
                note(outcome)
                news = True
        if changed is None:
            if not entries:
                for outcome in outcomes:
                    if outcome.state is not State.WAITING:
                        note(outcome)
        elif changed.state is State.RUNNING:
            scheduler.started(changed.run)
            note(changed)
            news = True
        else:
            scheduler.ended(changed.run)
            note(changed)
            news = True
            _pack(ledger, outcomes, places, about)
        if news:
            ledger.values["costs"] = {kind: round(cost, 4) for kind, cost in forecast.costs.items()}
            ledger.write(day)

    engine = UntilItIsOver(measured["taken"], 1, scheduler.admits, over=lambda: day.here <= 0)
    with suppress(Stopped):
        execute(replace(sweep, runs=tuple(begun)), output, engine, report)
    outcomes = [Outcome.read(run, output) for run in sweep.runs]
    for outcome in outcomes:
        entry = entries.get(outcome.run.name)
        if outcome.state is not State.WAITING:
            note(outcome)
        elif entry is not None and entry["state"] != State.FAILED:
            note(replace(outcome, state=State.STOPPED))
    ledger.values["not_started"] = [str(run) for run in sweep.runs if run.name not in entries]
    _pack(ledger, outcomes, places, about)
    ledger.write(day)
    return outcomes


def _pack(ledger: Ledger, outcomes: Sequence[Outcome], places: Sequence[Run], about: Mapping[str, Any]) -> None:
    by_name = {outcome.run.name: outcome for outcome in outcomes}
    found = [replace(by_name[run.name], run=run) for run in places]
    left_out = write_archive(ledger.output / "runs.zip", found, ledger.work / "runs", about, LARGEST)
    ledger.values["artifacts_left_out"] = left_out


def unpacked(data: Path, work: Path) -> Path:
    """Return the folder with train/ and validation/ in `data`: a folder, or an archive to unpack into `work`."""
    if not data.exists():
        raise RunError(f"--data is {data}, which does not exist; expected a folder or a tar archive of images")
    if data.is_file():
        folder = work / "data"
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                with tarfile.open(data) as archive:
                    archive.extractall(folder, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise RunError(f"--data {data} cannot be unpacked: {error}") from error
            (folder / "whole").touch()
        data = folder
    for folder in (data, *sorted(path for path in data.iterdir() if path.is_dir())):
        if (folder / "train").is_dir():
            return folder.absolute()
    raise RunError(f"--data {data} has no train folder; expected train/<class>/ and validation/<class>/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="minutes that this call may take")
    parser.add_argument(
        "--day-minutes", type=float, help="minutes of all calls with the same --work together; default: --minutes"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-10 as class folders of images, or a tar archive of them"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results to keep")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of the runs; default: runs/gpu")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full", help="tiny: a rehearsal on a CPU")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=METHODS, help="series of equal-bytes to run last; default: all"
    )
    parser.add_argument("--trial", nargs="+", type=int, default=[4, 8, 16], help="numbers of parallel runs to try")
    parser.add_argument("--set", action="append", default=[], help="key=value of any recipe key; repeatable")
    arguments = parser.parse_args()
    # all processes import this checkout
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = [*(ON_GPU if torch.cuda.is_available() else ()), *arguments.set]
    try:
        return run_day(arguments, settings)
    except PopupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_day(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    """Run what there is time for, and write the results. Returns the exit status."""
    scale, work = arguments.scale, arguments.work.absolute()
    described = {
        "scale": scale,
        "networks": list(arguments.networks),
        "seeds": arguments.seeds,
        "methods": list(arguments.methods),
        "settings": [*settings],
    }
    ledger = Ledger(work, arguments.output.absolute(), described)
    day = Day(arguments.minutes, arguments.day_minutes or arguments.minutes, ledger.values.get("seconds_spent", 0.0))
    ledger.write(day)
    data_dir = unpacked(arguments.data, work)
    if "step" not in ledger.values:
        check(ledger, day)
    with shared() as ledger.values["mps"]:
        if "taken" not in ledger.values.get("trial", {}):
            trial(ledger, day, arguments.trial, settings, data_dir, scale == "tiny")
        asked = [setting for setting in arguments.set if setting.startswith(("training.compile=", "training.graph="))]
        with_graphs = ledger.values["trial"]["with_graphs"] and not asked
        places = places_of_the_day(
            scale, settings, arguments.networks, arguments.seeds, arguments.methods, data_dir, with_graphs
        )
        about = {key: ledger.values[key] for key in ("device", "versions", "mps")} | {
            "scale": scale,
            "settings": graphed(settings) if with_graphs else [*settings],
        }
        outcomes = figures(ledger, day, places, about)
    states = [outcome.state for outcome in outcomes]
    print(
        f"{states.count(State.FINISHED)} of {len(states)} runs finished, {day.spent / 60:.1f} minutes of the day spent"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
