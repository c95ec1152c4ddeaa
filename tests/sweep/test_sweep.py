"""Sweeps: what is in them, what is refused, and real runs of them, stopped, killed, failing, here and on Ray."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import pytest
import torch
import yaml
from filelock import FileLock

import popup_surgery
from popup_surgery import PopupError, RecipeError, RunError, train
from popup_surgery.config.catalog import find
from popup_surgery.config.yaml import to_yaml
from popup_surgery.sweep import Local, Outcome, State, Sweep, execute, points
from support import PATIENCE, ROOT, Here, surgery

Cli = Callable[..., Any]
DIGITS = {"recipe": "digits", "set": {"training.epochs": 1}}
GRID = DIGITS | {"grid": {"surgery.k": [0.3, 0.5]}, "seeds": 2}
TWELVE = DIGITS | {
    "runs": [{"grid": {"surgery.k": [0.3, 0.5, 0.7]}}, {"label": "dense", "set": {"surgery": "none"}}],
    "seeds": 3,
}
LONG = {"recipe": "digits", "set": {"training.epochs": 8}, "seeds": 2}


def artifacts(output: Path) -> dict[str, bytes]:
    """Every finished run's file, by the run's name, which its folder's ends with."""
    return {path.parent.name[-16:]: path.read_bytes() for path in output.glob("*/*.safetensors")}


def table(output: Path) -> list[Any]:
    """results.json without what is other each time."""
    points = json.loads((output / "results.json").read_text())["points"]
    for run in (run for point in points for run in point["runs"]):
        run["folder"] = run["folder"][-16:]
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points]


