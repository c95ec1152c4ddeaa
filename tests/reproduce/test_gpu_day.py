"""benchmarks/gpu.py: a rehearsal in real processes, and its decisions under a pretended clock."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from popup_surgery import RunError, UnknownName
from popup_surgery.reproduce import redraw
from popup_surgery.sweep import Run, State
from popup_surgery.sweep.archive import Archive, write_archive
from support import slow_except

ROOT = Path(__file__).parents[2]
SETTINGS = ["model.kwargs.width=0.1", "surgery.k=[0.5]", "training.epochs=30", "data.workers=0"]
METHODS = ["edge-popup", "dense", "global ramp"]  # the first two are runs of figure 3


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_day", ROOT / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_day"] = module
    spec.loader.exec_module(module)
    return module


gpu = loaded()


# A rehearsal ----------------------------------------------------------------------------------------------------------


class Rehearsal:
    """A day in the folder `work`, of small runs."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.work, self.output, self.data = folder / "work", folder / "out", data

    def start(self, minutes: float) -> "subprocess.Popen[str]":
        sets = [word for setting in SETTINGS for word in ("--set", setting)]
        call = [
            sys.executable,
            str(ROOT / "benchmarks/gpu.py"),
            "--scale",
            "tiny",
            "--networks",
            "conv4",
            "--seeds",
            "0",
            "--methods",
            *METHODS,
        ]
        call += ["--trial", "1", "2", "--minutes", str(minutes), "--day-minutes", "60", "--data", str(self.data)]
        call += ["--output", str(self.output), "--work", str(self.work), *sets]
        return subprocess.Popen(call, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.output / "gpu.json").read_text())
        assert values == json.loads((self.work / "gpu.json").read_text())
        return values

    def kill_once(self, moment: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Start a call, kill it and all its runs once gpu.json is so; what the file says then."""
        process = self.start(30)
        end = time.monotonic() + 240
        while not ((self.output / "gpu.json").exists() and moment(json.loads((self.output / "gpu.json").read_text()))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        groups = {os.getpgid(process.pid)}
        os.killpg(groups.pop(), signal.SIGKILL)
        process.communicate()
        return json.loads((self.output / "gpu.json").read_text())

    def check(self, values: dict[str, Any]) -> None:
        """What gpu.json says is what lies in the runs' folders, and the archive has the finished ones."""
        for name, run in values.get("runs", {}).items():
            (folder,) = (self.work / "runs").glob(f"*{name}") if run["accuracy"] else [self.work]
            lines = (folder / "metrics.jsonl").read_text().splitlines() if run["accuracy"] else []
            assert run["accuracy"] == [json.loads(line)["accuracy"] for line in lines][: len(run["accuracy"])]
            if run["state"] == "finished":
                assert len(run["accuracy"]) == 30
                assert any(folder.glob("recipe*.safetensors"))


@pytest.mark.slow
@pytest.mark.fault
def test_a_rehearsal_is_cut_killed_and_resumed_to_its_end(ten: Path, tmp_path: Path) -> None:
    day = Rehearsal(tmp_path, ten)
    early = day.kill_once(lambda values: "device" in values)
    assert "step" not in early
    assert early["versions"].keys() == {"python", "cuda", "torch", "torchvision", "timm", "accelerate"}
    tried = day.kill_once(lambda values: "step" in values and "mps" in values)
    assert tried["gpu_tests"]["status"] == 0
    assert [step["network"] for step in tried["step"]["steps"]] == ["popup_surgery/conv2"]
    running = day.kill_once(lambda values: any(run["accuracy"] for run in values.get("runs", {}).values()))
    day.check(running)
    assert running["trial"]["taken"] in (1, 2)
    assert running["trial"]["runs"].keys() <= {"1", "2"}  # fewer where its minute was too short
    assert early["seconds_spent"] < tried["seconds_spent"] < running["seconds_spent"]

    cut: Any = day.start(0.5)
    assert cut.wait(240) == 0, cut.communicate()
    assert re.match("[0-8] of 9 runs finished, ", cut.communicate()[0])
    values = day.json()
    day.check(values)
    assert len(values["not_started"]) + len(values["runs"]) == 9
    assert values["trial"] == running["trial"], "what was measured is not measured again"

    rest = day.start(30)
    out, err = rest.communicate(timeout=500)
    assert out.startswith("9 of 9 runs finished, "), err
    values = day.json()
    day.check(values)
    assert {run["state"] for run in values["runs"].values()} == {"finished"}
    assert [run["label"] for run in values["runs"].values()][:1] == ["Signed Constant"]
    assert {path.name for path in day.output.iterdir()} == {"gpu.json", "runs.zip", "checks.log", "step.log"}
    assert values["costs"].keys() == {
        gpu.kind_of(outcome.run.recipe) for outcome in Archive.open(day.output / "runs.zip").outcomes
    }

    result = redraw("figure3", day.output / "runs.zip", tmp_path / "figure")
    text = result.files[0].read_text()
    assert "4 of 48 runs of these seeds, on " in text
    assert values["device"] in text
    assert "; seeds: 1\nset: model.kwargs.width=0.1; surgery.k=[0.5]; " in text
    table = {row["series"]: row["accuracy"] for row in json.loads(result.files[1].read_text())["rows"]}
    last = {run["label"]: run["accuracy"][-1] for run in values["runs"].values()}
    assert table == {label: pytest.approx(100 * last[label]) for label in gpu.SERIES}

    methods = redraw("equal-bytes", day.output / "runs.zip", tmp_path / "figure")
    assert f"3 of 35 runs of these seeds, on {values['device']}\nwithout pruned" in methods.files[0].read_text()
    rows = {row["series"]: row for row in json.loads(methods.files[1].read_text())["rows"]}
    last |= {"edge-popup": last["Signed Constant"], "dense": last["dense, SGD"]}
    assert {name: row["accuracy"] for name, row in rows.items()} == {
        label: pytest.approx(100 * last[label]) for label in METHODS
    }
    assert rows["edge-popup"]["x"] == pytest.approx(rows["dense"]["x"] / 32, rel=0.1), "a bit for each weight"

    other = subprocess.run([*cut.args[:-1], "data.workers=1"], capture_output=True, text=True)
    assert other.returncode == 1
    assert "holds a day with settings" in other.stderr
    assert "--work" in other.stderr


def test_data_is_a_folder_or_an_archive_of_it(ten: Path, tmp_path: Path) -> None:
    archive = tmp_path / "ten.tar.xz"
    subprocess.run(["tar", "-cJf", archive, "-C", ten.parent, ten.name], check=True)
    assert gpu.unpacked(ten, tmp_path) == ten.absolute()
    for _ in range(2):
        found = gpu.unpacked(archive, tmp_path / "work")
        assert sorted(path.name for path in found.iterdir()) == ["train", "validation"]
    (tmp_path / "text.tar").write_text("no archive")
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "text.tar", "cannot be unpacked"),
        (tmp_path / "work", "has no train folder"),
    ):
        with pytest.raises(RunError, match=message):
            gpu.unpacked(path, tmp_path / "other")


