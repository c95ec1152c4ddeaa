"""The number of threads of a run: a function of the recipe alone, recorded, and the same on resume."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from popup_surgery import inspect, train
from popup_surgery.errors import Stopped
from popup_surgery.sweep import Sweep, execute
from popup_surgery.sweep.engines import Local
from popup_surgery.training.metrics import Epoch
from support import GOLDEN, PATIENCE, slow_except, stopping

SMALL = ["training.epochs=1", "data.max_train=32", "data.max_validation=20", "data.batch_size=16"]


def small(output: Path, *more: str, **arguments: Any) -> Any:
    return train("digits", overrides=[*SMALL, *more], output=output, **arguments)


@pytest.mark.parametrize(("before", "threads"), slow_except([(1, 2), (2, 1), (3, 3)], [(2, 1)]))
def test_a_run_has_the_threads_of_its_recipe_and_gives_the_process_its_own_back(
    before: int, threads: int, tmp_path: Path
) -> None:
    found: list[int] = []

    def note(epoch: Epoch) -> None:
        found.append(torch.get_num_threads())

    own = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        result = small(tmp_path / "run", f"training.threads={threads}", after_epoch=note)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(own)
    assert found == [threads]
    provenance = inspect(result.file).provenance
    assert provenance["threads"] == provenance["recipe"]["training"]["threads"] == threads


@pytest.mark.parametrize("variable", slow_except(["1", "2", None], []))
def test_the_environment_does_not_change_a_run_and_a_line_says_so(variable: str | None, tmp_path: Path) -> None:
    here = small(tmp_path / "here")
    words = [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(tmp_path / "there")]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {} if variable is None else {"OMP_NUM_THREADS": variable}
    done = subprocess.run(
        [*words, *(word for setting in SMALL for word in ("--set", setting))],
        capture_output=True, text=True, timeout=PATIENCE, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / here.file.name).read_bytes() == here.file.read_bytes()
    if variable == "2":
        assert done.stderr == (
            "OMP_NUM_THREADS is 2, which does not count: the result depends on the number of threads, so the recipe "
            "sets it; training.threads is 1\n"
        )
    else:
        assert done.stderr == ""


def test_a_run_resumes_with_the_threads_that_it_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    through = small(tmp_path / "through", "training.threads=2", "training.epochs=2")
    with pytest.raises(Stopped):
        small(tmp_path / "run", "training.threads=2", "training.epochs=2", progress=stopping(1))
    found: list[int] = []
    again = small(
        tmp_path / "run", "training.threads=1", "training.epochs=2", resume=True,
        after_epoch=lambda epoch: found.append(torch.get_num_threads()),
    )  # fmt: skip
    assert found == [2, 2]
    said = "began with 2 threads and resumes with as many, on which its result depends; training.threads=1"
    assert said in caplog.text
    assert inspect(again.file).provenance["threads"] == 2
    assert digest(again.file) == digest(through.file)


def digest(file: Path) -> str:
    return inspect(file).masks_sha256


@pytest.mark.slow
def test_a_checkpoint_of_version_0_1_0_resumes_with_the_threads_of_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(GOLDEN / "stopped" / "tiny", tmp_path / "run"))
    found: list[int] = []
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(
            GOLDEN / "tiny.yaml", output=run, resume=True,
            after_epoch=lambda epoch: found.append(torch.get_num_threads()),
        )  # fmt: skip
    finally:
        torch.set_num_threads(own)
    assert set(found) == {2}
    assert "does not say how many threads the run had; it resumes with this process's 2, on which" in caplog.text


def test_threads_do_not_change_which_runs_are_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    first = small(tmp_path / "run")
    assert small(tmp_path / "run", "training.threads=2", resume=True).file == first.file
    one, two = (Sweep.parse({"recipe": "digits", "set": {"training.threads": n}}) for n in (1, 2))
    assert [run.name for run in one.runs] == [run.name for run in two.runs]


def test_a_sweep_gives_each_run_the_threads_of_its_recipe_or_of_the_engine() -> None:
    sweep = Sweep.parse({"recipe": "digits", "set": {"training.threads": 2}})
    (run,) = sweep.runs
    assert run.with_threads(None) is run
    assert (run.with_threads(3).recipe.training.threads, run.with_threads(3).name) == (3, run.name)
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available():
        assert Local().places(sweep.runs) == max(1, cores // 2)
        assert Local(threads=1).places(sweep.runs) == cores


@pytest.mark.slow
@pytest.mark.parametrize("threads", [None, 3])
def test_a_sweep_runs_with_these_threads(threads: int | None, tmp_path: Path) -> None:
    settings = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in SMALL)}
    sweep = Sweep.parse({"recipe": "digits", "set": settings | {"training.threads": 2}})
    (outcome,) = execute(sweep, tmp_path, Local(jobs=1, threads=threads))
    assert inspect(outcome.run.folder(tmp_path).final).provenance["threads"] == (threads or 2)
    assert "OMP_NUM_THREADS" not in (outcome.run.folder(tmp_path).path / "log.txt").read_text()
