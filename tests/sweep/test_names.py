"""Names that people find runs by, the table with a line for each run, and the picture."""

import csv
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from popup_surgery.sweep import Outcome, State, Sweep, execute
from popup_surgery.sweep.grid import Run
from popup_surgery.sweep.names import find_folder
from popup_surgery.sweep.picture import draw
from popup_surgery.sweep.results import Numbers, points
from support import GOLDEN, Here

BASE: Mapping[str, Any] = {"recipe": "digits", "set": {"training.epochs": 1}}


def folders(values: Mapping[str, Any], output: Path = Path("out")) -> list[str]:
    return [run.folder(output).path.name for run in Sweep.parse({**BASE, **values}).runs]


def beginnings(values: Mapping[str, Any]) -> list[str]:
    names = folders(values)
    assert all(re.fullmatch(r"(.+-)?[0-9a-f]{16}", name) for name in names), names
    return [name[:-17] for name in names]


def test_folders_begin_with_what_varies() -> None:
    assert beginnings({"grid": {"surgery.k": [0.3, 0.5]}, "seeds": 2}) == [
        "k=0.3,seed=0", "k=0.3,seed=1", "k=0.5,seed=0", "k=0.5,seed=1",
    ]  # fmt: skip
    assert beginnings({"seeds": [7]}) == [""]
    assert beginnings({"grid": {"surgery.k": [0.3], "training.lr": [0.1, 0.2]}}) == ["lr=0.1", "lr=0.2"]
    grid = {"lottery_ticket": [None, {"k": 0.5, "rounds": 1}], "surgery": ["none"]}
    assert beginnings({"grid": grid}) == ["lottery_ticket=null", "lottery_ticket=k_0.5_rounds_1"]
    names = {"model.name": ["popup_surgery/conv2", "popup_surgery/conv4"]}
    assert beginnings({"grid": names}) == ["name=conv2", "name=conv4"]
    runs = [{"label": "a/b", "grid": {"surgery.k": [0.3]}}, {"label": "..", "set": {"surgery": "none"}}]
    assert beginnings({"runs": runs}) == ["b,k=0.3", ""]
    assert beginnings({"grid": {"training.seed": [1, 2]}}) == ["seed=1", "seed=2"]
    both = {"training.seed": [1, 2], "surgery.seed": [3, 4]}
    assert beginnings({"grid": both})[0] == "training.seed=1,surgery.seed=3"


def test_a_long_value_does_not_make_a_name_too_long(tmp_path: Path) -> None:
    keys = [f"classifier.{i}.*" for i in range(60)]
    shares = [{"*": k} | dict.fromkeys(keys, k) for k in (0.3, 0.5)]
    grid = {
        "surgery.k": shares,
        "model.kwargs": [{"width": 0.25, "in_chans": 1, "img_size": 8}],
        "data.val_split": ["x" * 300, "y"],
    }
    names = folders({"grid": grid, "seeds": 2}, tmp_path)
    for name in names:
        (tmp_path / name).mkdir()
    assert len(set(names)) == 8


@pytest.mark.slow
def test_a_run_is_found_by_its_hash_whatever_stands_before_it(tmp_path: Path) -> None:
    sweep = Sweep.parse({**BASE, "grid": {"surgery.k": [0.3, 0.5]}})
    execute(sweep, tmp_path, Here())
    one, other = (run.folder(tmp_path).path for run in sweep.runs)
    one.rename(tmp_path / f"the best one-so far-0-{sweep.runs[0].name}")
    other.rename(tmp_path / sweep.runs[1].name)
    again = Sweep.parse({**BASE, "grid": {"surgery.k": [0.3, 0.5], "training.lr": [0.1]}, "seeds": [0]})
    assert [run.name for run in again.runs] == [run.name for run in sweep.runs]

    class Nothing(Here):
        def run(self, runs: Any, output: Any, stop: Any) -> Any:
            assert not runs
            return super().run(runs, output, stop)

    assert {outcome.state for outcome in execute(again, tmp_path, Nothing())} == {State.FINISHED}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"the best one-so far-0-{sweep.runs[0].name}", sweep.runs[1].name,
    }  # fmt: skip
    with open(tmp_path / "runs.csv", newline="") as file:
        assert [row["folder"][-16:] for row in csv.DictReader(file)] == [run.name for run in sweep.runs]


