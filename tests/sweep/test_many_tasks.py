"""Many tasks on one network: the shipped sweeps in short, a sweep's base, and the table of tasks × accuracy."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from popup_surgery import ConversionError, MaskBank, PopupError, RecipeError, RunError, evaluate, inspect
from popup_surgery.config.catalog import find, shipped_sweeps
from popup_surgery.errors import Stopped
from popup_surgery.sweep import Outcome, State, Sweep, evaluate_bank, execute
from support import GREY, Here, joined, opened

Cli = Callable[..., Any]
SHORT = ["training.epochs=5"]
DIGITS = {"recipe": "digits", "set": {"training.epochs": 1}}
BASE = {"recipe": "digits", "set": {"surgery": "none", "training.epochs": 1}}
MASKS = {"recipe": "digits", "set": {"surgery": {"scheme": "pretrained", "scaled": False}, "training.epochs": 1}}


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Three tasks of the shipped sweep, five epochs each."""
    output = tmp_path_factory.mktemp("permuted") / "out"
    sweep = Sweep.load("many_tasks/permuted_digits", [*SHORT, "data.permute_seed=[0, 1, 2]"], output=output)
    assert sweep.bank
    return output, execute(sweep, output, Here())


@pytest.fixture(scope="module")
def piggyback(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path, list[Outcome]]:
    """Two tasks of the shipped sweep on a base of five epochs."""
    output = tmp_path_factory.mktemp("piggyback") / "out"
    settings = [*SHORT, "base.training.epochs=5", "data.permute_seed=[null, 0]"]
    sweep = Sweep.load("many_tasks/piggyback_digits", settings, output=output)
    return sweep, output, execute(sweep, output, Here())


# the shipped sweeps


@pytest.mark.parametrize("name", [name for name in shipped_sweeps() if name.startswith("many_tasks/")])
def test_a_sweep_of_many_tasks_has_a_header_with_its_command_and_what_to_expect(name: str) -> None:
    first, second, *header = find(name).read_text().splitlines()
    assert first == f"# popup-surgery sweep {name}"
    assert second == "#"
    assert re.search(r"\d ?%.*minutes", " ".join(line for line in header if line.startswith("#")))
    sweep = Sweep.load(name)
    assert sweep.bank
    assert len(sweep.runs) >= 5


@pytest.mark.slow
def test_permuted_digits_have_one_random_network(permuted: tuple[Path, list[Outcome]]) -> None:
    assert len(Sweep.load("many_tasks/permuted_digits").runs) == 20
    output, outcomes = permuted
    found = evaluate_bank(outcomes, output)
    assert found is not None
    assert [task.task for task in found.tasks] == [f"permute_seed={seed}" for seed in range(3)]
    assert found.how == "halving"
    for task, outcome in zip(found.tasks, outcomes, strict=True):
        assert outcome.numbers is not None
        assert task.accuracy == outcome.numbers.accuracy
        assert task.accuracy > 0.85
        assert task.found == 1, "with the mean of the running statistics, few tasks are found"
        assert task.inferred == task.accuracy
        assert (task.images, task.problem) == (359, "")
        assert task.data.startswith("digits, pixels permuted by seed ")
    rows = list(csv.DictReader((output / "tasks.csv").read_text().splitlines()))
    assert [float(row["accuracy"]) for row in rows] == [task.accuracy for task in found.tasks]


@pytest.mark.slow
def test_a_task_under_another_mask_is_told_apart(permuted: tuple[Path, list[Outcome]]) -> None:
    output, outcomes = permuted
    files = {outcome.run.title: outcome.run.folder(output).final for outcome in outcomes}
    bank = MaskBank(next(iter(files.values())))
    for name, file in files.items():
        bank.add(name, file)
    before = {key: tensor.clone() for key, tensor in bank.network.state_dict().items()}
    digits = opened(GREY, name="digits", permute_seed=1, mean=[0.306], std=[0.376], train=False)
    images, labels = joined(digits.validation())
    for how in ("one_step", "halving", "each"):
        assert bank.infer(images[:128], how=how).task == "permute_seed=1", how
    assert bank.infer(images[:8]).how == "each", "the statistics of few images are poor"
    with pytest.raises(ConversionError, match=r"for 1 image; the network has batch norms, .* or how='each'"):
        bank.infer(images[:1], how="halving")
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.network.state_dict().items())
    wrong = bank.predict(images, "permute_seed=0")
    assert isinstance(wrong, torch.Tensor)
    assert (wrong.argmax(1) == labels).float().mean() < 0.5


