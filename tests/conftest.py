"""Fixtures: one full run of the digits recipe, folders of images, and the command line in-process."""

import os

# One thread a process: where the cores are busy, threads that wait for one another take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Unpack

import hypothesis
import pytest
import torch
from torch import Tensor

import popup_surgery
from hub_server import Hub
from popup_surgery.selection import Limits, Selection
from popup_surgery.signals import SIGNALS
from support import Outcome, short, write_images

# no timed assertions: how long an example takes says how busy the machine is
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from the default generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> popup_surgery.Result:
    """The shipped digits recipe, a quarter of its epochs."""
    return popup_surgery.train(
        "digits", overrides=["training.epochs=10"], output=tmp_path_factory.mktemp("digits") / "run"
    )


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> popup_surgery.Result:
    """Two epochs of digits."""
    return short(tmp_path_factory.mktemp("first") / "run")


@pytest.fixture
def artifact(digits_run: popup_surgery.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`digits.popup.safetensors` of the full run, alone in a new working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Path(shutil.copy(digits_run.file, work / "digits.popup.safetensors"))


@pytest.fixture
def make_images() -> Callable[..., None]:
    """`write_images`."""
    return write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/<class>/ (15 images) and validation/<class>/ (6) of three classes, 16 × 16 pixels."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", count=5, seed=1)
    write_images(root / "validation", count=2, seed=2)
    return root


@pytest.fixture(scope="session")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of ten classes, 32 × 32 pixels: 40 images for training and 20 for validation."""
    root = tmp_path_factory.mktemp("ten")
    write_images(root / "train", tuple("abcdefghij"), count=4, size=(32, 32), seed=1)
    write_images(root / "validation", tuple("abcdefghij"), count=2, size=(32, 32), seed=2)
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub of this test alone, in a process of its own."""
    with Hub() as running:
        yield running


@pytest.fixture
def rankings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The counts of each call of `select` by the learner edge_popup."""
    from popup_surgery.learners import edge_popup

    calls: list[int] = []
    real = edge_popup.select

    def spy(scores: Sequence[Tensor], kept: int, **limits: Unpack[Limits]) -> Selection:
        calls.append(kept)
        return real(scores, kept, **limits)

    monkeypatch.setattr(edge_popup, "select", spy)
    return calls


@pytest.fixture(scope="session")
def kernels() -> Iterator[Callable[..., Any]]:
    """Calls functions in a process where Triton's interpreter runs the GPU's kernels, on the CPU, from the start."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch where there may be a GPU")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture
def one_sample() -> Iterator[None]:
    """What a learner must keep to it keeps for each sample, so that those that sample show one here."""
    with popup_surgery.sampled(0):
        yield


@pytest.fixture
def no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """The package logs errors only."""
    caplog.set_level(logging.ERROR, "popup_surgery")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("inspect", file)`: the command line in this process, with what it wrote on stdout and stderr."""
    from popup_surgery.commands import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["popup-surgery", *map(str, arguments)])
        capfd.readouterr()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        status = main()
        for number, handler in before.items():  # a command that was stopped leaves them without effect
            signal.signal(number, handler)
        return Outcome(status, *capfd.readouterr())

    return call
