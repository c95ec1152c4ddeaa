"""What several test files use: digits and images as files, runs in this process and in others, and what they left."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib import import_module
from inspect import Parameter, Signature, signature
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from popup_surgery import Result, inspect, load, train, verify
from popup_surgery.artifact import Manifest
from popup_surgery.config.schema import Data, Surgery
from popup_surgery.config.yaml import to_yaml
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.errors import Stopped
from popup_surgery.sweep import Run, State
from popup_surgery.sweep.engines import Events, Stop

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"

PATIENCE = 300  # seconds for what another process does, however busy the machine: what hangs takes longer

Sizes = tuple[int, int]
Scope = Literal["layer", "global"]


class Outcome(NamedTuple):
    """What a call of the command line gave."""

    status: int
    out: str
    err: str


def by_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Let the body of a test run in the process of the fixture `kernels`, where the CPU counts as a GPU."""

    @wraps(test)
    def wrapper(*, kernels: Callable[..., None], **arguments: Any) -> None:
        kernels(_in_interpreter, test.__module__, test.__name__, arguments)

    given = signature(test).parameters.values()
    wrapper.__signature__ = Signature([Parameter("kernels", Parameter.POSITIONAL_OR_KEYWORD), *given])  # type: ignore[attr-defined]
    return wrapper


def _in_interpreter(module: str, name: str, arguments: Mapping[str, Any]) -> None:
    from popup_surgery.selection import segments

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "DEVICES", {"cpu"})
        segments.works_on.cache_clear()
        assert segments.works_on(torch.device("cpu"))
        getattr(import_module(module), name).__wrapped__(**arguments)


class Here:
    """Runs in this process, one after another: quick, and what every other engine must give."""

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        for run in runs:
            file = output / f"{run.name}.yaml"
            file.write_text(to_yaml(run.recipe.dump()))
            recipe = file.rename(output / "recipe.yaml")
            train(recipe, output=run.folder(output).path)
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


