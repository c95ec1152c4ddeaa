"""Folders and tar files of images: which files are read, and which classes they are of."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from popup_surgery import DataError, evaluate, inspect, load, predict, train
from popup_surgery.config.schema import Data
from popup_surgery.data.folders import recognised
from popup_surgery.data.pixels import SUFFIXES
from popup_surgery.sweep import Sweep
from support import joined, opened, recipe

# timm's reader leaves the closing of tar files to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar'>:ResourceWarning")


def write(file: Path, seed: int = 0, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


def both(root: Path, *files: str) -> None:
    """The same images for training and for validation."""
    for split in ("train", "validation"):
        for seed, file in enumerate(files):
            write(root / split / file, seed, "L" if file.lower().endswith(("pgm", "pbm")) else "RGB")


def tarred(root: Path, *names: str) -> None:
    """Make a tar file of each of the two splits' folders, with the tar file's members below these folders."""
    for split in ("train", "validation"):
        subprocess.run(["tar", "-cf", f"{root / split}.tar", *names], cwd=root / split, check=True)


def counted(root: Path, **config: Any) -> dict[str, int]:
    """How many training images each class has."""
    data = opened(name=config.pop("name", "folder"), root=str(root), batch_size=4, **config)
    labels = joined(data.train(0))[1].tolist()
    assert sorted(joined(data.validation())[1].tolist()) == sorted(labels)
    return {name: labels.count(label) for label, name in enumerate(data.classes)}


TARS: dict[str, Any] = {"train_split": "train.tar", "val_split": "validation.tar"}


# which files are images


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_all_suffixes_are_read(tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture) -> None:
    suffixes = [suffix.upper() if i % 2 else suffix for i, suffix in enumerate(SUFFIXES)]
    both(tmp_path, *(f"{name}/{i}{suffix}" for name in ("cat", "dog") for i, suffix in enumerate(suffixes)))
    assert counted(tmp_path, in_memory=in_memory) == {"cat": len(SUFFIXES), "dog": len(SUFFIXES)}
    tarred(tmp_path, "cat", "dog")
    assert counted(tmp_path, in_memory=in_memory, **TARS) == {"cat": len(SUFFIXES), "dog": len(SUFFIXES)}
    assert not caplog.records


@pytest.mark.parametrize("kind", ["folder", "tar", "torch/folder"])
def test_files_that_are_left_out_are_counted_and_named(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    both(tmp_path, "cat/0.png", "dog/0.png", "dog/1.jpg")
    cat = tmp_path / "train" / "cat"
    for name in ("1.heic", "2.heic", "notes", ".DS_Store", "._0.png"):
        (cat / name).write_bytes(b"x")
    if kind == "torch/folder":
        (cat / "._0.png").unlink()  # which torchvision takes for an image
    tarred(tmp_path, "cat", "dog")
    config = TARS if kind == "tar" else {}
    assert counted(tmp_path, name="folder" if kind == "tar" else kind, **config) == {"cat": 1, "dog": 2}
    (said,) = [record.getMessage() for record in caplog.records]
    hidden = ", .png: 1" if kind != "torch/folder" else ""
    first = "cat/1.heic" if kind == "torch/folder" else r"cat/\._0\.png"
    title = rf"data set {'folder' if kind == 'tar' else kind} \(train{'.tar' if kind == 'tar' else ''}\)"
    where = "train.tar" if kind == "tar" else "train"
    assert re.fullmatch(
        rf"left out {4 if hidden else 3} files of {title} \(.heic: 2, .*no suffix: 1.*\), which are no image by name; "
        rf"the first: {tmp_path}/{where}/{first}",
        said,
    ), said


def test_one_process_of_a_run_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path, "cat/0.png", "dog/0.png")
    (tmp_path / "train" / "cat" / "1.heic").write_bytes(b"x")
    monkeypatch.setenv("RANK", "1")
    opened(name="folder", root=str(tmp_path))
    assert not caplog.records


# which classes they are of


@pytest.mark.parametrize("in_memory", [True, False])
def test_classes_are_the_folders_below_the_split(tmp_path: Path, in_memory: bool) -> None:
    both(tmp_path, "cat/monday/1.png", "dog/tuesday/2.png", "dog/tuesday/late/3.png", "dog/4.png", "eel/monday/5.png")
    assert counted(tmp_path, in_memory=in_memory) == {"cat": 1, "dog": 3, "eel": 1}
    result = train(recipe(tmp_path, in_memory=in_memory), output=tmp_path / "run")
    assert inspect(result.file).provenance["classes"] == ["cat", "dog", "eel"]


@pytest.mark.parametrize("wrap", ["", ".", "train", "a/b"])
def test_classes_of_a_tar_file_are_its_folders(tmp_path: Path, wrap: str) -> None:
    files = ["cat/monday/1.png", "dog/tuesday/2.png", "dog/tuesday/late/3.png", "dog/4.png"]
    both(tmp_path, *(str(Path(wrap, file)) for file in files))
    if wrap == "":
        tarred(tmp_path, "cat", "dog")
    else:
        tarred(tmp_path, "." if wrap == "." else wrap.partition("/")[0])
    assert counted(tmp_path, **TARS) == {"cat": 1, "dog": 3}


def test_tar_files_within_a_tar_file_are_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ImageNet's own."""
    both(tmp_path, "n01/1.png", "n01/2.png", "n02/deep/3.png")
    for split in ("train", "validation"):
        for name in ("n01", "n02"):
            folder = tmp_path / split
            (folder / name / "x.heic").write_bytes(b"x")
            words = ["tar", "-cf", f"{folder / name}.tar", *os.listdir(folder / name)]
            subprocess.run(words, cwd=folder / name, check=True)
    tarred(tmp_path, "n01.tar", "n02.tar")
    assert counted(tmp_path, **TARS) == {"n01": 2, "n02": 1}
    assert caplog.records[0].getMessage().startswith("left out 2 files of data set folder (train.tar) (.heic: 2)")