@pytest.mark.slow
def test_piggyback_learns_masks_on_the_weights_of_the_base(piggyback: tuple[Sweep, Path, list[Outcome]]) -> None:
    sweep, output, outcomes = piggyback
    assert sweep.base is not None
    base = sweep.base.folder(output).final
    assert base.parent.name.startswith("base-")
    for outcome in outcomes:
        file = outcome.run.folder(output).final
        manifest = inspect(file)
        assert outcome.run.recipe.model.pretrained == str(base)
        assert manifest.base is not None
        assert manifest.provenance["recipe"]["surgery"]["learner"] == "piggyback"
        assert outcome.numbers is not None
        assert evaluate(file, base=base).accuracy == outcome.numbers.accuracy > 0.85
    found = evaluate_bank(outcomes, output)
    assert found is not None
    assert [task.task for task in found.tasks] == ["permute_seed=null", "permute_seed=0"]
    assert [task.found for task in found.tasks] == [1, 1]


def test_a_base_is_trained_once(piggyback: tuple[Sweep, Path, list[Outcome]]) -> None:
    sweep, output, outcomes = piggyback
    seen: list[Any] = []

    class Nothing(Here):
        def run(self, runs: Any, output: Path, stop: Any) -> Any:
            seen.extend(runs)
            return super().run(runs, output, stop)

    assert execute(sweep, output, Nothing()) == outcomes
    assert seen == []
    given = Sweep.load("many_tasks/piggyback_digits", ["model.pretrained=mine.safetensors"], output=output)
    assert given.base is None
    assert {run.recipe.model.pretrained for run in given.runs} == {"mine.safetensors"}


