"""The paper's figures: every sweep resolves at every scale, and at `tiny` they run, are drawn and stand in a table."""

import json
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from popup_surgery import DataError, RecipeError, UnknownName, train
from popup_surgery.config.catalog import shipped, shipped_sweeps
from popup_surgery.reproduce import FIGURES, PAPER, SCALES, Protocol, reproduce, sweep_of
from popup_surgery.reproduce.table import rows
from popup_surgery.sweep import Outcome, Run, State, points
from popup_surgery.sweep.results import Numbers
from support import Here, slow_except

RUNS = {
    "figure3": 240, "figure4": 320, "figure5": 75, "figure6": 280, "figure7": 200, "figure8": 10, "table2": 10,
    "figure9": 13, "figure10": 36,
}  # fmt: skip


@pytest.mark.parametrize("figure", slow_except(PAPER, ["figure3", "figure6"]))
def test_a_figures_runs_are_those_of_the_paper(figure: str) -> None:
    full = sweep_of(figure)
    assert len(full.runs) == RUNS[figure]
    seeds = {run.seed for run in full.runs}
    protocol = PAPER[figure].protocol
    assert seeds == ({0} if protocol == "imagenet" else {0, 1, 2, 3, 4})
    assert {run.recipe.training.epochs for run in full.runs} == {100}
    assert {run.recipe.data.max_train for run in full.runs} == {None}
    for scale in SCALES:
        runs = sweep_of(figure, scale).runs
        assert len(runs) * len(seeds) == RUNS[figure] * (SCALES[scale].get(protocol, Protocol()).seeds or len(seeds))


SCHEMES = {  # by what a label says
    "Kaiming Normal": "kaiming_normal", "N_k": "kaiming_normal", "Kaiming Uniform": "kaiming_uniform",
    "U_k": "kaiming_uniform", "Xavier Normal": "xavier_normal", "N_x (Xavier)": "xavier_normal",
    "U_x (Xavier)": "xavier_uniform",
}  # fmt: skip


@pytest.mark.parametrize("figure", PAPER)
def test_the_papers_hyperparameters(figure: str) -> None:
    """Sections 4.1 and 4.2; of Zhou et al.'s method and ImageNet the published configurations."""
    imagenet = PAPER[figure].protocol == "imagenet"
    for run in sweep_of(figure).runs:
        recipe, label, net = run.recipe, run.label, run.recipe.model.name.split("/")[1]
        dense, zhou = label.startswith("dense"), label.startswith("Zhou")
        got = recipe.training
        if label == "dense, Adam":
            expected = ("adam", "constant", 60, 2e-4 if net == "conv2" else 3e-4, 0.0, 0)
        elif imagenet:
            rate = 200.0 if zhou else 0.01 if net == "vgg16" else 0.256
            expected = ("sgd", "cosine", 256, rate, 0.0 if zhou else 2**-15, 5)
        else:
            rate = (800.0 if net == "conv8" else 200.0) if zhou else 0.01 if dense else 0.1
            expected = ("sgd", "cosine", 128, rate, 0.0 if zhou else 1e-4, 0)
        batch = recipe.data.batch_size
        found = (got.optimizer, got.schedule, batch, got.lr, got.weight_decay, got.warmup_epochs)
        assert found == expected, str(run)
        assert got.momentum == (0.875 if imagenet else 0.9)
        assert got.label_smoothing == (0.1 if imagenet else 0.0)
        assert (recipe.surgery == "none") == dense
        if not isinstance(recipe.surgery, str):
            name = label.removesuffix(", scaled").split(", ")[-1]
            scaled = label.endswith(", scaled") if figure in ("figure7", "figure10") else imagenet and not zhou
            assert recipe.surgery.scheme == SCHEMES.get(name, "signed_kaiming_constant"), str(run)
            assert recipe.surgery.scaled == scaled
            assert recipe.surgery.learner == ("supermask" if zhou else "edge_popup")


def test_subnetworks_of_figure5_have_their_size() -> None:
    from popup_surgery import build, plan

    for run in sweep_of("figure5", seeds=1).runs:
        model, surgery = run.recipe.model, run.recipe.surgery
        assert not isinstance(surgery, str)
        kept = plan(build(model.name, **model.kwargs), surgery.k).kept
        assert kept == pytest.approx(int(run.label.split()[0].replace(",", "")), rel=0.005), str(run)


