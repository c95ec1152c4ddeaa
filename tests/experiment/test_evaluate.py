"""A file's images are prepared in one way wherever they are read, and their labels are the classes it was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from popup_surgery import DataError, RunError, evaluate, inspect, load, predict, sanity, save, train
from popup_surgery.artifact import Artifact
from popup_surgery.data.batches import quiet
from popup_surgery.experiment.evaluate import recorded_data
from popup_surgery.experiment.setup import open_for
from popup_surgery.masking.convert import convert
from popup_surgery.models.build import build
from support import joined, recipe, stopping, write_images

PLAIN: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 16 × 16 pixels and of other sizes, of three classes that a network can tell apart."""
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 12), ("validation", 6)):
        for place, name in enumerate(("cat", "dog", "zebra")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (16, 16) if i % 2 else (23, 31)
                pixels = np.random.default_rng(i).integers(0, 120, (*size, 3), dtype=np.uint8)
                pixels[..., place] += 130
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def file(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows them."""
    values = recipe(three)
    values["model"]["kwargs"]["width"] = 0.5
    values["training"] |= {"epochs": 8}
    result = train(values, output=tmp_path_factory.mktemp("run") / "run")
    assert result.accuracy == 1
    return result.file


def again(file: Path, path: Path, **data: Any) -> Path:
    """The same file with another data section in its provenance; `same_size=None` leaves the key out."""
    provenance = inspect(file).provenance
    section = provenance["recipe"]["data"] | data
    provenance["recipe"]["data"] = {key: value for key, value in section.items() if (key, value) != ("same_size", None)}
    net = convert(build("popup_surgery/fc", **provenance["recipe"]["model"]["kwargs"]), 0.5, seed=3)
    save(net, path, provenance=provenance)
    return path


def seen(file: Path, root: Path, *overrides: str) -> torch.Tensor:
    """The validation images as `evaluate` gives them to the network."""
    data = recorded_data(file, overrides).model_copy(update={"root": str(root), "workers": 0})
    return joined(open_for(load(file), data, quiet, False, []).validation())[0]


# one preparation


@pytest.mark.parametrize("same_size", ["keep", "crop"])
def test_the_network_sees_the_same_images_whatever_the_path(
    same_size: str, file: Path, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = again(file, tmp_path / "ours", same_size=same_size)
    streamed, held = seen(ours, three, "data.in_memory=false"), seen(ours, three, "data.in_memory=true")
    erased = seen(ours, three, "data.in_memory=false", "data.re_prob=0.3")
    assert torch.equal(streamed, held)
    assert torch.equal(streamed, erased)
    batches: list[torch.Tensor] = []
    monkeypatch.setattr("popup_surgery.models.paper_nets.FC.forward", lambda net, x: batches.append(x) or x[:, :, 0, 0], raising=False)  # noqa: E501
    predict(ours, sorted((three / "validation").glob("*/*.png"), key=lambda path: (path.parent.name, int(path.stem))))
    assert torch.equal(batches[-1], streamed)