def test_runs_of_a_day_come_in_the_order_of_their_worth(ten: Path) -> None:
    places = gpu.places_of_the_day("full", [], gpu.NETWORKS, [0, 1], gpu.METHODS, ten)
    runs = gpu.runs_of_the_day(places).runs
    first = [(run.label, run.values.get("surgery.k")) for run in runs[:16]]
    shares = [0.5, 0.3, 0.7, 0.1, 0.9]
    assert first[:6] == [*(("Signed Constant", k) for k in shares), ("dense, SGD", None)]
    assert first[6:12] == [*(("Kaiming Normal", k) for k in shares), ("dense, Adam", None)]
    assert [label[:4] for label, _ in first[12:]] == ["Zhou"] * 4
    assert [run.recipe.model.name[-5:] for run in runs[:128:16]] == ["conv4", "conv2", "conv6", "conv8"] * 2
    assert {run.seed for run in runs[:64]} == {0}
    assert {run.seed for run in runs[64:128]} == {1}
    assert {run.recipe.training.epochs for run in runs} == {100}
    assert [run.point for run in runs] == list(range(376))

    methods = runs[128:]
    assert [run.recipe.model.name[-5:] for run in methods[::31]] == [net for net in gpu.NETWORKS for _ in range(2)]
    assert [run.seed for run in methods[::31]] == [0, 1] * 4
    assert [run.label for run in methods[:6]] == ["edge-popup"] * 2 + ["global ramp"] * 3 + ["N:M"]
    assert {run.values["surgery.k"] for run in methods if run.label == "edge-popup"} == {0.125, 0.25}
    wanted = {run.name: run.recipe for run in places[128:]}  # with those that figure 3 has too
    assert {run.name: run.recipe for run in runs if run.name in wanted} == wanted, "their masks are coded alike"
    assert len(wanted) == 8 * 35