@pytest.fixture(scope="module")
def done(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    output = tmp_path_factory.mktemp("paper")
    sweep = sweep_of("figure3", "tiny", ["model.kwargs.width=0.1"], only=["conv2"], data_dir=ten)
    return sweep, output, reproduce("figure3", "tiny", sweep, output, Here())


@pytest.mark.slow
def test_a_figure_is_run_drawn_and_set_beside_the_papers_numbers(done: tuple[Any, Path, Any], ten: Path) -> None:
    sweep, _, result = done
    assert len(sweep.runs) == 12
    assert all(outcome.numbers is not None for outcome in result.outcomes)
    markdown, values, png, svg = result.files
    with Image.open(png) as picture:
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - colour).max(1) < 10).sum() > 50
    xml.etree.ElementTree.parse(svg)
    assert all(colour in svg.read_text() for colour in ("#0072b2", "#d55e00"))
    assert all(path.stat().st_size < 200_000 for path in result.files)
    table = json.loads(values.read_text())["rows"]
    assert len(table) == 13
    best = table[-1]
    ours = max(row["accuracy"] for row in table[:-1] if row["series"] == "Signed Constant")
    assert (best["accuracy"], best["paper"], best["network"], best["series"]) == (
        ours,
        77.5,
        "conv2",
        "Signed Constant",
    )
    assert best["best"]
    assert "| conv2 | Signed Constant | best, " in markdown.read_text()
    tenth = next(row for row in table if row["series"] == "Signed Constant" and row["x"] == 10)
    assert (tenth["paper"], tenth["difference"]) == (65.0, tenth["accuracy"] - 65)
    assert f"| {tenth['accuracy']:.2f} | 1 | 65 (figure 3) | {tenth['accuracy'] - 65:+.1f} |" in markdown.read_text()
    assert "Scale: tiny; 32 training and 16 validation images; batch: 16; epochs: 1; seeds: 1." in markdown.read_text()


@pytest.mark.slow
def test_a_figure_again_runs_nothing(done: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, output, result = done

    def nothing(self: Here, runs: Sequence[Run], *_: Any) -> Iterator[Any]:
        assert not runs
        yield None

    monkeypatch.setattr(Here, "run", nothing)
    before = [path.read_bytes() for path in result.files]
    again = reproduce("figure3", "tiny", sweep, output, Here())
    assert [path.read_bytes() for path in again.files] == before


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["figure6", "figure9"])
def test_baselines_have_a_line_across(figure: str, ten: Path, tmp_path: Path) -> None:
    names = ["model.name=timm/resnet10t", "model.kwargs.num_classes=10"]
    settings, only = (names, []) if figure == "figure9" else (["model.kwargs.width=0.1"], ["conv2"])
    sweep = sweep_of(figure, "tiny", settings, only=only, data_dir=ten)
    result = reproduce(figure, "tiny", sweep, tmp_path, Here())
    table = json.loads(result.files[1].read_text())["rows"]
    zhou = [row for row in table if row["series"].startswith("Zhou")]
    assert zhou
    assert all(row["x"] is None and row["accuracy"] is not None for row in zhou)
    assert {row["paper"] for row in zhou} == ({None} if figure == "figure9" else {66.0})


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["figure4", "figure5", "figure7", "figure8", "figure10"])
def test_each_series_of_a_figure_runs_two_steps(figure: str, ten: Path, tmp_path: Path) -> None:
    settings = {
        "figure8": ["model.kwargs.num_classes=10"],
        "figure10": ["model.name=timm/resnet10t", "model.kwargs.num_classes=10"],
    }.get(figure, [])
    sweep = sweep_of(figure, "tiny", settings, data_dir=ten)
    firsts = {run.label: run for run in reversed(sweep.runs)}
    result = reproduce(figure, "tiny", replace(sweep, runs=tuple(firsts.values())), tmp_path, Here())
    assert all(outcome.numbers is not None for outcome in result.outcomes)
    table = json.loads(result.files[1].read_text())["rows"]
    assert {row["series"] for row in table} == set(firsts)
    text = result.files[0].read_text()
    form = ",.0f" if figure == "figure8" else "g"
    assert all(f"{row['x']:{form}} |" in text for row in table)


def test_the_papers_numbers_stand_at_their_own_series() -> None:
    """Of Signed Constant, and not of "Signed Constant, scaled"."""
    sweep = sweep_of("figure7", "tiny")
    numbers = {False: Numbers(0.5, 1, 1, 1, 1), True: Numbers(0.9, 1, 1, 1, 1)}
    table = rows(
        FIGURES["figure7"],
        points([Outcome(run, State.FINISHED, numbers[run.label.endswith("scaled")]) for run in sweep.runs]),
    )
    assert {row.series for row in table if row.paper is not None} == {"Signed Constant"}
    assert [(row.accuracy, row.paper) for row in table if row.best] == [(50.0, 86.0)]


