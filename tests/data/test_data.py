"""Images into batches: every image once, in an order and with an augmentation that only (seed, epoch, image) decide."""

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from popup_surgery import DataError, PopupError, train
from popup_surgery.data.batches import Batches
from popup_surgery.data.in_memory import InMemory, _crop
from popup_surgery.data.seeding import ambient_seed
from popup_surgery.data.streamed import Streamed
from support import AUGMENTED, GREY, TARS, joined, numpy_state, opened, pack, recipe

# timm's reader leaves the closing of tar files to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar'>:ResourceWarning")


# digits


def test_digits_are_split_into_every_fifth_and_the_rest() -> None:
    data = opened(GREY, name="digits", batch_size=10_000, mean=[0.0], std=[1.0])
    assert isinstance(data, InMemory)
    assert data.classes == [str(i) for i in range(10)]
    images, labels = joined(data.validation())
    bunch = load_digits()
    assert images.shape == (359, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert np.array_equal(labels.numpy(), bunch.target[4::5])
    assert np.allclose(images[:, 0].numpy(), bunch.images[4::5] / 16, atol=0.5 / 255 + 1e-6)
    images, labels = joined(data.train(0))
    assert images.shape == (1438, 1, 8, 8)
    rest = np.delete(bunch.images, np.s_[4::5], axis=0) / 16
    got = np.sort(images.numpy().reshape(1438, -1).round(1), axis=0)
    assert np.allclose(got, np.sort(rest.reshape(1438, -1), axis=0), atol=0.06)


def test_digits_batches_are_normalised_and_of_the_size_asked_for() -> None:
    data = opened(GREY, name="digits", batch_size=100, mean=[0.25], std=[0.5])
    plain = opened(GREY, name="digits", batch_size=100, mean=[0.0], std=[1.0])
    sizes = [len(labels) for _, labels, _ in data.train(3)]
    assert sizes == [100] * 14 + [38]
    assert data.steps() == len(sizes)
    assert [len(labels) for _, labels in data.validation()] == [100] * 3 + [59]
    torch.testing.assert_close(joined(data.train(3))[0], (joined(plain.train(3))[0] - 0.25) / 0.5)


def ids(data: Any, epoch: int) -> list[int]:
    """Which training images an epoch gives, by their pixels."""
    known = {image.numpy().tobytes(): i for i, image in enumerate(data.splits["train"][0])}
    images, _ = joined(data.train(epoch))
    return [known[image.mul(255).round().to(torch.uint8).numpy().tobytes()] for image in images]


def distinct(data: InMemory, count: int = 120) -> InMemory:
    """The data set cut to `count` images, each with its number in the first pixels."""
    images, labels = data.splits["train"]
    images, labels = images[:count].clone(), labels[:count]
    images[:, 0, 0, 0] = torch.arange(count).to(torch.uint8)
    data.splits["train"] = images, labels
    return data


def test_an_epoch_has_each_image_once_in_an_order_of_seed_and_epoch_alone() -> None:
    config: dict[str, Any] = {"name": "digits", "batch_size": 32, "mean": [0.0], "std": [1.0]}
    data = distinct(opened(GREY, seed=7, **config))
    first = ids(data, 0)
    assert sorted(first) == list(range(120))
    assert first != list(range(120))
    second = ids(data, 1)
    assert sorted(second) == list(range(120))
    assert second != first
    torch.manual_seed(99)
    np.random.seed(99)
    again = distinct(opened(GREY, seed=7, **(config | {"batch_size": 17})))
    assert ids(again, 1) == second, "neither what came before nor the batch size may matter"
    assert ids(again, 0) == first
    assert ids(distinct(opened(GREY, seed=8, **config)), 0) != first


def test_labels_stay_with_their_images() -> None:
    data = distinct(opened(GREY, name="digits", batch_size=32, mean=[0.0], std=[1.0]))
    labels = data.splits["train"][1]
    _, got = joined(data.train(5))
    assert got.tolist() == labels[ids(data, 5)].tolist()


# crop and flip


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("shape", [(7, 1, 8, 8), (5, 3, 6, 9)])
def test_crop_and_flip_equal_a_naive_reference(shape: tuple[int, int, int, int], pad: int) -> None:
    generator = np.random.default_rng(pad)
    images = generator.integers(1, 256, shape, dtype=np.uint8)
    shift = generator.integers(0, 2 * pad + 1, (shape[0], 2))
    flip = np.arange(shape[0]) % 2 == 0
    got = _crop(torch.from_numpy(images), pad, torch.from_numpy(shift), torch.from_numpy(flip))
    assert got.dtype == torch.uint8
    assert got.shape == shape
    for i, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        top, left = shift[i]
        wanted = padded[:, top : top + shape[2], left : left + shape[3]]
        wanted = wanted[:, :, ::-1] if flip[i] else wanted
        assert np.array_equal(got[i].numpy(), wanted), i


def test_augmentation_moves_and_flips_as_asked_and_not_in_validation() -> None:
    config: dict[str, Any] = {"name": "digits", "mean": [0.0], "std": [1.0], "batch_size": 50}
    plain, data = opened(GREY, **config), opened(GREY, pad=2, hflip=0.5, **config)
    torch.testing.assert_close(joined(plain.validation())[0], joined(data.validation())[0], rtol=0, atol=0)
    for name in ("train", "validation"):
        assert torch.equal(plain.splits[name][0], data.splits[name][0])
    moved, flipped, places = 0, 0, set()
    for image, other in zip(joined(plain.train(0))[0], joined(data.train(0))[0]):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = {(t, x, f): padded[:, t : t + 8, x : x + 8] for t in range(5) for x in range(5) for f in (0, 1)}
        found = [at for at, window in windows.items() if torch.equal(window.flip(2) if at[2] else window, other)]
        assert found, "each image of the epoch is a window of the image that the unaugmented epoch has there"
        moved += (2, 2) not in {at[:2] for at in found}
        flipped += all(at[2] for at in found)
        places |= {found[0][:2]} if len(found) == 1 else set()
    assert 0.85 < moved / 1438 < 1
    assert 0.40 < flipped / 1438 < 0.60
    assert len(places) == 25


def test_augmentation_does_not_depend_on_the_batch_size_and_does_on_epoch_and_seed() -> None:
    config: dict[str, Any] = {"name": "digits", "pad": 2, "hflip": 0.5, "mean": [0.0], "std": [1.0]}
    first, _ = joined(opened(GREY, seed=3, batch_size=7, **config).train(2))
    second, _ = joined(opened(GREY, seed=3, batch_size=512, **config).train(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, joined(opened(GREY, seed=3, batch_size=7, **config).train(3))[0])
    assert not torch.equal(first, joined(opened(GREY, seed=4, batch_size=7, **config).train(2))[0])


# folders


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_a_folder_in_memory_holds_the_files_pixels(images: Path) -> None:
    data = opened(name="folder", root=str(images), batch_size=4, mean=[0.0] * 3, std=[1.0] * 3)
    assert isinstance(data, InMemory)
    assert data.classes == ["cat", "dog", "eel"]
    files = sorted((images / "validation").glob("*/*"))
    got, labels = joined(data.validation())
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(got.mul(255).round().to(torch.uint8), torch.stack([pixels(file) for file in files]))
    seen, labels = joined(data.train(0))
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    wanted = sorted(pixels(file).numpy().tobytes() for file in (images / "train").glob("*/*"))
    assert sorted(image.mul(255).round().to(torch.uint8).numpy().tobytes() for image in seen) == wanted
    assert data.steps() == 4


def test_streamed_batches_are_the_same_from_0_and_2_workers(images: Path) -> None:
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "batch_size": 4,
        "in_memory": False,
        "re_prob": 0.3,
        **AUGMENTED,
    }
    alone, helped = opened(seed=5, **config), opened(seed=5, **(config | {"workers": 2}))
    assert isinstance(alone, Streamed)
    first, labels = joined(alone.train(1))
    assert first.shape == (15, 3, 16, 16)
    second, other = joined(helped.train(1))
    assert torch.equal(first, second)
    assert torch.equal(labels, other)
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(joined(alone.validation())[0], joined(helped.validation())[0])


def test_streamed_order_and_augmentation_are_functions_of_seed_epoch_and_image(images: Path) -> None:
    config: dict[str, Any] = {"name": "folder", "root": str(images), "in_memory": False, **AUGMENTED}
    data = opened(seed=5, batch_size=4, **config)
    first, labels = joined(data.train(1))
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    again, _ = joined(data.train(1))
    assert torch.equal(first, again)
    other, more = joined(opened(seed=5, batch_size=15, **config).train(1))
    assert torch.equal(first, other), "not of the batch size"
    assert torch.equal(labels, more)
    assert not torch.equal(first, joined(data.train(2))[0])
    assert not torch.equal(first, joined(opened(seed=6, batch_size=4, **config).train(1))[0])


def test_streamed_images_are_augmented_each_in_its_own_way(images: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                shutil.copy(images / "train" / "cat" / "0.png", tmp_path / split / name / f"{i}.png")
    seen, _ = joined(opened(name="folder", root=str(tmp_path), in_memory=False, batch_size=4, **AUGMENTED).train(0))
    assert len({image.numpy().tobytes() for image in seen}) == 12


def test_streamed_epochs_have_each_image_once_in_other_orders(images: Path) -> None:
    data = opened(name="folder", root=str(images), in_memory=False, batch_size=4, scale=[1.0, 1.0], ratio=[1.0, 1.0],
                  mean=[0.0] * 3, std=[1.0] * 3)  # fmt: skip
    orders = []
    for epoch in (0, 1):
        seen, _ = joined(data.train(epoch))
        orders.append([image.mul(255).round().to(torch.uint8).numpy().tobytes() for image in seen])
    wanted = sorted(pixels(file).numpy().tobytes() for file in (images / "train").glob("*/*"))
    assert sorted(orders[0]) == sorted(orders[1]) == wanted
    assert orders[0] != orders[1]


def test_streamed_validation_is_not_augmented_and_each_image_once(images: Path) -> None:
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "batch_size": 4,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    data = opened(in_memory=False, crop_pct=1.0, **AUGMENTED, **config)
    got, labels = joined(data.validation())
    held, same = joined(opened(in_memory=True, **config).validation())
    assert torch.equal(labels, same)
    torch.testing.assert_close(got, held, rtol=0, atol=1e-6)


def test_validation_is_not_augmented_where_both_splits_are_one(images: Path) -> None:
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "train_split": "train",
        "val_split": "train",
        "in_memory": False,
    }
    data = opened(batch_size=4, **config, **AUGMENTED)
    assert torch.equal(joined(data.validation())[0], joined(data.validation())[0])


@pytest.mark.parametrize("key", ["scale", "auto_augment", "re_prob", "color_jitter"])
def test_work_on_single_images_is_streamed_unless_memory_is_asked_for(images: Path, key: str) -> None:
    value: Any = {"scale": [0.5, 1.0], "auto_augment": "rand-m5-n2"}.get(key, 0.5)
    config: dict[str, Any] = {"name": "folder", "root": str(images), "batch_size": 4, key: value}
    assert isinstance(opened(**config), Streamed)
    assert isinstance(opened(name="folder", root=str(images), batch_size=4), InMemory)


@pytest.mark.parametrize("in_memory", [True, False])
def test_iterating_leaves_the_ambient_random_states_alone(images: Path, in_memory: bool) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    augment = {"pad": 2, "hflip": 0.5} if in_memory else AUGMENTED
    data = opened(name="folder", root=str(images), batch_size=4, in_memory=in_memory, **augment)
    before = random.getstate(), numpy_state(), torch.get_rng_state()
    joined(data.train(0))
    joined(data.validation())
    assert random.getstate() == before[0]
    assert numpy_state() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_leave_gpus_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process of one that uses a GPU cannot even ask for its generator's state."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    data = opened(name="folder", root=str(images), batch_size=4, in_memory=False, workers=2, **AUGMENTED)
    assert joined(data.train(0))[0].shape == (15, 3, 16, 16)


def test_ambient_seed_sets_all_three_generators_and_brings_them_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), float(torch.rand(()))

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    outside = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with ambient_seed([5, 6]):
        first = draw()
    with pytest.raises(ZeroDivisionError), ambient_seed([5, 6]):
        first[1 // (draw() != first)]
    assert draw() == outside
    with ambient_seed([5, 7]):
        assert not set(draw()) & set(first)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_other_sizes_are_resized(tmp_path: Path, make_images: Callable[..., None], in_memory: bool) -> None:
    make_images(tmp_path / "train", ("a", "b"), count=2, size=(40, 24))
    make_images(tmp_path / "train2", ("a", "b"), count=2)
    (tmp_path / "train2" / "a").rename(tmp_path / "train" / "c")
    make_images(tmp_path / "validation", ("a", "b", "c"), count=2, size=(9, 30))
    data = opened(name="folder", root=str(tmp_path), batch_size=4, in_memory=in_memory)
    images, labels = joined(data.train(0))
    assert images.shape == (6, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert joined(data.validation())[0].shape == (6, 3, 16, 16)


@pytest.mark.parametrize("in_memory", [True, False])
def test_grey_input_of_coloured_files(images: Path, in_memory: bool) -> None:
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "batch_size": 4,
        "mean": [0.0],
        "std": [1.0],
        "crop_pct": 1.0,
    }
    data = opened((1, 16, 16), in_memory=in_memory, **config)
    got, _ = joined(data.validation())
    first = np.array(Image.open(min((images / "validation").glob("*/*"))).convert("L")) / 255
    assert got.shape == (6, 1, 16, 16)
    assert np.allclose(got[0, 0].numpy(), first, atol=1e-6)


def test_only_the_validation_images_are_opened_when_nothing_is_trained(tmp_path: Path, make_images: Any) -> None:
    make_images(tmp_path / "validation", count=2)
    for in_memory in (True, False):
        data = opened(train=False, name="folder", root=str(tmp_path), batch_size=4, in_memory=in_memory)
        assert joined(data.validation())[0].shape == (6, 3, 16, 16)


# what is missing or odd


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        opened(name="folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"--data-dir|data\.root"):
        opened(name="folder")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_folder_without_a_split(tmp_path: Path, make_images: Callable[..., None], split: str) -> None:
    make_images(tmp_path / split, count=1)
    missing = {"train": "validation", "validation": "train"}[split]
    with pytest.raises(DataError, match=missing):
        opened(name="folder", root=str(tmp_path))
    with pytest.raises(DataError, match=missing):
        opened(name="folder", root=f"{tmp_path}/")


def test_a_split_without_images(tmp_path: Path, make_images: Callable[..., None]) -> None:
    make_images(tmp_path / "train", ("a", "b"), count=1)
    for name in ("a", "b"):
        (tmp_path / "validation" / name).mkdir(parents=True)
    with pytest.raises(DataError):
        opened(name="folder", root=str(tmp_path))


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError):
        opened(name="folder", root=str(tmp_path / "file"))


@pytest.mark.parametrize("classes", [("a", "c"), ("a",), ("a", "b", "c")])
def test_splits_with_other_classes(tmp_path: Path, make_images: Callable[..., None], classes: tuple[str, ...]) -> None:
    make_images(tmp_path / "train", ("a", "b"), count=1)
    make_images(tmp_path / "validation", classes, count=1)
    with pytest.raises(DataError, match=r"different classes.*'[bc]'"):
        opened(name="folder", root=str(tmp_path))


def test_another_number_of_classes_than_outputs(images: Path, tmp_path: Path) -> None:
    values = recipe(images)
    values["model"]["kwargs"]["num_classes"] = 4
    with pytest.raises(DataError, match=r"3 classes.*4"):
        train(values, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_damaged(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name in ("a", "b", "c"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(PopupError):
        train(recipe(tmp_path), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"auto_augment": "nonsense"}, "auto_augment"),
        ({"interpolation": "nonsense"}, "interpolation"),
        ({"mean": [0.5]}, r"data\.mean"),
        ({"std": [0.5]}, r"data\.std"),
        ({"input_size": [3, 16, 12]}, "16 × 12"),
    ],
)
def test_settings_that_the_transforms_or_the_network_refuse(
    images: Path, tmp_path: Path, data: dict[str, Any], says: str
) -> None:
    with pytest.raises(PopupError, match=says) as caught:
        train(recipe(images, in_memory=False, **data), output=tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


def test_a_data_set_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(PopupError, match="cifar11"):
        opened(name="torch/cifar11", root=str(tmp_path))


def test_a_name_that_no_library_has(images: Path) -> None:
    with pytest.raises(PopupError, match="digitz"):
        opened(name="digitz", root=str(images))


def test_a_split_that_digits_does_not_have() -> None:
    with pytest.raises(PopupError, match="test"):
        opened(GREY, name="digits", val_split="test")


@pytest.mark.parametrize("in_memory", [True, False])
def test_some_of_the_images_are_the_same_for_every_seed(images: Path, in_memory: bool) -> None:
    settings: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "batch_size": 4,
        "in_memory": in_memory,
        "workers": 0,
    }
    settings |= {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    whole, few = opened(**settings), opened(**settings, max_train=6, max_validation=4)
    other = opened(**settings, max_train=6, max_validation=4, seed=1)
    held, found, again = ({pixels.numpy().tobytes() for pixels in joined(d.train(0))[0]} for d in (whole, few, other))
    assert len(found) == 6
    assert found == again < held
    assert not torch.equal(joined(few.train(0))[0], joined(other.train(0))[0]), "in another order"
    assert len(joined(few.validation())[1]) == 4
    assert few.steps() == 2
    assert len(joined(opened(size=(1, 8, 8), max_train=100).train(0))[1]) == 100
    assert len(joined(opened(**settings, max_train=10_000).train(0))[1]) == 15


def test_digits_have_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is '.*'; expected null"):
        train("digits", data_dir=tmp_path, output=tmp_path / "run")


def test_digits_for_a_network_of_another_size() -> None:
    with pytest.raises(DataError, match=r"1 × 8 × 8.*3 × 32 × 32"):
        opened((3, 32, 32), name="digits")


def test_training_on_a_folder_of_images_in_memory_and_streamed(images: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {"held": {"pad": 2, "hflip": 0.5}, "streamed": {"scale": [0.5, 1.0]}}
    for name, data in cases.items():
        result = train(recipe(images, **data), output=tmp_path / name)
        assert len(result.history) == 1
        assert result.file.is_file()


# torchvision's sets and tar files


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the format of MNIST's files."""
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A small data set in FashionMNIST's own files."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for name, count in {"train": 30, "t10k": 20}.items():
        arrays[name] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(arrays[name]))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return tmp_path / "data", arrays


def test_fashion_mnist_from_its_own_files(fashion: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, arrays = fashion
    data = opened((1, 28, 28), name="torch/fashion_mnist", root=str(root), batch_size=8, mean=[0.0], std=[1.0])
    assert isinstance(data, InMemory)
    assert len(data.classes) == 10
    images, labels = joined(data.validation())
    assert np.array_equal(images[:, 0].mul(255).round().to(torch.uint8).numpy(), arrays["t10k"])
    assert labels.tolist() == [i % 10 for i in range(20)]
    images, labels = joined(data.train(0))
    order = [int(np.flatnonzero((arrays["train"] == image).all((1, 2)))[0])
             for image in images[:, 0].mul(255).round().to(torch.uint8).numpy()]  # fmt: skip
    assert sorted(order) == list(range(30))
    assert labels.tolist() == [i % 10 for i in order]


def test_the_fashion_mnist_recipe_runs_on_them(fashion: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    overrides = ["training.epochs=1", "model.kwargs.width=0.1", "data.workers=0"]
    result = train("fashion_mnist/conv4", overrides=overrides, data_dir=fashion[0], output=tmp_path / "run")
    assert result.file.name == "conv4.popup.safetensors"


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/fashion_mnist"])
def test_a_torchvision_set_that_is_not_there_says_how_to_fetch_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"data\.download=true"):
        opened((3, 32, 32), name=name, root=str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        opened((3, 32, 32), name=name, root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"--data-dir|data\.root"):
        opened((3, 32, 32), name=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_tar_files_give_what_the_folders_give(images: Path, tmp_path: Path, in_memory: bool, workers: int) -> None:
    for split in ("train", "validation"):
        pack(tmp_path / f"{split}.tar", images / split)
    tar = opened(root=str(tmp_path), in_memory=in_memory, workers=workers, **TARS)
    folder = opened(name="folder", root=str(images), batch_size=4, in_memory=in_memory)
    for one, other in ((tar.validation(), folder.validation()), (tar.train(0), folder.train(0))):
        for got, wanted in zip(joined(one), joined(other), strict=True):
            assert torch.equal(got, wanted)
    assert tar.classes == ["cat", "dog", "eel"]


def test_tar_files_with_other_classes(images: Path, tmp_path: Path) -> None:
    pack(tmp_path / "train.tar", images / "train")
    pack(tmp_path / "validation.tar", images / "validation", ("cat", "dog"))
    with pytest.raises(DataError, match=r"different classes.*'eel'"):
        opened(root=str(tmp_path), **TARS)


def test_tar_files_with_more_classes_than_outputs(images: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        pack(tmp_path / f"{split}.tar", images / split)
    values = recipe(tmp_path, **TARS)
    values["model"]["kwargs"]["num_classes"] = 2
    with pytest.raises(DataError, match=r"3 classes.*2"):
        train(values, output=tmp_path / "run")


def test_both_kinds_of_data_keep_the_protocol(images: Path) -> None:
    for in_memory in (True, False):
        data: Batches = opened(name="folder", root=str(images), batch_size=4, in_memory=in_memory)
        assert data.steps() == len(list(data.train(0))) == 4