def test_what_the_trial_found_is_taken(ten: Path) -> None:
    for speed, with_graphs in ((80.0, True), (30.0, False), (None, False)):
        graphs = {} if speed is None else {"graphs": {"runs": 4, "steps_per_second": speed}}
        found = gpu.taken({"runs": {"4": 40.0, "8": 60.0, "16": 55.0}, **graphs}, [4, 8, 16])
        assert found == {"taken": 8, "with_graphs": with_graphs}
        assert gpu.taken({"runs": {}, **graphs}, [4, 8]) == {"taken": 4, "with_graphs": False}


def test_runs_with_graphs_are_those_that_can_have_them(ten: Path) -> None:
    settings = ["training.compile=reduce-overhead"]
    places = gpu.places_of_the_day("full", settings, ["conv4"], [0], gpu.METHODS, ten, True)
    for run in places:
        host = run.label in gpu.NO_GRAPHS or run.label.startswith("Zhou")
        assert run.recipe.training.compile == ("reduce-overhead" if host else False)
        assert run.recipe.training.graph == (False if host else "auto")
    assert len(places) == len(gpu.places_of_the_day("full", settings, ["conv4"], [0], gpu.METHODS, ten))
    assert {run.label for run in places} >= {*gpu.NO_GRAPHS, "Signed Constant", "dense"}


# Archives -------------------------------------------------------------------------------------------------------------


