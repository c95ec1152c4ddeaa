"""ImageNet's path for real: 1,000 classes of JPEGs, two processes with workers, a stop within an epoch."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from popup_surgery import evaluate, inspect
from popup_surgery.config import Recipe
from popup_surgery.data.batches import ProcessShard, quiet
from popup_surgery.data.open import open_data
from popup_surgery.data.streamed import Streamed
from support import PATIENCE, cli_run, lines, started

CLASSES, VALIDATION = 1000, 1003  # which neither the batch nor the processes divide
OVERRIDES = [
    "model.name=timm/resnet10t", "data.input_size=[3,32,32]", "data.workers=2", "training.epochs=2",
    "training.warmup_epochs=1", "training.checkpoint_minutes=0.0001", "training.precision=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,validation}/<class>/<image>: mixed sizes, and here and there greyscale or CMYK, as in ImageNet."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for split, count in (("train", CLASSES), ("validation", VALIDATION)):
        for i in range(count):
            folder = root / split / f"n{i % CLASSES:08}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = generator.integers(20, 90, 2)
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mode = {0: "L", 1: "CMYK"}.get(i % 50, "RGB")
            Image.fromarray(pixels).convert(mode).save(folder / f"{split}_{i:08}.JPEG")
    return root


@pytest.mark.slow
def test_two_processes_stop_within_an_epoch_and_end_in_the_same_file(imagenet: Path, tmp_path: Path) -> None:
    words = ["--data-dir", str(imagenet), "--num-processes", "2"]
    words += [word for setting in OVERRIDES for word in ("--set", setting)]
    recipe = Path("imagenet/resnet50")
    process = started(tmp_path / "stopped", recipe, *words)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said.count("in epoch 1; resume with the same command and --resume")) == (75, 1), said
    words += ["--set", "training.checkpoint_minutes=10"]  # one of these is 40 MB
    for name in ("through", "stopped"):
        done = subprocess.run(cli_run(tmp_path / name, recipe, *words, "--resume"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "resnet50.popup.safetensors" for name in ("through", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    manifest = inspect(files[0])
    assert manifest.provenance["classes"] == [f"n{i:08}" for i in range(CLASSES)]
    last = lines(tmp_path / "through")[-1]
    assert (last["epoch"], last["skipped"]) == (2, 0)
    found = evaluate(files[0], data_dir=imagenet)
    assert (found.images, found.accuracy) == (VALIDATION, last["accuracy"])


@pytest.mark.slow
def test_two_processes_see_each_image_once(imagenet: Path) -> None:
    config = Recipe.load("imagenet/resnet50", [f"data.root={imagenet}", *OVERRIDES]).data
    data = open_data(config, (3, 32, 32), 0, torch.device("cpu"), quiet)
    assert isinstance(data, Streamed)
    seen = [
        label for rank in (0, 1) for _, labels in data.validation(ProcessShard(rank, 2)) for label in labels.tolist()
    ]
    assert sorted(seen) == sorted(i % CLASSES for i in range(VALIDATION))
    parts = [list(data.train(1, ProcessShard(rank, 2))) for rank in (0, 1)]
    assert [len(labels) for part in parts for _, labels, _ in part] == [128, 128, 128, 116] * 2
    assert sorted(label for part in parts for _, labels, _ in part for label in labels.tolist()) == list(range(CLASSES))
    images = torch.cat([images for part in parts for images, _, _ in part])
    assert images.shape == (CLASSES, 3, 32, 32)
    assert images.isfinite().all()
