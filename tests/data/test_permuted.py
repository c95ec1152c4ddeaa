"""`data.permute_seed`: one permutation of the pixels for every image, the same wherever it is read."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from popup_surgery import Recipe, RecipeError, Result, evaluate, inspect, predict, sanity
from popup_surgery.config.expected import shown
from popup_surgery.config.keys import fingerprint
from popup_surgery.config.schema import Data
from popup_surgery.data.open import open_image
from popup_surgery.data.transforms import pixel_order
from popup_surgery.experiment.evaluate import recorded_data
from support import AUGMENTED, GREY, joined, opened, recipe, short, write_digit, write_images

SIZE = (3, 8, 12)  # not square, so that rows and columns cannot be mixed up


def order(seed: int, height: int, width: int) -> NDArray[Any]:
    """The permutation as section 4 of docs/artifact-format.md has it, by a reader of its own."""
    text = f"{seed}/pixels/{height}x{width}".encode()
    digest = hashlib.blake2b(text, digest_size=16, person=b"popup-surgery/v1").digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(height * width).tolist()
    return np.array(sorted(range(height * width), key=lambda i: (words[i], i)))


def permuted(images: Tensor, seed: int) -> Tensor:
    """Every image with its pixels in the order of `seed`."""
    *_, height, width = images.shape
    return images.flatten(-2)[..., torch.from_numpy(order(seed, height, width))].view(images.shape)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of 8 × 12 pixels, and one that must be resized."""
    root = tmp_path_factory.mktemp("wide")
    for number, split in enumerate(("train", "validation")):
        write_images(root / split, count=4, size=(12, 8), seed=number)
        Image.fromarray(np.random.default_rng(5).integers(0, 256, (23, 31, 3), np.uint8)).save(
            root / split / "eel" / "big.png"
        )
    return root


def test_the_order_is_that_of_the_format() -> None:
    assert pixel_order(0, 2, 3).tolist() == order(0, 2, 3).tolist() == [1, 5, 0, 3, 2, 4]
    for seed, height, width in ((7, 8, 8), (7, 4, 16), (2**64 - 1, 28, 28)):
        found = pixel_order(seed, height, width).tolist()
        assert found == order(seed, height, width).tolist()
        assert sorted(found) == list(range(height * width))
    assert len({tuple(pixel_order(seed, 8, 8).tolist()) for seed in range(50)}) == 50


@pytest.mark.parametrize(
    "data",
    [
        {"in_memory": True},
        {"in_memory": True, "pad": 2, "hflip": 0.5},
        {"in_memory": False, "workers": 2},
        {"in_memory": False, **AUGMENTED, "re_prob": 0.5},  # with random erasing, whose images come as floats
        {"in_memory": None, "crop_pct": 1.0, "same_size": "crop"},
    ],
)
def test_every_image_of_a_folder_is_permuted_after_all_else(data: dict[str, Any], wide: Path) -> None:
    config = {"name": "folder", "root": str(wide), "batch_size": 5, **data}
    plain, task = opened(SIZE, **config), opened(SIZE, permute_seed=3, **config)
    for one, other in ((plain.train(1), task.train(1)), (plain.validation(), task.validation())):
        (before, labels), (after, same) = joined(one), joined(other)
        assert torch.equal(labels, same)
        assert torch.equal(after, permuted(before, 3))
        assert not torch.equal(after, before)


def test_digits_are_permuted() -> None:
    plain, task = opened(GREY, name="digits"), opened(GREY, name="digits", permute_seed=3)
    assert torch.equal(joined(task.train(0))[0], permuted(joined(plain.train(0))[0], 3))
    assert torch.equal(joined(task.validation())[0], permuted(joined(plain.validation())[0], 3))


def test_a_single_image_is_permuted(wide: Path) -> None:
    for file in sorted(wide.glob("validation/*/*")):
        plain, task = (open_image(file, Data(name="folder", permute_seed=seed), SIZE) for seed in (None, 3))
        assert torch.equal(task, permuted(plain, 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Digits under the permutation 3, learned by a network that sees each pixel at its place."""
    network = ["model.name=popup_surgery/fc", "model.kwargs={in_chans: 1, img_size: 8}", "training.epochs=4"]
    return short(tmp_path_factory.mktemp("permuted") / "run", *network, "data.permute_seed=3")


def test_a_file_says_and_evaluates_its_own_permutation(run: Result) -> None:
    assert inspect(run.file).provenance["recipe"]["data"]["permute_seed"] == 3
    assert run.accuracy > 0.7
    assert evaluate(run.file).accuracy == run.accuracy
    for other in ("null", "4"):
        assert evaluate(run.file, data=recorded_data(run.file, [f"data.permute_seed={other}"])).accuracy < 0.4
    first = sanity(run.file).variations[0]
    assert (first.change, first.accuracy) == ("as it is", run.accuracy)


def test_predict_sees_the_permuted_image(run: Result, tmp_path: Path) -> None:
    right = 0
    for label in range(10):
        write_digit(tmp_path / f"{label}.png", label)
        ((first, *_),) = predict(run.file, [tmp_path / f"{label}.png"])
        right += first[0] == str(label)
    assert right >= 7


def test_null_is_the_default_and_changes_no_identity(tmp_path: Path) -> None:
    values = recipe(tmp_path)
    plain, null = Recipe.parse(values), Recipe.parse({**values, "data": {**values["data"], "permute_seed": None}})
    seeds = [Recipe.parse({**values, "data": {**values["data"], "permute_seed": seed}}) for seed in (0, 1)]
    assert fingerprint(plain) == fingerprint(null)
    assert len({fingerprint(each) for each in (plain, *seeds)}) == 3


@pytest.mark.parametrize("value", [-1, 2**64, 1.5, True, "a"])
def test_a_seed_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    values = recipe(tmp_path, permute_seed=value)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    assert str(caught.value).startswith(f"recipe: data.permute_seed is {shown(value)}; expected an integer ")
    assert str(caught.value).endswith("or null")
