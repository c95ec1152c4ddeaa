"""What test files share: one full run of the digits recipe, folders of images, and the command line in-process."""

import os

# One thread a process: where the cores are busy, threads that wait for one another take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import popup_surgery
from popup_surgery import train
from popup_surgery.config.yaml import to_yaml
from popup_surgery.sweep import Run, State

Sizes = tuple[int, int]


class Outcome(NamedTuple):
    """What a call of the command line gave."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> popup_surgery.Result:
    """The shipped digits recipe, trained to its end."""
    return popup_surgery.train("digits", output=tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture
def artifact(digits_run: popup_surgery.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`digits.popup.safetensors` of the full run, alone in a new working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Path(shutil.copy(digits_run.file, work / "digits.popup.safetensors"))


class Here:
    """Runs in this process, one after another: quick, and what every other engine must give."""

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, runs: Sequence[Run], output: Path, stop: Callable[[], bool]) -> Iterator[Any]:
        for run in runs:
            file = output / f"{run.name}.yaml"
            file.write_text(to_yaml(run.recipe.dump()))
            recipe = file.rename(output / "recipe.yaml")
            train(recipe, output=output / run.name)
            recipe.unlink()
            yield run, State.FINISHED, ""


def write_images(
    root: Path, classes: tuple[str, ...] = ("cat", "dog", "eel"), count: int = 5, size: Sizes = (16, 16), seed: int = 0
) -> None:
    """`count` images of noise, in turn PNG and JPEG, in each folder root/<class>; `size` is height and width."""
    generator = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            pixels[:, :, 0] = 60 * place % 256
            Image.fromarray(pixels).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")


def write_digit(path: Path, label: int) -> None:
    """The first of scikit-learn's digits that is a `label` and for validation, as an image file."""
    digits = load_digits()
    place = next(i for i in range(0, len(digits.target), 5) if digits.target[i] == label)
    Image.fromarray((digits.images[place] * 255 / 16).astype(np.uint8)).save(path)


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
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("inspect", file)`: the command line in this process, with what it wrote on stdout and stderr."""
    from popup_surgery.commands import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["popup-surgery", *map(str, arguments)])
        capfd.readouterr()
        status = main()
        return Outcome(status, *capfd.readouterr())

    return call