def written(folder: Path, values: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(to_yaml(values))
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "popup_surgery", "sweep", *map(str, words)]


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def checkpointed(output: Path) -> set[str]:
    return {path.parents[1].name for path in output.glob("*/checkpoints/*.json")}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep GRID, run in this process."""
    output = tmp_path_factory.mktemp("here") / "out"
    execute(Sweep.parse(GRID), output, Here())
    return output


# what is in a sweep


def test_a_grid_times_seeds_in_the_order_of_the_file() -> None:
    grid = {"surgery.k": [0.3, 0.5], "surgery.scheme": ["kaiming_normal", "signed_kaiming_constant"]}
    runs = Sweep.parse({"recipe": "digits", "set": {"training.epochs": 3}, "grid": grid, "seeds": [4, 7]}).runs
    assert [(run.values["surgery.k"], run.values["surgery.scheme"][0], run.seed) for run in runs] == [
        (0.3, "k", 4), (0.3, "k", 7), (0.3, "s", 4), (0.3, "s", 7),
        (0.5, "k", 4), (0.5, "k", 7), (0.5, "s", 4), (0.5, "s", 7),
    ]  # fmt: skip
    assert [run.point for run in runs] == [0, 0, 1, 1, 2, 2, 3, 3]
    for run in runs:
        assert run.label == "digits"
        assert run.recipe.training.epochs == 3
        assert run.recipe.training.seed == surgery(run).seed == run.seed
        assert (surgery(run).k, surgery(run).scheme) == tuple(run.values.values())


def test_several_grids_hidden_and_dense_with_what_they_share(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "wide.yaml").write_text(find("digits").read_text().replace("width: 0.25", "width: 0.5"))
    file = written(
        tmp_path,
        {
            "recipe": "digits",
            "set": {"training.epochs": 2},
            "seeds": 2,
            "runs": [
                {"label": "hidden", "grid": {"surgery.k": [0.3, 0.5]}},
                {"label": "dense", "set": {"surgery": "none", "training.lr": 0.01}},
                {"recipe": "recipes/wide.yaml", "seeds": [5], "grid": {"surgery": ["none"]}},
            ],
        },
    )
    sweep = Sweep.load(file)
    assert sweep.name == "mine"
    runs = sweep.runs
    assert [run.label for run in runs] == ["hidden"] * 4 + ["dense"] * 2 + ["wide"]
    assert [run.seed for run in runs] == [0, 1, 0, 1, 0, 1, 5]
    assert [run.point for run in runs] == [0, 0, 1, 1, 2, 2, 3]
    assert {run.recipe.training.epochs for run in runs} == {2}
    assert [run.recipe.surgery == "none" for run in runs] == [False] * 4 + [True] * 3
    assert [run.recipe.training.seed for run in runs] == [0, 1, 0, 1, 0, 1, 5]
    assert runs[-1].recipe.model.kwargs["width"] == 0.5
    assert runs[-1].values == {"surgery": "none"}


def test_settings_of_the_command_line_come_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, GRID)
    runs = Sweep.load(file, ["surgery.k=0.7", "training.lr=[0.1, 0.2]", "training.epochs=2"], seeds=[9]).runs
    assert [(surgery(run).k, run.recipe.training.lr) for run in runs] == [(0.7, 0.1), (0.7, 0.2)]
    assert [dict(run.values) for run in runs] == [{"training.lr": 0.1}, {"training.lr": 0.2}]
    assert {(run.seed, run.recipe.training.epochs) for run in runs} == {(9, 2)}


def test_a_list_is_a_grid_and_a_list_of_lists_a_grid_of_lists() -> None:
    runs = Sweep.load("digits", ["data.mean=[[0.3], [0.4]]", "surgery.k={'*': 0.3, 'classifier.5': 1.0}"]).runs
    assert [run.recipe.data.mean for run in runs] == [[0.3], [0.4]]
    assert {json.dumps(surgery(run).k) for run in runs} == {'{"*": 0.3, "classifier.5": 1.0}'}
    assert [run.seed for run in runs] == [0, 0]
    with pytest.raises(RecipeError, match=r"data\.mean is 0\.3; expected a list"):
        Sweep.load("digits", ["data.mean=[0.3]"])


def test_a_folders_name_depends_on_what_decides_the_result_alone() -> None:
    def name(*settings: str, **more: Any) -> str:
        (run,) = Sweep.load("digits", settings, **more).runs
        assert re.fullmatch("[0-9a-f]{16}", run.name)
        return run.name

    same = name()
    assert (
        name("data.workers=7", "data.download=true", "training.checkpoint_minutes=1", "training.trackers=[[]]") == same
    )
    assert name(data_dir="/elsewhere") == same
    assert name(seeds=1) == same
    others = [
        "surgery.k=0.4",
        "training.epochs=3",
        "surgery.seed=1",
        "training.seed=1",
        "model.kwargs.width=0.5",
        "surgery=none",
    ]
    assert len({same, *map(name, others)}) == len(others) + 1
    # the last pattern that matches counts
    assert name("surgery.k={'*': 0.3, 'classifier.*': 0.5}") != name("surgery.k={'classifier.*': 0.5, '*': 0.3}")
    assert name("surgery.k=1") == name("surgery.k=1.0")


def test_the_sweeps_of_the_documentation() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    found = [yaml.safe_load(block) for block in re.findall(r"\n\n((?:    .*\n)+)", page) if "    seeds:" in block]
    assert [len(Sweep.parse(values).runs) for values in found] == [2 * 2 * 5, 3 * (3 + 1)]


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_file_has_its_seed(here: Path, tmp_path: Path) -> None:
    file = Sweep.parse(GRID).runs[1].folder(here).final
    assert popup_surgery.inspect(file).seed == 1
    sweep = Sweep.parse(DIGITS | {"set": {"training.epochs": 1, "model.init_from": str(file)}, "seeds": [0, 3]})
    assert [(surgery(run).seed, run.recipe.training.seed) for run in sweep.runs] == [(1, 0), (1, 3)]
    assert {outcome.state for outcome in execute(sweep, tmp_path / "out", Here())} == {State.FINISHED}
    with pytest.raises(PopupError, match=r"surgery\.seed is 4; expected 1, the seed of "):
        Sweep.load("digits", [f"model.init_from={file}", "surgery.seed=[4]"])


# what is refused


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"recipe": "digts"}, r"unknown recipe 'digts'; the nearest known: .*\bdigits\b"),
        ({"recipe": "mine.yaml"}, r"the recipe file mine\.yaml does not exist"),
        ({"recipe": 3}, "sweep: recipe is 3; expected a name"),
        ({"set": {}}, "sweep: recipe is missing"),
        ({"recipe": "digits", "girds": {}}, r"sweep: girds is not a key of a sweep; nearest: .*\bgrid\b"),
        ({"recipe": "digits", "set": 3}, "sweep: set is 3; expected values by recipe key"),
        ({"recipe": "digits", "set": {1: 3}}, "sweep: set is {1: 3}; expected values by recipe key"),
        ({"recipe": "digits", "grid": []}, r"sweep: grid is \[\]; expected values by recipe key"),
        ({"recipe": "digits", "grid": {"surgery.k": 0.3}}, r"grid surgery\.k is 0\.3; expected a list of values"),
        ({"recipe": "digits", "grid": {"surgery.k": []}}, r"surgery\.k is an empty list; expected one value or more"),
        (GRID | {"set": {"surgery.k": 0.3}}, r"surgery\.k is in set and in grid"),
        (GRID | {"seeds": 0}, "seeds is 0; expected their number, from 1, or a list"),
        (GRID | {"seeds": []}, r"seeds is \[\]; expected their number"),
        (GRID | {"seeds": [1, 1]}, r"seeds is \[1, 1\]; expected .* different integers"),
        (GRID | {"seeds": [-1]}, r"seeds is \[-1\]; expected .* integers from 0"),
        (GRID | {"seeds": True}, "seeds is True; expected their number"),
        (GRID | {"seeds": 60_000}, "makes 120,000 runs; expected at most 100,000"),
        (GRID | {"set": {"training.seed": 3}}, r"training\.seed and seeds are given, and seeds sets it too"),
        ({"recipe": "digits", "grid": {"surgery.k": [0.3, 1.2]}}, r"sweep: surgery\.k is 1\.2; expected a number"),
        ({"recipe": "digits", "grid": {"training.epoch": [1, 2]}}, r"training\.epoch is not a key .*; nearest: epochs"),
        ({"recipe": "digits", "grid": {"surgery": ["dense"]}}, r"sweep: surgery is 'dense'; expected .* or 'none'"),
        (
            {"recipe": "digits", "grid": {"surgery.scheme": ["kaiming_normal", "pretrained"]}},
            r"surgery\.scheme pretrained needs .*model\.pretrained.* \(with surgery\.scheme=pretrained\)$",
        ),
        ({"recipe": "digits", "grid": {"surgery.k": [0.3, 0.3]}}, r"digits surgery\.k=0\.3 seed 0 is there twice"),
        (
            {"runs": [{"recipe": "digits"}, {"recipe": "digits", "label": "again", "grid": {"surgery.k": [0.5]}}]},
            r"again surgery\.k=0\.5 seed 0 is the same run as digits seed 0",
        ),
        ({"recipe": "digits", "grid": {"data.root": ["a", "b"]}}, r"data\.root=b seed 0 is the same run as .*=a"),
        ({"recipe": "digits", "runs": []}, r"runs is \[\]; expected a list of grids"),
        ({"recipe": "digits", "runs": [3]}, "sweep, grid 1 is 3; expected recipe, set, grid"),
        ({"recipe": "digits", "runs": [{}], "grid": {}}, "grid is not a key of a sweep beside runs"),
        ({"runs": [{"recipe": "digits"}, {"label": "x"}]}, "sweep, grid 2: recipe is missing"),
        ({"recipe": "digits", "label": ["x"]}, r"label is \['x'\]; expected a name"),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_one_sentence(values: Any, says: str) -> None:
    with pytest.raises(PopupError, match=says) as caught:
        Sweep.parse(values)
    assert "\n" not in str(caught.value)


def test_all_that_recipes_refuse_is_said_at_once() -> None:
    grid = {"surgery.k": [0.3, 1.2, 0], "training.schedule": ["cosine", "cosin"]}
    with pytest.raises(RecipeError) as caught:
        Sweep.parse({"recipe": "digits", "grid": grid, "seeds": 3})
    head, *lines = str(caught.value).split("\n")
    assert head == "sweep has 3 mistakes:"
    assert [line.split(";")[0] for line in lines] == [
        "training.schedule is 'cosin'",
        "surgery.k is 1.2",
        "surgery.k is 0",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.yaml",), r"nowhere\.yaml"),
        (("list.yaml",), r"list\.yaml does not hold a mapping; expected recipe, set, grid and seeds, or runs"),
        (("digits", "--set", "surgery.k=[]"), r"surgery\.k is an empty list"),
        (("digits", "--set", "surgery.k=[0.5, 2]"), r"surgery\.k is 2; expected"),
        (("digits", "--seeds", "0"), "seeds is 0"),
        (("digits", "--seeds", "[1"), "--seeds .*is not valid YAML"),
        (("digits", "--address", "auto"), "--address is auto; it works only with --on ray"),
        (("digits", "--gpus-per-run", "1"), "--gpus-per-run is 1.0; it works only with --on ray"),
        (("digits", "--on", "ray", "--gpus-per-run", "1.5"), r"--gpus-per-run is 1\.5; expected a share of a GPU"),
        (("digits", "--on", "ray", "--jobs", "2"), "--jobs is 2; it works only without --on ray"),
        (("digits", "--on", "ray", "--pack", "2"), "--pack is 2; it works only without --on ray"),
        (("digits", "--jobs", "2", "--pack", "3"), "--pack is 3 and --jobs is 2; expected one of them"),
        (("digits", "--on", "slurm"), "slurm"),
        (("digits", "-o", "/proc/self/sweep"), "cannot be written"),
        (("digits", "-o", "run"), "run is the folder of a run"),
    ],
)
def test_what_sweep_refuses(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    outcome = cli("sweep", *arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert re.search(says, outcome.err), outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.yaml", "run"]


# runs and results


@pytest.mark.slow
def test_results_are_over_the_seeds_and_there_while_it_runs(tmp_path: Path) -> None:
    sweep, seen = Sweep.parse(GRID | {"seeds": 3}), []

    def report(outcomes: Sequence[Outcome], changed: Outcome | None) -> None:
        seen.append(json.loads((tmp_path / "results.json").read_text())["finished"])
        assert seen[-1] == sum(outcome.state is State.FINISHED for outcome in outcomes)

    outcomes = execute(sweep, tmp_path, Here(), report)
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    accuracies = [
        [train(run.recipe, output=tmp_path / "again" / run.name).accuracy for run in sweep.runs[i : i + 3]]
        for i in (0, 3)
    ]
    for point, accuracy, k, kept in zip(points(outcomes), accuracies, (0.3, 0.5), (7073, 11784), strict=True):
        assert point.mean
        assert (point.label, point.values, point.n, point.mean.kept, point.mean.weights) == (
            "digits", {"surgery.k": k}, 3, kept, 23568,
        )  # fmt: skip
        assert point.mean.accuracy == pytest.approx(mean(accuracy))
        assert point.std == pytest.approx(stdev(accuracy))
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = json.loads((tmp_path / "results.json").read_text())
    assert (values["sweep"], values["runs"], values["finished"], values["failed"]) == ("sweep", 6, 6, 0)
    for row, point in zip(rows, values["points"], strict=True):
        assert row == {"label": "digits", "surgery.k": str(point["values"]["surgery.k"])} | {
            key: str(point[key]) for key in ("n", "accuracy", "std", "seconds", "size", "weights", "kept")
        }
        assert [run["seed"] for run in point["runs"]] == [0, 1, 2]
        sizes = [len(artifacts(tmp_path)[run["folder"][-16:]]) for run in point["runs"]]
        assert point["size"] == pytest.approx(mean(sizes))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_two_jobs_give_the_files_of_runs_one_after_another(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    had: list[tuple[str, str | None]] = []
    if not torch.cuda.is_available():  # the runs see no GPU then, and are told to see these
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    def report(outcomes: Sequence[Outcome], changed: Outcome | None) -> None:
        together.append(sum(outcome.state is State.RUNNING for outcome in outcomes))
        if together[-1] == 2 and not had:
            children = [child.environ() for child in psutil.Process().children() if "train" in child.cmdline()]
            had.extend(sorted((each["OMP_NUM_THREADS"], each.get("CUDA_VISIBLE_DEVICES")) for each in children))

    execute(Sweep.parse(GRID), tmp_path, Local(), report)
    assert max(together) == 2
    assert torch.cuda.is_available() or had == [("1", "5"), ("1", "7")]
    assert artifacts(tmp_path) == artifacts(here)
    assert table(tmp_path) == table(here)


def test_finished_runs_are_skipped_and_a_larger_sweep_shares_them(here: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(here, tmp_path / "out"))

    def ran(sweep: Sweep) -> list[Any]:
        found: list[Any] = []
        before = {path: path.stat().st_mtime_ns for path in output.glob("*/*")}
        execute(sweep, output, Here(), lambda outcomes, changed: found.append(changed and str(changed.run)))
        assert before.items() <= {path: path.stat().st_mtime_ns for path in output.glob("*/*")}.items()
        return found[1:]

    assert ran(Sweep.parse(GRID)) == []
    more = ["other surgery.k=0.3 seed 2", "other surgery.k=0.5 seed 2"]
    assert ran(Sweep.parse(GRID | {"seeds": [1, 2], "label": "other"})) == more
    assert [run["state"] for point in table(output) for run in point["runs"]] == ["finished"] * 4
    assert ran(Sweep.parse(GRID)) == []
    assert table(output) == table(here)


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_stops_no_other(cli: Cli, here: Path, tmp_path: Path) -> None:
    steep = {"label": "steep", "set": {"surgery": "none"}, "grid": {"training.lr": [1e30]}, "seeds": 1}
    file = written(tmp_path, DIGITS | {"runs": [steep, {"grid": {"surgery.k": [0.3, 0.5]}, "seeds": [1]}]})
    output = tmp_path / "out"
    done = cli("sweep", file, "-o", output, "--jobs", "1")
    assert done.status == 1
    (line,) = done.err.splitlines()
    failing = Sweep.load(file).runs[0]
    said = (
        r"steep training\.lr=1e\+30 seed 0 failed: the loss of step \d+, in epoch 1, is not finite .*; its folder is "
    )
    assert re.fullmatch(said + re.escape(str(failing.folder(output).path)), line)
    assert re.search(r"^3/3  digits surgery\.k=0\.5 seed 1  accuracy \d+\.\d+ %  \d+\.\d s$", done.out, re.M)
    assert re.search(r"^steep +1e\+30 +0/1, 1 failed$", done.out, re.M)
    bad, *good = json.loads((output / "results.json").read_text())["points"]
    assert (bad["n"], bad["accuracy"], bad["runs"][0]["state"]) == (0, None, "failed")
    assert bad["runs"][0]["error"] in line
    assert "not finite" in (failing.folder(output).path / "log.txt").read_text()
    assert [point["n"] for point in good] == [1, 1]
    assert len(artifacts(output)) == 2
    assert artifacts(output).items() <= artifacts(here).items()


def test_a_damaged_folder_is_a_run_that_failed(tmp_path: Path) -> None:
    sweep = Sweep.parse(GRID | {"seeds": 1})
    execute(sweep, tmp_path, Here())
    first, second = (run.folder(tmp_path).path for run in sweep.runs)
    (first / "metrics.jsonl").write_text("")
    (second / "recipe.yaml").write_text((first / "recipe.yaml").read_text())
    outcomes = execute(sweep, tmp_path, Here())
    assert [outcome.state for outcome in outcomes] == [State.FAILED] * 2
    assert re.search(rf"{first} is damaged .*remove it", outcomes[0].error)
    assert re.search(r"of another recipe: surgery\.k is 0\.3 there and 0\.5 here", outcomes[1].error)


def test_two_sweeps_in_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(RunError, match="another sweep runs in"):
        execute(Sweep.parse(GRID), tmp_path, Here())
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_dry_run_counts_and_estimates_and_writes_nothing(cli: Cli, here: Path, tmp_path: Path) -> None:
    more = GRID | {"seeds": [0, 1, 5]}
    before = sorted(here.rglob("*"))
    done = cli("sweep", written(tmp_path, more), "-o", here, "--dry-run", "--jobs", "2")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.fullmatch("6 runs, 4 of them finished", lines[0])
    assert re.fullmatch(r"2 +digits surgery\.k=0\.\d seed 5 +\d+\.\d s +\d+\.\d ms +0:00:\d\d", lines[2])
    assert re.fullmatch(r"about 0:\d\d:\d\d one after another, 0:\d\d:\d\d with 2 at a time", lines[3])
    assert sorted(here.rglob("*")) == before


# stopped and killed


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_then_killed_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, longer = tmp_path / "out", LONG | {"set": {"training.epochs": 40}}  # the orphan must outlive its sweep
    words = command(written(tmp_path, longer), "-o", output, "--jobs", 2)
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(checkpointed(output)) == 2, process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert said == "stopped with 0 of 2 runs finished; run the same command again to resume\n"
    assert not any(child.is_running() for child in children)
    assert len(checkpointed(output)) == 2
    assert [run["state"] for point in table(output) for run in point["runs"]] == ["stopped"] * 2

    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(psutil.Process(process.pid).children()) == 2, process)
    victim, orphan = psutil.Process(process.pid).children()
    until(lambda: all((output / run / "lock").exists() for run in checkpointed(output)), process)
    process.kill()
    victim.kill()
    process.communicate()
    victim.wait(60)
    assert orphan.is_running()
    outcomes = execute(Sweep.parse(longer), output, Local(2))
    assert [outcome.state for outcome in outcomes] == [State.FINISHED] * 2
    assert len(re.findall(r"another process runs in \S+; waiting for it", caplog.text)) == 1
    assert not orphan.is_running()
    for log in output.glob("*/log.txt"):
        assert "epoch 40/40" in log.read_text()
        assert "epoch 1/40" not in log.read_text(), "it went on"
    execute(Sweep.parse(longer), tmp_path / "here", Here())
    assert artifacts(output) == artifacts(tmp_path / "here")


# Ray


def test_what_ray_refuses(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ("sweep", "digits", "--on", "ray", "-o", "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli(*call)[0::2] == (
        2, "error: --on ray needs Ray, which is not installed; run pip install 'popup-surgery[ray]'\n",
    )  # fmt: skip
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("ray")
    for address, says in (("127.0.0.1:9", "Connection refused"), ("auto", "any running Ray instance")):
        done = cli(*call, "--address", address)
        assert done.status == 2
        assert re.fullmatch(rf"error: no Ray cluster can be reached at {address}: .*{says}.*\n", done.err)
    assert not artifacts(tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster on this machine whose first node has room for one run."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else other tests starve them
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


@pytest.mark.slow
def test_twelve_runs_on_a_cluster_that_loses_a_node(cluster: Any, tmp_path: Path) -> None:
    """All twelve are compared with runs in this process, and one seed of each point with `--jobs 1`."""
    file, output = written(tmp_path, TWELVE), tmp_path / "ray"
    ray, alone = (
        subprocess.Popen(command(file, *more), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for more in (
            ("-o", output, "--on", "ray", "--address", cluster.address),
            ("-o", tmp_path / "alone", "--jobs", 1, "--seeds", "[2]"),
        )
    )
    node = cluster.add_node(num_cpus=1)
    until(lambda: len(held(output)) == 2 and len(artifacts(output)) >= 3, ray)
    cluster.remove_node(node, allow_graceful=False)
    assert len(artifacts(output)) < 12
    execute(Sweep.parse(TWELVE), tmp_path / "here", Here())
    for process in (ray, alone):
        said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    assert len(artifacts(output)) == 12
    assert artifacts(output) == artifacts(tmp_path / "here")
    assert table(output) == table(tmp_path / "here")
    assert len(artifacts(tmp_path / "alone")) == 4
    assert artifacts(tmp_path / "alone").items() <= artifacts(output).items()


def held(output: Path) -> set[str]:
    """Runs that a process is at, by their names; trying the locks instead could keep a run from its own."""
    locks, found = Path("/proc/locks").read_text(), set()
    for lock in output.glob("*/lock"):
        with suppress(FileNotFoundError):
            if f":{lock.stat().st_ino} " in locks:
                found.add(lock.parent.name)
    return found


@pytest.mark.slow
def test_files_come_back_where_nodes_do_not_see_the_drivers_folder(cluster: Any, here: Path, tmp_path: Path) -> None:
    """The folder of an open file has a name that leads elsewhere, or nowhere, in any other process."""
    folder = os.open(tmp_path, os.O_RDONLY)
    output = f"/proc/self/fd/{folder}/out"
    words = command(written(tmp_path, GRID), "-o", output, "--on", "ray", "--address", cluster.address)
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, pass_fds=[folder])
    os.close(folder)
    assert done.returncode == 0, done.stderr
    assert artifacts(tmp_path / "out") == artifacts(here)
    assert table(tmp_path / "out") == table(here)
    for path in (tmp_path / "out").glob("*/"):
        assert sorted(file.name for file in path.iterdir()) == [
            "curve.png", "masks.png", "metrics.jsonl", "recipe.popup.safetensors", "recipe.yaml",
        ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_on_ray_that_is_told_to_stop(cluster: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    long = LONG | {"set": {"training.epochs": 1000}}
    words = command(written(tmp_path, long), "-o", output, "--on", "ray", "--address", cluster.address)
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: checkpointed(output), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert "stopped with 0 of 2 runs finished; run the same command again to resume" in said
    assert len(checkpointed(output)) == 1
    assert not held(output)
