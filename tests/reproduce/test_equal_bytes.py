"""Methods at equal bytes: what a run's bytes are, dense networks made small, and the comparison with edge-popup."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from popup_surgery import Artifact, RunError
from popup_surgery.reproduce import FIGURES, reproduce, sweep_of
from popup_surgery.reproduce.rounded import FILE, _round
from popup_surgery.reproduce.table import rows
from popup_surgery.sweep import Outcome, Run, State, points
from popup_surgery.sweep.results import Numbers
from support import Here

BITS = "surgery.encoding=bitpack"


@pytest.fixture(scope="module")
def done(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    output = tmp_path_factory.mktemp("methods")
    settings = ["surgery.k=[0.1, 0.5]", "model.kwargs.width=0.1"]
    sweep = sweep_of("equal-bytes", "tiny", settings, only=["edge-popup", "Zhou et al.", "dense"], data_dir=ten)
    return sweep, output, reproduce("equal-bytes", "tiny", sweep, output, Here(), settings=settings)


def test_small_takes_one_network_and_full_takes_all() -> None:
    nets = {run.recipe.model.name for run in sweep_of("equal-bytes").runs}
    assert nets == {f"popup_surgery/conv{depth}" for depth in (2, 4, 6, 8)}
    small = sweep_of("equal-bytes", "small")
    assert {run.recipe.model.name for run in small.runs} == {"popup_surgery/conv4"}
    assert {run.seed for run in small.runs} == {0, 1, 2}
    assert {run.recipe.training.epochs for run in small.runs} == {20}
    every = {run.recipe.surgery.redraw["every"] for run in small.runs if run.label == "IteRand"}  # type: ignore
    assert every == {100}, "ten thousand images in batches of 64 are 157 steps"
    other = sweep_of("equal-bytes", "small", only=["conv2"])
    assert {run.recipe.model.name for run in other.runs} == {"popup_surgery/conv2"}


@pytest.mark.slow
def test_each_series_runs_two_steps(ten: Path, tmp_path: Path) -> None:
    sweep = sweep_of("equal-bytes", "tiny", ["model.kwargs.width=0.1"], data_dir=ten)
    firsts = {run.label: run for run in reversed(sweep.runs)}
    result = reproduce("equal-bytes", "tiny", replace(sweep, runs=tuple(firsts.values())), tmp_path, Here())
    assert all(outcome.numbers is not None for outcome in result.outcomes)
    series = {row["series"] for row in json.loads(result.files[1].read_text())["rows"]}
    assert series == {*firsts, "dense, pruned, 8 bits", "dense, pruned, 4 bits"}


def test_bytes_are_those_of_the_tensors(done: tuple[Any, Path, Any]) -> None:
    _, output, result = done
    for outcome in result.outcomes:
        numbers, file = outcome.numbers, outcome.run.folder(output).final
        assert numbers is not None
        if outcome.run.label == "dense":
            assert numbers.stored == 4 * numbers.weights
        else:
            container = Artifact.open(file).container
            assert container is not None
            assert numbers.stored == sum(t.stop - t.start for t in container.tensors.values())
            assert numbers.stored < numbers.size


def test_the_table_has_dense_networks_made_small(done: tuple[Any, Path, Any]) -> None:
    _, output, result = done
    dense = next(outcome for outcome in result.outcomes if outcome.run.label == "dense")
    table = json.loads(result.files[1].read_text())["rows"]
    series = [row["series"] for row in table]
    assert series.count("dense, pruned, 8 bits") == series.count("dense, pruned, 4 bits") == 5
    assert dense.numbers is not None
    measured = json.loads((dense.run.folder(output).path / FILE).read_text())
    assert measured["8 bits, kept 1.0"]["stored"] == pytest.approx(dense.numbers.stored / 4, rel=0.05)
    assert measured["4 bits, kept 1.0"]["stored"] == pytest.approx(dense.numbers.stored / 8, rel=0.1)
    assert "| edge-popup (%) |" in result.files[0].read_text()
    assert all(file.exists() for file in result.files)


def test_a_dense_network_is_measured_once(done: tuple[Any, Path, Any]) -> None:
    sweep, output, result = done
    dense = next(outcome for outcome in result.outcomes if outcome.run.label == "dense")
    file = dense.run.folder(output).path / FILE
    values = json.loads(file.read_text())
    values["8 bits, kept 0.5"]["accuracy"] = 0.4321
    file.write_text(json.dumps(values))
    reproduce("equal-bytes", "tiny", sweep, output, Here())
    assert "43.21" in result.files[0].read_text()
    file.write_text("{")
    with pytest.raises(RunError, match=r"rounded.json is damaged; remove it"):
        reproduce("equal-bytes", "tiny", sweep, output, Here())
    file.unlink()


def test_a_run_that_another_figure_made_is_coded_as_here(ten: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"only": ["edge-popup"], "data_dir": ten}
    own = sweep_of("equal-bytes", "tiny", ["surgery.k=[0.1]", "model.kwargs.width=0.1"], **settings)
    (run,) = own.runs
    other = sweep_of("equal-bytes", "tiny", ["surgery.k=[0.1]", "model.kwargs.width=0.1", BITS], **settings)
    sizes = []
    for sweep in (other, own, own):
        (outcome,) = reproduce("equal-bytes", "tiny", sweep, tmp_path, Here()).outcomes
        assert outcome.numbers is not None
        sizes.append(outcome.numbers.stored)
    assert other.runs[0].name == run.name
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.2), "at k = 0.1 a mask has half a bit a weight"
    assert sizes[1] == sizes[2] == Outcome.read(run, tmp_path).numbers.stored  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_rounding(bits: int, share: float) -> None:
    """Against a few lines of NumPy."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    state = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with torch.no_grad():
        size, left = _round(network, state, bits, share)
    weights = [state["0.weight"].numpy(), state["2.weight"].numpy()]
    least = np.sort(np.abs(np.concatenate([w.ravel() for w in weights])))[::-1][round(share * 720) - 1]
    expected, top = 34 * 4, 2 ** (bits - 1) - 1
    for name, w in zip(("0.weight", "2.weight"), weights, strict=True):
        mask, scale = np.abs(w) >= least, np.abs(w).max() / top
        found = network.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(found, np.round(w / scale) * scale * mask, rtol=1e-5)
        assert len(np.unique(found)) <= 2**bits
        expected += 4 + mask.sum() * bits / 8 + math.log2(math.comb(w.size, int(mask.sum()))) / 8
    assert size == pytest.approx(expected)
    assert left == round(share * 720)
    assert torch.equal(network.get_parameter("0.bias"), state["0.bias"])


def test_edge_popup_at_the_same_bytes_is_read_off_its_curve() -> None:
    sweep = sweep_of("equal-bytes", "small", seeds=1)

    def outcome(run: Run) -> Outcome:
        accuracy, stored = 0.9, 2000.0
        if run.label == "edge-popup":
            k = run.values["surgery.k"]
            accuracy, stored = {0.1: (0.4, 1000.0), 0.3: (0.6, 4000.0)}.get(k, (0.1, 10.0 * k))
        return Outcome(run, State.FINISHED, Numbers(accuracy, 1, 1, 1, 1, stored))

    found = rows(FIGURES["equal-bytes"], points([outcome(run) for run in sweep.runs]))
    other = next(row for row in found if row.series == "Zhou et al.")
    assert (other.accuracy, other.paper, other.difference) == pytest.approx((90.0, 50.0, 40.0))
    assert all(row.paper is None for row in found if row.series == "edge-popup")
    outside = [replace(each, numbers=Numbers(0.9, 1, 1, 1, 1, 1e9)) for each in map(outcome, sweep.runs[-1:])]
    assert rows(FIGURES["equal-bytes"], points([*map(outcome, sweep.runs[:-1]), *outside]))[-1].paper is None