@pytest.mark.slow
def test_the_command_prints_and_writes_the_table(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permuted: tuple[Path, list[Outcome]]
) -> None:
    output, outcomes = permuted
    monkeypatch.setattr("popup_surgery.commands.sweep.chosen", lambda *_: Here())
    seeds = "data.permute_seed=[0, 1, 2]"
    done = cli("sweep", "many_tasks/permuted_digits", "--set", *SHORT, "--set", seeds, "-o", output)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "3 of 3 runs had ended before"
    assert re.fullmatch(r"task +kept +accuracy +not told +task found +images +data", lines[-6])
    for seed, (line, outcome) in enumerate(zip(lines[-5:-2], outcomes, strict=True)):
        assert outcome.numbers is not None
        accuracy = f"{100 * outcome.numbers.accuracy:.1f} %"
        data = f"digits, pixels permuted by seed {seed}"
        assert re.fullmatch(
            rf"permute_seed={seed} +50.0 % +{accuracy} +{accuracy} +100.0 % +359 +{data}",
            line,
        ), line
    assert lines[-2].startswith("mean ")
    assert lines[-1] == f"wrote {output}/results.csv, runs.csv, tasks.csv, results.json and results.png"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("permuted_digits", ["data.permute_seed=[3, 9]"]), ("piggyback_digits", ["data.permute_seed=[null, 9]"])],
)
def test_the_whole_command(cli: Cli, tmp_path: Path, name: str, settings: list[str]) -> None:
    more = [word for setting in settings for word in ("--set", setting)]
    done = cli("sweep", f"many_tasks/{name}", *more, "-o", tmp_path / "out", "--jobs", "1")
    assert (done.status, done.err) == (0, "")
    rows = list(csv.DictReader((tmp_path / "out" / "tasks.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert all(float(row["accuracy"]) > 0.95 for row in rows)
    assert all(float(row["found"]) == 1 for row in rows)
    row = r"^permute_seed=.*100\.0 % +359 +digits(?:, pixels permuted by seed \d+)?$"
    assert len(re.findall(row, done.out, re.MULTILINE)) == 2


@pytest.mark.slow
def test_tasks_of_several_data_sets_have_heads_of_their_own(images: Path, ten: Path, tmp_path: Path) -> None:
    network = {"name": "popup_surgery/fc_bn", "kwargs": {"in_chans": 3, "img_size": 16, "width": 0.1}}
    data = {"name": "folder", "batch_size": 8, "workers": 0, "input_size": [3, 16, 16]}

    def of(root: Path, classes: int) -> dict[str, Any]:
        sized = {**network, "kwargs": {**network["kwargs"], "num_classes": classes}}  # type: ignore[dict-item]
        return {"model": sized, "data": {**data, "root": str(root)}}

    values = {
        "bank": True,
        "base": {"recipe": "digits", "set": {**BASE["set"], **of(ten, 10)}},  # type: ignore[dict-item]
        "runs": [
            {"label": "three", "set": {**MASKS["set"], **of(images, 3)}},  # type: ignore[dict-item]
            {"label": "ten", "set": {**MASKS["set"], **of(ten, 10)}},  # type: ignore[dict-item]
        ],
        "recipe": "digits",
    }
    sweep = Sweep.parse(values, output=tmp_path / "out")
    outcomes = execute(sweep, tmp_path / "out", Here())
    assert [outcome.error for outcome in outcomes] == ["", ""]
    found = evaluate_bank(outcomes, tmp_path / "out")
    assert found is not None
    assert [(task.task, task.images) for task in found.tasks] == [("three", 6), ("ten", 20)]
    assert found.how == "each"


# what is refused


@pytest.mark.parametrize(
    ("values", "settings", "says"),
    [
        (DIGITS | {"bank": 3}, [], "sweep: bank is 3; expected true or false"),
        (
            DIGITS | {"bank": True, "grid": {"surgery": ["none", {"k": 0.5, "scaled": False}]}},
            [],
            r"bank is true, and digits surgery=none seed 0 trains a dense network; expected runs that learn masks",
        ),
        (
            DIGITS | {"bank": True, "seeds": 2},
            [],
            r"bank is true, and surgery\.seed is 0 in digits seed 0 and 1 in digits seed 1; expected one network",
        ),
        (
            DIGITS | {"bank": True, "grid": {"model.kwargs.width": [0.25, 0.5]}},
            [],
            r"bank is true, and model\.kwargs is .*'width': 0\.25.* in .* and .*'width': 0\.5.* in ",
        ),
        (
            DIGITS | {"bank": True, "grid": {"surgery.scaled": [True], "surgery.k": [0.3, 0.5]}},
            [],
            r"bank is true, and surgery\.k is 0\.3 in .* and 0\.5 in ",
        ),
        (MASKS | {"base": 3}, [], "sweep: base is 3; expected a recipe, or a mapping with recipe and set"),
        (MASKS | {"base": {"set": {}}}, [], "sweep: base is .*; expected a recipe, or a mapping with recipe and set"),
        (MASKS | {"base": {"recipe": "digts"}}, [], r"sweep, base: .*'digts'.*\bdigits\b"),
        (MASKS | {"base": {"recipe": "digits", "seeds": 2}}, [], "sweep, base: seeds is not a key"),
        (MASKS | {"base": "digits"}, [], "sweep, base: digits learns a mask; expected a dense network: set surgery to"),
        (MASKS | {"base": BASE}, ["base.training.epochs=0"], r"sweep, base: training\.epochs is 0; expected"),
        (MASKS | {"base": BASE, "grid": {"model.pretrained": ["a.pt"]}}, [], r"model\.pretrained and base are given"),
        (MASKS, ["base.training.epochs=1"], r"base\.training\.epochs is given, but the sweep has no base"),
        (
            MASKS | {"base": BASE},
            ["base.training.epochs=1", "model.pretrained=a.pt"],
            r"base\.training\.epochs is given, but model\.pretrained is given, so there is no base",
        ),
    ],
)
def test_a_bad_sweep_of_tasks_is_one_sentence(values: Any, settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Sweep.parse(values, settings=settings)
    assert "\n" not in str(caught.value)


def test_a_base_belongs_to_its_folder(tmp_path: Path) -> None:
    sweep = Sweep.parse(MASKS | {"base": BASE}, output=tmp_path / "one")
    with pytest.raises(RunError, match=r"loaded for another folder; load it with output="):
        execute(sweep, tmp_path / "two", Here())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ends", [State.FAILED, State.STOPPED])
def test_no_run_starts_without_its_base(ends: State, tmp_path: Path) -> None:
    sweep, started = Sweep.parse(MASKS | {"base": BASE}, output=tmp_path), list[str]()

    class Ending(Here):
        def run(self, runs: Any, output: Path, stop: Any) -> Any:
            for run in runs:
                started.append(str(run))
                yield run, State.RUNNING, ""
                yield run, ends, "no more memory"

    kind: type[PopupError] = RunError if ends is State.FAILED else Stopped
    with pytest.raises(kind, match=r"base digits seed 0( failed: no more memory; its folder is .*base-.*)?"):
        execute(sweep, tmp_path, Ending())
    assert started == ["base digits seed 0"]
    states = [
        run["state"] for point in json.loads((tmp_path / "results.json").read_text())["points"] for run in point["runs"]
    ]
    assert states == ["waiting"]


@pytest.mark.slow
def test_a_dry_run_measures_the_base_first(cli: Cli, tmp_path: Path) -> None:
    done = cli("sweep", "many_tasks/piggyback_digits", "-o", tmp_path / "out", "--dry-run", "--jobs", "1")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:2] == [
        "5 runs, 0 of them finished",
        "they start from the weights of base digits seed 0; once it is finished, they can be measured too",
    ]
    assert re.match(r"1 +base digits seed 0 ", lines[3])
    assert not (tmp_path / "out").exists()