def test_what_is_no_archive(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    for path, message in (
        (tmp_path / "none.zip", "cannot be read"),
        (tmp_path / "text.zip", "is not an archive of a sweep"),
    ):
        with pytest.raises(RunError, match=message):
            redraw("figure3", path, tmp_path / "out")
    write_archive(tmp_path / "empty.zip", [], tmp_path, {"device": "none"})
    assert Archive.open(tmp_path / "empty.zip").outcomes == ()
    with pytest.raises(RunError, match="has no run of figure3; it has no runs"):
        redraw("figure3", tmp_path / "empty.zip", tmp_path / "out")
    with pytest.raises(UnknownName, match="figure33"):
        redraw("figure33", tmp_path / "empty.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = cli("reproduce", "figure3", "--from", tmp_path / "empty.zip", "--set", "surgery.k=0.5")
    assert (said.status, said.err) == (
        2,
        "error: --set has no effect with --from, which runs nothing; leave out one of the two\n",
    )


# Decisions under a pretended clock ------------------------------------------------------------------------------------


class World:
    """Runs that share a pretended GPU, in steps of a pretended clock."""

    TICK = 0.1

    def __init__(self, speeds: dict[int, float], start: float, costs: dict[str, float]) -> None:
        self.forecast = gpu.Forecast(speeds, start)
        self.costs, self.now = costs, 0.0

    def work(self, run: Run) -> float:
        """Reference steps of one epoch."""
        return gpu.Scheduler.steps(None, run) * self.costs[gpu.kind_of(run.recipe)]

    def ends(self, left: dict[str, tuple[float, float]]) -> dict[str, float]:
        """When runs end from now on, from the seconds until each one's first step and its work, tick by tick."""
        now, left, found = 0.0, dict(left), {}
        while left:
            active = [name for name, (start, _) in left.items() if start <= now]
            for name in active:
                start, work = left[name]
                work -= self.TICK * self.forecast.speed(len(active)) / len(active)
                left[name] = start, work
                if work <= 0:
                    found[name] = now + self.TICK
                    del left[name]
            now += self.TICK
        return found


def played(
    world: World, runs: tuple[Run, ...], places: int, minutes: float, day_minutes: float
) -> Iterator[tuple[str, Run, float]]:
    """A day's calls: what ended and when, and for every place that stayed free the runs that were refused."""
    done: dict[str, float] = {}
    before = 0.0
    while before < 60 * day_minutes:
        day = gpu.Day(minutes, day_minutes, before, lambda: world.now)
        began = world.now
        forecast = gpu.Forecast(world.forecast.speeds, world.forecast.start, world.costs)
        scheduler = gpu.Scheduler(day, forecast, {name: int(epochs) for name, epochs in done.items()})
        running: dict[str, tuple[Run, float]] = {}
        waiting = [run for run in runs if done.get(run.name, 0) < run.recipe.epochs]
        waiting.sort(key=lambda run: run.name not in done)
        looked: set[str] | None = None
        while day.here > 0:
            while len(running) < places:
                chosen = next((run for run in waiting if scheduler.admits(run)), None)
                if chosen is None:
                    if looked == set(running):
                        break
                    looked = set(running)
                    left = {
                        name: (
                            max(world.forecast.start - (world.now - at), 0),
                            world.work(run) * (run.recipe.epochs - done[name]),
                        )
                        for name, (run, at) in running.items()
                    }
                    for run in waiting:
                        rest = world.work(run) * (run.recipe.epochs - done.get(run.name, 0))
                        after = world.ends(left | {run.name: (world.forecast.start, rest)})
                        yield "refused", run, max(after.values()) - day.left(world.forecast.start)
                    break
                waiting.remove(chosen)
                scheduler.started(chosen)
                running[chosen.name] = chosen, world.now
                done.setdefault(chosen.name, 0.0)
                yield "started", chosen, world.now
            if not running:
                break
            world.now += world.TICK
            active = [name for name, (_, at) in running.items() if world.now - at > world.forecast.start]
            for name in active:
                run = running[name][0]
                earlier = done[name]
                done[name] += world.TICK * world.forecast.speed(len(active)) / len(active) / world.work(run)
                if int(done[name]) > int(earlier):
                    scheduler.epochs(run, int(done[name]))
                if done[name] >= run.recipe.epochs:
                    scheduler.ended(run)
                    del running[name]
                    yield "ended", run, world.now
        before += max(world.now - began, 1.0)
        if before + 60 * minutes > 60 * day_minutes and not running and not waiting:
            return


@pytest.fixture(scope="module")
def runs(ten: Path) -> tuple[Run, ...]:
    settings = ["data.max_train=12800", "data.batch_size=128", "training.epochs=8"]
    places = gpu.places_of_the_day("tiny", settings, ["conv4", "conv2"], [0], [], ten)
    found: tuple[Run, ...] = gpu.runs_of_the_day(places).runs
    return found


@pytest.mark.parametrize("seed", slow_except(range(4), [0]))
def test_no_run_starts_that_would_not_end_and_none_is_left_out_that_would(runs: tuple[Run, ...], seed: int) -> None:
    draw = random.Random(seed)
    costs = {kind: draw.uniform(0.5, 3) for kind in sorted({gpu.kind_of(run.recipe) for run in runs})}
    four = draw.uniform(20, 100)
    speeds = {4: four, 8: four * draw.uniform(1, 2), 16: four * draw.uniform(1, 3)}
    world = World(speeds, draw.uniform(1, 15), costs)
    minutes = draw.uniform(1, 12)
    places = draw.choice([4, 8, 16])
    started, ended = set(), set()
    for what, run, value in played(world, runs, places, minutes, minutes):
        if what == "started":
            started.add(run.name)
        elif what == "ended":
            ended.add(run.name)
        else:  # by a clock of ticks, and a margin of 3 %
            assert value > -(0.05 * 60 * minutes + 3 * World.TICK), f"{run} would have ended {-value} s before the day"
    assert started == ended


@pytest.mark.parametrize("seed", slow_except(range(3), [0]))
def test_a_day_of_two_calls_ends_what_it_starts(runs: tuple[Run, ...], seed: int) -> None:
    draw = random.Random(seed)
    costs = {gpu.kind_of(run.recipe): 1.0 for run in runs}
    world = World({4: draw.uniform(20, 60), 16: 80.0}, 5.0, costs)
    started, ended = set(), set()
    for what, run, _ in played(world, runs, 16, 4.0, 7.5):
        started |= {run.name} if what == "started" else set()
        ended |= {run.name} if what == "ended" else set()
    assert started
    assert started == ended


def test_runs_that_start_slow_the_others_down() -> None:
    forecast = gpu.Forecast({4: 40.0, 8: 40.0}, 10.0)
    assert forecast.ends([gpu.Job(0, 100)]) == [10.0]
    assert forecast.ends([gpu.Job(0, 100)] * 4) == [10.0] * 4
    assert forecast.ends([gpu.Job(0, 100)] * 8) == [20.0] * 8
    assert forecast.ends([gpu.Job(0, 100), gpu.Job(10, 50)]) == [10.0, 15.0]
    assert forecast.ends([]) == []


def test_a_step_costs_what_was_measured(runs: tuple[Run, ...]) -> None:
    now = 0.0
    one, two = runs[0], runs[1]
    day = gpu.Day(60, 60, 0.0, lambda: now)
    scheduler = gpu.Scheduler(day, gpu.Forecast({1: 10.0, 2: 12.0}, 5.0, {gpu.kind_of(one.recipe): 0.5}), {})
    assert scheduler.job(one) == gpu.Job(5.0, 8 * 100 * 0.5)
    ended = gpu.Scheduler(day, scheduler.forecast, {one.name: 8})
    assert ended.job(one) == gpu.Job(5.0, 0.01 * 100 * 0.5), "it was killed before it wrote its file"
    assert ended.admits(one)
    scheduler.started(one)
    now = 4.0
    scheduler.epochs(one, 1)  # its first, of which the start is a part
    assert scheduler.forecast.start == 4.0
    now = 9.0
    scheduler.epochs(one, 2)  # 5 s of 10 reference steps each, for 100 steps
    assert scheduler.forecast.cost(gpu.kind_of(one.recipe)) == pytest.approx(0.5)
    scheduler.started(two)
    now = 13.0
    assert scheduler.admits(two)
    now = 18.0
    scheduler.epochs(one, 3)  # and 4 s by itself, and 5 s of half of 12
    assert scheduler.forecast.cost(gpu.kind_of(one.recipe)) == pytest.approx((50 + 40 + 30) / 200)


@pytest.mark.slow
def test_a_refused_run_waits_and_the_rest_goes_on(tmp_path: Path) -> None:
    from popup_surgery.errors import Stopped
    from popup_surgery.sweep import Local, Sweep, execute

    sweep = Sweep.parse({"recipe": "digits", "set": {"training.epochs": 1}, "seeds": 3})
    with pytest.raises(Stopped, match="1 of 3 runs finished"):
        execute(sweep, tmp_path, Local(1, admit=lambda run: run.seed == 1))
    folders = {run.seed: run.folder(tmp_path).finished for run in sweep.runs}
    assert folders == {0: False, 1: True, 2: False}
    assert State.WAITING in {outcome["state"] for outcome in _runs(tmp_path)}


def _runs(output: Path) -> list[dict[str, Any]]:
    points = json.loads((output / "results.json").read_text())["points"]
    return [run for point in points for run in point["runs"]]
