"""Several runs on one GPU: how many at a time, MPS around them, and numbers that the memory has no room for."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from popup_surgery import PopupError, RunError
from popup_surgery.sweep import Local, Run, State, Sweep, engines, estimate, execute, gpus, trial
from popup_surgery.sweep.estimate import RunKind

TWO = {"recipe": "digits", "set": {"training.epochs": 1}, "grid": {"surgery.k": [0.3, 0.5]}}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has a GPU; what runs on it sees none, and takes the CPU."""
    for module in (gpus, engines, trial):
        monkeypatch.setattr(module, "gpus", lambda: ["GPU-1"])


def with_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let a measurement, which is real, find that a GPU has room for so many runs."""
    found = estimate.measure
    for module in (estimate, trial):
        monkeypatch.setattr(module, "measure", lambda *a: [replace(kind, room=room) for kind in found(*a)])


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the program that starts and ends MPS; the file has what it was told."""
    control = tmp_path / "bin" / "nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text(f'#!/bin/sh\necho "$1$(test "$1" || cat)" >> {tmp_path}/told\n')
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "told"


@pytest.mark.slow
def test_runs_share_a_gpu(a_gpu: None, mps: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_room(monkeypatch, 2)
    environments = []
    start = engines.start_run

    def noting(run: Run, output: Path, environment: Mapping[str, str]) -> Any:
        environments.append(environment)
        return start(run, output, environment)

    monkeypatch.setattr(engines, "start_run", noting)
    sweep = Sweep.parse(TWO)
    assert Local(pack=2).places(sweep.runs) == 2
    outcomes = execute(sweep, tmp_path / "sweep", Local(pack=2))
    assert [outcome.state for outcome in outcomes] == [State.FINISHED] * 2
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["GPU-1", "GPU-1"]
    assert mps.read_text() == "-d\nquit\n"


def test_what_the_memory_has_no_room_for(a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_room(monkeypatch, 3)
    says = r"--pack is 4; a GPU's memory has room for 3 runs such as digits surgery\.k=0\.3 seed 0"
    with pytest.raises(PopupError, match=says):
        execute(Sweep.parse(TWO), tmp_path, Local(pack=4))
    assert not list(tmp_path.glob("*/recipe.yaml"))


@pytest.mark.slow
def test_without_a_gpu_it_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if gpus.gpus():
        pytest.skip("this machine has a GPU")
    (outcome,) = execute(Sweep.parse(TWO | {"grid": {}}), tmp_path, Local(pack=4))
    assert outcome.state is State.FINISHED
    assert caplog.messages == ["--pack is 4, and this machine has no GPU: it has no effect"]
    assert Local(pack=4).places([outcome.run]) == Local().places([outcome.run])


@pytest.mark.slow
def test_there_is_no_room_to_measure_on_a_cpu() -> None:
    if gpus.gpus():
        pytest.skip("this machine has a GPU")
    kinds = estimate.measure(Sweep.parse(TWO).runs)
    assert [(type(kind), kind.room) for kind in kinds] == [(RunKind, None)]


# --pack auto ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "asked", "chosen"),
    [
        ({1: 104, 2: 190, 4: 350, 8: 560, 16: 694}, 16, 16),
        ({1: 100, 2: 190, 4: 200, 8: 400}, 4, 2),  # 4 bring 5 % more, and 2 are within 5 % of them
        ({1: 100, 2: 190, 4: 205, 8: 400}, 4, 4),
        ({1: 100, 2: 80, 4: 400}, 2, 1),
        ({1: 100, 2: 104}, 2, 1),
        ({1: 100, 2: 190, 4: None}, 4, 2),  # no more fit
        ({1: 100}, 1, 1),
        ({1: None, 2: 100}, 1, 1),
    ],
)
def test_the_choice(measured: dict[int, float | None], asked: int, chosen: int) -> None:
    seen = []

    def speed(count: int) -> float | None:
        seen.append(count)
        return measured[count]

    assert trial.choice(trial.speeds_of(measured, speed)) == chosen
    assert seen[-1] == asked


@pytest.mark.slow
def test_a_trial_chooses(
    a_gpu: None, mps: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(trial, "SECONDS", 0.5)
    with_room(monkeypatch, 3)
    others = {"recipe": "digits", "label": "others", "set": {"training.epochs": 1, "surgery.learner": "gem_miner"}}
    outcomes = execute(Sweep.parse({"runs": [others, TWO], "seeds": 1}), tmp_path / "sweep", Local(pack="auto"))
    assert [outcome.state for outcome in outcomes] == [State.FINISHED] * 3
    (said,) = caplog.messages
    found = re.fullmatch(
        r"--pack auto takes [12] at a time on each GPU; steps a second in total, of runs such as digits "
        r"surgery\.k=0\.3 seed 0: [\d,.]+ with 1, [\d,.]+ with 2",
        said,
    )
    assert found, said
    assert mps.read_text() == "-d\nquit\n"
    assert not list((tmp_path / "tmp").iterdir())
    assert len([path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]) == 3
    assert not [child for child in psutil.Process().children() if trial.__name__ in child.cmdline()]


@pytest.mark.slow
def test_a_trial_that_fails_stops_nothing(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trial, "environment", lambda run, place: {"PYTHONHOME": "/nowhere"})
    outcomes = execute(Sweep.parse(TWO), tmp_path, Local(pack="auto"))
    assert [outcome.state for outcome in outcomes] == [State.FINISHED] * 2
    (said,) = caplog.messages
    assert said.startswith("--pack auto takes 1 at a time on each GPU; ")
    assert said.endswith(": none could be measured")


def test_what_cannot_be_measured_takes_one(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RunError("digits seed 0 cannot be measured: no room")

    monkeypatch.setattr(trial, "measure", fails)
    runs = Sweep.parse(TWO).runs
    assert Local(pack="auto").packed(runs) == Local(pack=1)
    assert caplog.messages == ["--pack auto takes 1 at a time on each GPU: digits seed 0 cannot be measured: no room"]
    assert Local(pack="auto").packed(runs[:1]) == Local(pack=1)
    assert len(caplog.messages) == 1, "one run needs no trial"


def test_auto_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    if gpus.gpus():
        pytest.skip("this machine has a GPU")
    assert Local(pack="auto").packed(Sweep.parse(TWO).runs) == Local()
    assert caplog.messages == ["--pack is auto, and this machine has no GPU: it has no effect"]


@pytest.mark.parametrize("given", ["0", "-1", "2.5", "many"])
def test_what_pack_may_be(given: str, cli: Callable[..., Any]) -> None:
    said = cli("sweep", "digits", "--pack", given)
    assert (said.status, said.err) == (2, f"error: --pack is {given}; expected an integer from 1, or auto\n")