def test_folders_of_earlier_versions(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "sweep", tmp_path / "sweep"))
    for run in Sweep.load(GOLDEN / "sweep.yaml").runs:
        assert run.title
        assert run.folder(folder).path.name == run.name
        assert run.folder(folder).finished


def test_of_two_folders_the_one_with_a_result_counts(tmp_path: Path) -> None:
    name = "0" * 16
    for prefix, file in (("a-", "log.txt"), ("b-", "recipe.popup.safetensors"), ("c-", "log.txt")):
        (tmp_path / f"{prefix}{name}").mkdir()
        (tmp_path / f"{prefix}{name}" / file).touch()
    (tmp_path / f"d-{name}").touch()
    assert find_folder(tmp_path, name, "new") == f"b-{name}"
    assert find_folder(tmp_path, "1" * 16, "new") == find_folder(tmp_path / "none", name, "new") == "new"


def outcomes(values: Mapping[str, Any], *unfinished: int) -> list[Outcome]:
    """Outcomes of a sweep as if it had run: each run's accuracy is its place."""
    runs = Sweep.parse({**BASE, **values}).runs
    found = []
    for place, run in enumerate(runs):
        numbers = Numbers(place / len(runs), 1.0, 7000.0, 100.0, 50.0)
        done = place not in unfinished
        found.append(Outcome(run, State.FINISHED, numbers) if done else Outcome(run, State.FAILED, error="it, failed"))
    return found


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"grid": {"surgery.k": [0.3, 0.5, 0.7]}, "seeds": 2}, 1),
        ({"grid": {"surgery.k": [0.3, 0.5], "surgery.scheme": ["kaiming_normal", "xavier_normal"]}}, 2),
        ({"grid": {"surgery.scheme": ["kaiming_normal", "xavier_normal"]}, "seeds": 2}, 2),
        ({"runs": [{"label": "a", "grid": {"surgery.k": [0.3, 0.5]}}, {"label": "b", "set": {"surgery": "none"}}]}, 3),
        ({}, 1),
    ],
)
def test_the_picture_has_a_dot_for_each_run(values: Any, labels: int, tmp_path: Path, monkeypatch: Any) -> None:
    import popup_surgery.plots as plots

    drawn: list[Any] = []
    write = plots.write_figure

    def spy(figure: Any, path: Path) -> None:
        drawn.append(figure)
        write(figure, path)

    monkeypatch.setattr(plots, "write_figure", spy)
    found = outcomes(values)
    draw("mine", points(found), tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as image:
        assert min(image.size) > 100
    (axes,) = drawn[0].axes
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == len(found)
    names = [line.get_label() for line in axes.lines] or [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(names)) == labels


def test_nothing_is_drawn_of_a_sweep_without_results(tmp_path: Path) -> None:
    draw("mine", points(outcomes({"seeds": 2}, 0, 1)), tmp_path / "results.png")
    assert not list(tmp_path.iterdir())


def test_a_line_for_each_run(tmp_path: Path) -> None:
    from popup_surgery.sweep.results import write

    found = outcomes({"grid": {"surgery.k": [0.3, 0.5]}, "seeds": 2}, 2)
    write("mine", found, tmp_path)
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "label", "surgery.k", "seed", "state", "accuracy", "seconds", "size", "weights", "kept", "folder", "error",
    ]  # fmt: skip
    assert [(row["surgery.k"], row["seed"], row["state"]) for row in rows] == [
        ("0.3", "0", "finished"), ("0.3", "1", "finished"), ("0.5", "0", "failed"), ("0.5", "1", "finished"),
    ]  # fmt: skip
    assert (rows[2]["accuracy"], rows[2]["error"]) == ("", "it, failed")
    assert rows[1]["accuracy"] == "0.25"
    run: Run = found[1].run
    assert rows[1]["folder"] == f"k=0.3,seed=1-{run.name}"