@pytest.mark.slow
def test_a_figure_of_one_share_is_drawn(ten: Path, tmp_path: Path) -> None:
    settings = ["surgery.k=0.5", "surgery.scaled=true", "model.kwargs.width=0.1"]
    sweep = sweep_of("figure3", "tiny", settings, only=["conv2"], data_dir=ten)
    assert [run.values.get("surgery.k") for run in sweep.runs] == [0.5, 0.5, None, None]
    assert all(run.recipe.surgery == "none" or run.recipe.surgery.scaled for run in sweep.runs)
    result = reproduce("figure3", "tiny", sweep, tmp_path, Here(), settings=settings)
    assert "| conv2 | Signed Constant | best, 50 |" in result.files[0].read_text()
    assert "\nset: surgery.k=0.5; surgery.scaled=true; model.kwargs.width=0.1." in result.files[0].read_text()
    assert all(path.exists() for path in result.files)


def test_what_is_no_figure_or_scale(ten: Path) -> None:
    with pytest.raises(UnknownName, match=r"figure11.*figure10"):
        sweep_of("figure11")
    with pytest.raises(UnknownName, match=r"smal.*small"):
        sweep_of("figure3", "smal")
    with pytest.raises(UnknownName, match=r"'conv3'.*conv4"):
        sweep_of("figure3", only=["conv3"])
    with pytest.raises(RecipeError, match=r"^figure8 has no run of dense and resnet101 together"):
        sweep_of("figure8", only=["dense", "resnet101"])
    with pytest.raises(RecipeError, match=r"surgery\.k"):
        sweep_of("figure3", "tiny", ["surgery.k=[2]"])
    for figure, setting, named in (
        ("figure6", "model.name=popup_surgery/conv2", r"Zhou et al\., N_k .*conv2 .*training\.lr 200\.0 and 800\.0;"),
        ("figure3", "training.epochs=[1, 2]", r"Kaiming Normal .*training\.epochs 1 and 2;"),
        (
            "figure10",
            "model.name=[timm/resnet18, timm/resnet50]",
            r".*model\.name 'timm/resnet18' and 'timm/resnet50';",
        ),
    ):
        with pytest.raises(RecipeError, match=rf"^{figure} would have {named} choose networks with --only"):
            sweep_of(figure, settings=[setting])


def test_series_and_networks_are_chosen(tmp_path: Path) -> None:
    both = sweep_of("figure6", only=["Zhou et al., N_k", "conv2", "conv8"], seeds=1).runs
    assert [(run.recipe.model.name, run.recipe.training.lr) for run in both] == [
        ("popup_surgery/conv2", 200.0), ("popup_surgery/conv8", 800.0)
    ]  # fmt: skip
    assert len(sweep_of("figure6", only=["conv4"], seeds=1).runs) == 14
    other = sweep_of("figure6", settings=["surgery.scheme=lecun_normal"], only=["Zhou et al., N_x (Xavier)"]).runs
    assert {run.recipe.dump()["surgery"]["scheme"] for run in other} == {"lecun_normal"}
    assert {run.label for run in sweep_of("figure8", only=["resnet50"]).runs} == {
        "Kaiming Normal",
        "Signed Constant",
        "dense",
    }
    one = sweep_of("figure3", settings=["surgery.k=[0.5]"], only=["conv2"], seeds=1).runs
    assert [run.label for run in one] == ["Kaiming Normal", "Signed Constant", "dense, SGD", "dense, Adam"]
    with pytest.raises(DataError, match=r"^data set torch/cifar10 needs a folder; pass --data-dir DIR"):
        reproduce("figure3", "tiny", sweep_of("figure3", "tiny"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", slow_except(shipped(), ["digits", "fashion_mnist/conv4"]))
def test_every_recipe_runs_two_steps(name: str, ten: Path, tmp_path: Path) -> None:
    size = {"digits": None, "methods/digits_2of4": None, "fashion_mnist/conv4": [1, 28, 28]}.get(name, [3, 32, 32])
    settings = ["data.max_train=16", "data.max_validation=8", "data.batch_size=8", "training.epochs=1"]
    settings += ["training.warmup_epochs=0", "data.workers=0", "training.precision=float32"]
    if size is not None:
        settings += ["data.name=folder", f"data.input_size={size}"]
    if name.startswith("imagenet"):
        settings.append("model.kwargs.num_classes=10")
    result = train(name, overrides=settings, output=tmp_path / "run", data_dir=ten if size else None)
    assert len(result.history) == 1
    assert result.file.exists()


def test_sweeps_are_no_recipes(cli: Callable[..., Any]) -> None:
    paper = [f"paper/figure{n}" for n in (10, 3, 4, 5, 6, 7, 8, 9)]
    assert shipped_sweeps() == [
        "many_tasks/permuted_digits",
        "many_tasks/piggyback_digits",
        "methods/equal_bytes",
        "methods/patterns",
        "methods/patterns_resnet18",
        *paper,
    ]
    assert not set(shipped_sweeps()) & set(shipped())
    assert cli("recipes").out.split() == shipped() + shipped_sweeps()
