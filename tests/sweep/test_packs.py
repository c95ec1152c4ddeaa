"""Several runs on one GPU: how many at a time, MPS around them, and numbers that the memory has no room for."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popup_surgery import PopupError
from popup_surgery.sweep import Local, Run, State, Sweep, engines, estimate, execute, gpus
from popup_surgery.sweep.estimate import RunKind

TWO = {"recipe": "digits", "set": {"training.epochs": 1}, "grid": {"surgery.k": [0.3, 0.5]}}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has a GPU; what runs on it sees none, and takes the CPU."""
    for module in (gpus, engines):
        monkeypatch.setattr(module, "gpus", lambda: ["GPU-1"])


def with_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let a measurement, which is real, find that a GPU has room for so many runs."""
    found = estimate.measure
    monkeypatch.setattr(estimate, "measure", lambda *a: [replace(kind, room=room) for kind in found(*a)])


@pytest.mark.slow
def test_runs_share_a_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_room(monkeypatch, 2)
    environments = []
    start = engines.start_run

    def noting(run: Run, output: Path, environment: Mapping[str, str]) -> Any:
        environments.append(environment)
        return start(run, output, environment)

    monkeypatch.setattr(engines, "start_run", noting)
    control = tmp_path / "bin" / "nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text(f'#!/bin/sh\necho "$1$(test "$1" || cat)" >> {tmp_path}/told\n')
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}{os.pathsep}{os.environ['PATH']}")
    sweep = Sweep.parse(TWO)
    assert Local(pack=2).places(sweep.runs) == 2
    outcomes = execute(sweep, tmp_path / "sweep", Local(pack=2))
    assert [outcome.state for outcome in outcomes] == [State.FINISHED] * 2
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["GPU-1", "GPU-1"]
    assert (tmp_path / "told").read_text() == "-d\nquit\n"


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