def slow_except(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases of a parametrised test; all but the quick ones are marked `slow`."""
    values, mark = list(cases), pytest.mark.slow
    assert all(case in values for case in quick), "a quick case is none"
    together = [case if isinstance(case, tuple) else (case,) for case in values]
    return [pytest.param(*case, marks=() if value in quick else mark) for value, case in zip(values, together)]


def asked(request: pytest.FixtureRequest, fixture: str, parameter: str) -> list[str]:
    """The values of a parameter with which the tests of this file that will run use a fixture, each once."""
    tests = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    return list(dict.fromkeys(str(test.callspec.params[parameter]) for test in tests if fixture in test.fixturenames))


TWO_EPOCHS = ["training.epochs=2"]


def short(output: Path, *overrides: str, **arguments: Any) -> Result:
    """Two epochs of digits, in this process."""
    return train("digits", overrides=[*TWO_EPOCHS, *overrides], output=output, **arguments)


def stopped_and_resumed(recipe: str | Path, overrides: list[str], folder: Path) -> tuple[Result, Result]:
    """A run, and the same one stopped after an epoch and resumed; their files are equal."""
    through = train(recipe, overrides=overrides, output=folder / "through")

    def after(epoch: Any) -> None:
        if epoch.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe, overrides=overrides, output=folder / "run", after_epoch=after)
    result = train(recipe, overrides=overrides, output=folder / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()
    return through, result


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    """Two networks have the same tensors under the same names, dtypes included."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def top(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """The right masks, by a stable sort."""
    flat = torch.cat([score.detach().reshape(-1) for score in scores]).abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:kept]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def numpy_state() -> Any:
    """The state of numpy's global generator."""
    return np.random.get_state(legacy=False)["state"]["key"].tolist()


def surgery(run: Run) -> Surgery:
    """The surgery of a run of a hidden network."""
    assert isinstance(run.recipe.surgery, Surgery)
    return run.recipe.surgery


def write_digit(path: Path, label: int) -> None:
    """The first of scikit-learn's digits that is a `label` and for validation, as an image file."""
    digits = load_digits()
    place = next(i for i in range(0, len(digits.target), 5) if digits.target[i] == label)
    Image.fromarray((digits.images[place] * 255 / 16).astype(np.uint8)).save(path)


CPU = torch.device("cpu")


RGB, GREY = (3, 16, 16), (1, 8, 8)


def opened(size: tuple[int, int, int] = RGB, seed: int = 0, train: bool = True, **config: Any) -> Any:
    return open_data(Data(**{"workers": 0, **config}), size, seed, CPU, quiet, train)


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels, *_ = zip(*batches)
    return torch.cat(images), torch.cat(labels)


def recipe(root: Path, **data: Any) -> dict[str, Any]:
    """One epoch of a tiny network on a folder of 16 × 16 images of three classes."""
    return {
        "model": {
            "name": "popup_surgery/fc",
            "kwargs": {"width": 0.05, "in_chans": 3, "img_size": 16, "num_classes": 3},
        },
        "surgery": {"k": 0.5, "scaled": False},
        "data": {"name": "folder", "root": str(root), "batch_size": 4, "workers": 0, **data},
        "training": {"epochs": 1, "lr": 0.1},
    }


AUGMENTED: dict[str, Any] = {
    "scale": [0.3, 1.0],
    "ratio": [0.8, 1.25],
    "hflip": 0.5,
    "auto_augment": "rand-m5-n2",
    "color_jitter": 0.3,
}


def pack(path: Path, folder: Path, classes: tuple[str, ...] = ("cat", "dog", "eel")) -> None:
    with tarfile.open(path, "w") as archive:
        for name in classes:
            for file in sorted((folder / name).iterdir()):
                content = file.read_bytes()
                member = tarfile.TarInfo(f"{name}/{file.name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


TARS: dict[str, Any] = {"name": "folder", "train_split": "train.tar", "val_split": "validation.tar", "batch_size": 4}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cli_run(folder: Path, recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "popup_surgery", "train", str(recipe), "-o", str(folder), *more]


def stopping(after: int) -> Callable[..., Any]:
    """A `Progress` that stops the run after so many steps."""
    steps = count(1)

    def step() -> None:
        if next(steps) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    return lambda total, what: nullcontext(step)


def started(folder: Path, recipe: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process group of its own that has kept a checkpoint since it began."""
    before = set((folder / "checkpoints").glob("*.json"))
    process = subprocess.Popen(
        cli_run(folder, recipe, *more), text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + PATIENCE
    while not set((folder / "checkpoints").glob("*.json")) - before:
        if process.poll() is not None:
            break
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


SHORT = ["training.epochs=3", "training.checkpoint_minutes=0.0001"]


def digits_command(folder: Path, *more: str) -> list[str]:
    sets = [word for setting in SHORT for word in ("--set", setting)]
    return [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(folder), *sets, *more]


def run_digits(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(digits_command(folder, *more), capture_output=True, text=True, timeout=PATIENCE)


def digits_begun(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A run that has kept a checkpoint since it began, or has ended."""
    before = set((folder / "checkpoints").glob("*.json"))
    process = subprocess.Popen(digits_command(folder, *more), text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(process, lambda: set((folder / "checkpoints").glob("*.json")) - before)
    return process


def wait_for(process: subprocess.Popen[str], what: Callable[[], Any]) -> None:
    """Until `what` holds or the process has ended."""
    until = time.monotonic() + PATIENCE
    while not what() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors sorted by name: name, dtype, shape, bytes, as tests/golden/ records it."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def golden_manifest(golden: Mapping[str, Any]) -> Manifest:
    """The manifest of a golden artifact, which gives what a golden JSON says of it."""
    path = GOLDEN / golden["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == golden["file_sha256"]
    assert verify(path)
    assert state_digest(load(path).state_dict()) == golden["state_dict_sha256"]
    manifest = inspect(path)
    assert manifest.masks_sha256 == golden["masks_sha256"]
    return manifest


def check_ensemble(members: Sequence[nn.Module], images: Tensor) -> None:
    """A stack of networks of one kind under vmap: each gives what it gives by itself."""
    parameters, buffers = torch.func.stack_module_state(list(members))

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (images,))

    outputs = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([member(images) for member in members]))


def launch(processes: int, script: str | Path, *arguments: object) -> None:
    """Run a script in several processes of torch.distributed; in one, without it."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *by, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