def test_images_beside_the_classes_are_refused(tmp_path: Path) -> None:
    both(tmp_path, "cat/0.png", "dog/0.png", "lost.png")
    says = r"data set folder \(train.*\) has the image lost\.png outside its classes; expected <class>/<image>"
    with pytest.raises(DataError, match=says):
        opened(name="folder", root=str(tmp_path))
    tarred(tmp_path, ".")
    with pytest.raises(DataError, match=says):
        opened(name="folder", root=str(tmp_path), **TARS)


def test_hidden_folders_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both(tmp_path, "cat/0.png", "dog/0.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png")
    assert counted(tmp_path) == {"cat": 1, "dog": 1}
    assert "left out 2 files" in caplog.text


def test_labels_follow_the_natural_order_as_ever(tmp_path: Path) -> None:
    """Which files and checkpoints of earlier versions have."""
    both(tmp_path, *(f"{i}/0.png" for i in (1, 2, 10, 21, 3)))
    data = opened(name="folder", root=str(tmp_path))
    assert data.classes == ["1", "2", "3", "10", "21"]


def test_a_class_whose_name_is_no_utf_8_is_trained_and_named(
    tmp_path: Path, cli: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    both(tmp_path, f"{odd}/0.png", "dog/0.png", "dog/1.png")
    (tmp_path / "train" / odd / "1.heic").write_bytes(b"x")
    values = recipe(tmp_path)
    values["model"]["kwargs"]["num_classes"] = 2
    result = train(values, output=tmp_path / "run")
    assert inspect(result.file).provenance["classes"] == ["caf\\xe9", "dog"]
    load(result.file)
    assert evaluate(result.file, data_dir=tmp_path).accuracy == result.accuracy
    image = tmp_path / "validation" / odd / "0.png"
    assert {name for name, _ in predict(result.file, [image])[0]} == {"caf\\xe9", "dog"}
    (tmp_path / "net.yaml").write_text(json.dumps(values))
    done = cli("train", tmp_path / "net.yaml", "-o", tmp_path / "again")
    assert done.status == 0, done.err
    assert "caf\\xe9/1.heic" in caplog.text
    (tmp_path / "train" / odd / "0.png").write_bytes(b"")
    done = cli("train", tmp_path / "net.yaml", "-o", tmp_path / "broken")
    assert done.status == 2
    assert "0.png cannot be read: it is not an image" in done.err


# folders in place of torchvision's files


NETWORK = ["training.epochs=1", "model.kwargs.width=0.05", "data.max_train=20", "data.max_validation=10"]


def test_folders_of_images_take_the_place_of_torchvisions_files(
    ten: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    words = [word for setting in [*NETWORK, "data.workers=0"] for word in ("--set", setting)]
    done = cli("train", "cifar10/conv4", "-o", tmp_path / "run", "--data-dir", ten, *words)
    assert (done.status, done.err) == (0, "")
    file = tmp_path / "run" / "conv4.popup.safetensors"
    provenance = inspect(file).provenance
    assert provenance["recipe"]["data"]["name"] == "folder"
    assert provenance["classes"] == list("abcdefghij")
    assert evaluate(file, data_dir=ten).accuracy == provenance["accuracy"]
    again = train("cifar10/conv4", overrides=NETWORK, data_dir=ten, output=tmp_path / "run", resume=True)
    assert again.file == file
    sweep = Sweep.load("cifar10/conv4", NETWORK, data_dir=ten)
    assert [run.recipe.data.name for run in sweep.runs] == ["folder"]


def test_torchvisions_files_come_first(tmp_path: Path) -> None:
    both(tmp_path, "a/0.png")
    config = Data(name="torch/cifar10", root=str(tmp_path))
    assert recognised(config).name == "folder"
    assert recognised(config.model_copy(update={"download": True})).name == "torch/cifar10"
    assert recognised(Data(name="torch/inaturalist", root=str(tmp_path))).name == "torch/inaturalist"
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert recognised(config).name == "torch/cifar10"


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/cifar100", "torch/mnist", "torch/kmnist", "torch/qmnist",
                                  "torch/fashion_mnist"])  # fmt: skip
def test_a_folder_with_neither_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.png")
    with pytest.raises(DataError) as caught:
        opened(name=name, root=str(tmp_path))
    assert str(caught.value) == (
        f"data set {name} (train) cannot be opened: {tmp_path} does not hold torchvision's files; "
        f"--set data.download=true downloads them, and --set data.name=folder reads {tmp_path}/train/<class>/ and "
        f"{tmp_path}/validation/<class>/"
    )
