"""Data sets that are read in a walk, shards and rows: the same whatever the number of workers and processes."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch import Tensor

from popup_surgery import DataError, PopupError, evaluate, train
from popup_surgery.data.batches import ProcessShard
from popup_surgery.data.transforms import pixel_order
from popup_surgery.errors import Stopped
from popup_surgery.experiment.evaluate import recorded_data
from support import AUGMENTED, PATIENCE, cli_run, joined, lines, opened, recipe, slow_except, started, stopping

CLASSES = ("cat", "dog", "eel")
PLAIN: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0}


def write_shards(folder: Path, images: Path, split: str, sizes: tuple[int, ...]) -> None:
    """The images of a folder in shards of so many, {split}-0.tar, …; the classes take turns."""
    files = sorted((images / split).glob("*/*"), key=lambda path: (path.name, path.parent.name))
    assert len(files) == sum(sizes)
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{split}-{number}.tar")) as shard:
            for file in files[:size]:
                label = CLASSES.index(file.parent.name)
                key = f"{file.parent.name}_{file.stem}"
                shard.write(
                    {"__key__": key, file.suffix[1:]: file.read_bytes(), "cls": label, "json": {"other": label}}
                )
        files = files[size:]


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> dict[str, Any]:
    """15 training images in 4 shards, 6 of validation in 2."""
    write_shards(tmp_path / "shards", images, "train", (6, 4, 3, 2))
    write_shards(tmp_path / "shards", images, "validation", (5, 1))
    root = str(tmp_path / "shards")
    return {"name": "wds/x", "root": root, "train_split": "train-{0..3}.tar", "val_split": "validation-{0..1}.tar"}


@pytest.fixture
def rows(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same images as Hugging Face's library streams a local folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return {
        "name": f"hfids/{images}",
        "root": str(tmp_path / "cache"),
        "train_split": "train",
        "val_split": "validation",
    }


@pytest.fixture(params=["shards", "rows"])
def walked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both kinds in turn."""
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


def ids(images: Tensor) -> list[bytes]:
    return [image.mul(255).round().to(torch.uint8).numpy().tobytes() for image in images]


def known(images: Path, split: str) -> list[bytes]:
    folder: dict[str, Any] = {
        "name": "folder",
        "root": str(images),
        "val_split": split,
        "in_memory": False,
        "batch_size": 4,
    }
    return ids(joined(opened(train=False, **folder, **PLAIN).validation())[0])


# order


@pytest.mark.slow
def test_shards_and_rows_are_permuted(walked: dict[str, Any]) -> None:
    config = {**walked, "batch_size": 4, **PLAIN}
    plain, task = opened(**config), opened(permute_seed=3, **config)
    place = pixel_order(3, 16, 16)
    for one, other in ((plain.train(0), task.train(0)), (plain.validation(), task.validation())):
        before, after = joined(one)[0].flatten(-2), joined(other)[0].flatten(-2)
        assert torch.equal(after, before[..., place])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("shuffled", [5, 4096])
def test_an_epoch_has_each_image_once_in_an_order_of_seed_and_epoch(
    walked: dict[str, Any], images: Path, shuffled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popup_surgery.data.sources.SHUFFLED", shuffled)
    config: dict[str, Any] = {**walked, **PLAIN, "batch_size": 4, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    orders = {
        (seed, epoch): ids(joined(opened(seed=seed, **config).train(epoch))[0]) for seed in (0, 1) for epoch in (0, 1)
    }
    wanted = known(images, "train")
    assert len(set(wanted)) == 15
    for order in orders.values():
        assert sorted(order) == sorted(wanted)
    assert len({tuple(order) for order in orders.values()}) == 4
    again = opened(seed=1, **(config | {"batch_size": 7}))
    joined(again.train(0))
    assert ids(joined(again.train(1))[0]) == orders[1, 1], "neither the batch size nor what came before may matter"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(walked: dict[str, Any], workers: int) -> None:
    config: dict[str, Any] = {**walked, **AUGMENTED, "re_prob": 0.3, "batch_size": 4}
    alone, helped = opened(**config), opened(**config, workers=workers)
    for one, other in ((alone.train(3), helped.train(3)), (alone.validation(), helped.validation())):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(("processes", "accumulate"), slow_except([(2, 1), (3, 2), (5, 1)], [(3, 2)]))
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_each_batch(walked: dict[str, Any], processes: int, accumulate: int, workers: int) -> None:
    config: dict[str, Any] = {**walked, **AUGMENTED, "batch_size": 4}
    whole = list(opened(**config).train(2))
    parts = [ProcessShard(rank, processes, accumulate) for rank in range(processes)]
    pieces = [list(opened(**config, workers=workers).train(2, part)) for part in parts]
    assert {len(found) for found in pieces} == {len(whole) * accumulate}
    for batch, (pixels, labels, _) in enumerate(whole):
        four = [found[batch * accumulate + i] for found in pieces for i in range(accumulate)]
        assert sum(weight for _, _, weight in four) == pytest.approx(1)
        assert torch.equal(torch.cat([piece[0] for piece in four if piece[2]]), pixels)
        assert torch.equal(torch.cat([piece[1] for piece in four if piece[2]]), labels)


def test_an_epoch_goes_on_where_it_was(walked: dict[str, Any]) -> None:
    config: dict[str, Any] = {**walked, **AUGMENTED, "batch_size": 4}
    whole = list(opened(**config).train(2))
    for first in range(5):
        rest = list(opened(**config).train(2, first=first))
        assert len(rest) == 4 - first
        for (pixels, labels, _), (wanted, same, _) in zip(rest, whole[first:], strict=True):
            assert torch.equal(pixels, wanted)
            assert torch.equal(labels, same)


@pytest.mark.slow
@pytest.mark.parametrize("processes", slow_except([1, 2, 4, 7], [1, 4]))
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_counts_each_image_once(walked: dict[str, Any], images: Path, processes: int, workers: int) -> None:
    config: dict[str, Any] = {**walked, **PLAIN, "batch_size": 2, "workers": workers}
    seen, labels = [], []
    for rank in range(processes):
        for pixels, some in opened(**config, train=False).validation(ProcessShard(rank, processes)):
            seen += ids(pixels)
            labels += some.tolist()
    assert sorted(seen) == sorted(known(images, "validation"))
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]


def test_labels_stay_with_their_images(walked: dict[str, Any], images: Path) -> None:
    config: dict[str, Any] = {**walked, **PLAIN, "batch_size": 4, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    pixels, labels = joined(opened(**config).train(0))
    wanted = dict(zip(known(images, "train"), [0] * 5 + [1] * 5 + [2] * 5, strict=True))
    assert [wanted[image] for image in ids(pixels)] == labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_through_a_command_as_from_a_disk(shards: dict[str, Any], workers: int) -> None:
    near = opened(**shards, batch_size=4)
    far = opened(**(shards | {"root": f"pipe:cat {shards['root']}"}), batch_size=4, workers=workers)
    assert torch.equal(joined(near.train(1))[0], joined(far.train(1))[0])
    assert torch.equal(joined(near.validation())[0], joined(far.validation())[0])
    some = far.train(1)
    next(some)
    some.close()
    far.sources["train"].urls[0] += ".gone"
    with pytest.raises(DataError, match=r"^the shard pipe:cat .*train-\d\.tar\.gone of data set .* cannot be read: "):
        list(far.train(1))


# what a data set says of itself


def test_an_info_file_names_splits_and_counts_and_labels(shards: dict[str, Any]) -> None:
    split = {
        "name": "t",
        "num_samples": 15,
        "filenames": [f"train-{i}.tar" for i in range(4)],
        "shard_lengths": [6, 4, 3, 2],
    }
    splits = {"train": split | {"alt_label": "other"}, "validation": split}
    (Path(shards["root"]) / "_info.json").write_text(json.dumps({"splits": splits}))
    named = {**shards, "train_split": "train", "val_split": "validation", "batch_size": 4}
    data = opened(**named)
    assert (data.counts["train"], data.steps()) == (15, 4)
    assert sorted(joined(data.train(0))[1].tolist()) == sorted(joined(data.validation())[1].tolist())
    assert opened(**shards).steps() is None
    assert opened(**(shards | {"train_split": "train-{0..3}.tar|15"}), batch_size=10).steps() == 2


def test_rows_have_class_names_and_a_count(rows: dict[str, Any]) -> None:
    assert opened(**rows, batch_size=4).classes == list(CLASSES)
    opened(**(rows | {"name": rows["name"].replace("hfids", "hfds")}))  # which prepares it
    assert opened(**rows, batch_size=4).steps() == 4


# what is missing or odd


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_missing_or_cut_off_is_named(shards: dict[str, Any], workers: int) -> None:
    shard = Path(shards["root"]) / "train-2.tar"
    data = opened(**shards, batch_size=4, workers=workers, on_error="skip")
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(
        DataError, match=rf"^the shard {shard} of data set wds/x \(train.*\) cannot be read: .*end of data"
    ):
        list(data.train(0))
    shard.unlink()
    with pytest.raises(
        DataError, match=rf"^the shard {shard} of data set wds/x \(train.*\) cannot be read: No such file"
    ):
        list(data.train(0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"jpg": b"no image", "cls": 1}, "it is not an image of a kind that Pillow knows"),
        ({"txt": "no image", "cls": 1}, "it has no image, only cls, txt; data.image_key names the part that is one"),
        ({"png": None}, "it has no cls, only png; data.label_key names the part, or the json's key, of labels"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_or_skipped(
    shards: dict[str, Any], images: Path, workers: int, sample: dict[str, Any], says: str
) -> None:
    if "png" in sample:
        sample = {"png": (images / "train" / "cat" / "0.png").read_bytes()}
    with webdataset.TarWriter(str(Path(shards["root"]) / "train-4.tar")) as shard:
        shard.write({"__key__": "bad", **sample})
    config: dict[str, Any] = {**shards, "train_split": "train-{0..4}.tar", "batch_size": 4, "workers": workers}
    with pytest.raises(
        DataError, match=rf"^bad in {shards['root']}/train-4\.tar cannot be read: {says}; set data\.on_error"
    ):
        list(opened(**config).train(0))
    data = opened(**config, on_error="skip")
    assert sum(len(labels) for _, labels, _ in data.train(0)) == 15
    assert data.skipped == 1


def test_rows_that_cannot_be_read_are_named(rows: dict[str, Any], images: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(images, tmp_path / "copied"))
    data = opened(**(rows | {"name": f"hfids/{copied}"}), batch_size=4)
    (copied / "train" / "dog" / "1.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"copied/train/dog/1\.jpg of data set hfids/.* cannot be read: it is not an image"
    ):
        list(data.train(0))


def test_what_cannot_be_had_is_refused_at_the_start(
    shards: dict[str, Any], rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"data\.in_memory is true; data set wds/x is streamed"):
        opened(**shards, in_memory=True)
    with pytest.raises(PopupError, match="tfds/mnist"):
        opened(name="tfds/mnist", root=str(tmp_path))
    with pytest.raises(DataError, match=r"--data-dir|data\.root"):
        opened(**(shards | {"root": None}))
    with pytest.raises(DataError, match="does not exist"):
        opened(**(shards | {"root": str(tmp_path / "nowhere")}))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"it has the columns text; expected image and label"):
        opened(**(rows | {"name": f"hfids/{tmp_path / 'texts'}"}))
    monkeypatch.setattr("timm.data.readers.reader_wds.wds", None)
    with pytest.raises(
        DataError, match=r": the package webdataset cannot be imported; run pip install 'popup-surgery\[data\]'$"
    ):
        opened(**shards)


# names of images and labels


def keyed(folder: Path, images: Path, **parts: Callable[[Path, int], Any]) -> dict[str, Any]:
    """Shards of 15 training and 6 validation images, whose samples have these parts."""
    folder.mkdir()
    for split in ("train", "validation"):
        with webdataset.TarWriter(str(folder / f"{split}.tar")) as shard:
            for number, file in enumerate(sorted((images / split).glob("*/*"))):
                label = CLASSES.index(file.parent.name)
                values = {name.replace("_", "."): part(file, label) for name, part in parts.items()}
                shard.write({"__key__": f"{number:03}", **values})
    return {"name": "wds/x", "root": str(folder), "train_split": "train.tar", "val_split": "validation.tar"}


def content(file: Path, label: int) -> bytes:
    return file.read_bytes()


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ({"img": content, "cls": lambda file, label: label}, {"image_key": "img"}),
        ({"a_img": content, "b_cls": lambda file, label: label}, {"image_key": "a.img", "label_key": "b.cls"}),
        ({"png": content, "json": lambda file, label: {"label": label, "x": 9}}, {"label_key": "label"}),
        ({"jpg": content, "txt": lambda file, label: str(label), "cls": lambda *_: 0}, {"label_key": "txt"}),
        ({"tif": content, "cls": lambda file, label: label}, {}),
    ],
)
def test_parts_of_samples_are_chosen_by_their_names(
    parts: dict[str, Any], keys: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    data = opened(**keyed(tmp_path / "shards", images, **parts), **keys, **PLAIN, batch_size=4)
    pixels, labels = joined(data.validation())
    assert ids(pixels) == known(images, "validation")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"image_key": "jpeg"}, r"; data\.image_key is 'jpeg'"),
        ({"label_key": "fine"}, r", and in its json label, x; data\.label_key is 'fine'"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_part_that_is_not_there_lists_those_that_are(
    keys: dict[str, Any], says: str, on_error: str, images: Path, tmp_path: Path
) -> None:
    named = keyed(
        tmp_path / "shards", images, png=content, json=lambda file, label: {"label": label, "x": 9}, txt=lambda *_: "t"
    )
    says = "a sample has the parts json, png, txt" + says
    with pytest.raises(DataError, match=rf"^data set wds/x \(train\.tar\) cannot be opened: {says}$"):
        opened(**named, **keys, on_error=on_error)


@pytest.mark.parametrize("label", [-1, 3, 1.5, "cat"])
def test_a_label_that_is_no_output_of_the_network_is_named(label: Any, images: Path, tmp_path: Path) -> None:
    named = keyed(
        tmp_path / "shards", images, png=content, json=lambda file, number: {"y": label if number == 2 else number}
    )
    values = recipe(tmp_path / "shards", **{key: value for key, value in named.items() if key != "root"})
    values["data"]["label_key"] = "y"
    says = rf"^\d+ in .*train\.tar cannot be read: its label is {label!r}; expected a whole number from 0 to 2; "
    with pytest.raises(DataError, match=says):
        train(values, output=tmp_path / "run")


@pytest.fixture(scope="module")
def table(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of Hugging Face's library with the columns img, fine_label and coarse_label, on the disk."""
    import datasets

    folder = tmp_path_factory.mktemp("table")
    names = {"fine_label": list(CLASSES), "coarse_label": ["soft", "wet"]}
    columns: dict[str, Any] = {name: datasets.ClassLabel(names=values) for name, values in names.items()}
    columns |= {"img": datasets.Image(), "title": datasets.Value("string"), "weight": datasets.Value("float32")}
    for split in ("train", "validation"):
        files = sorted((images / split).glob("*/*"))
        labels = [CLASSES.index(file.parent.name) for file in files]
        rows = {
            "img": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "fine_label": labels,
            "coarse_label": [label // 2 for label in labels],
            "title": ["t"] * len(files),
            "weight": [0.5] * len(files),
        }
        datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")
    return folder


def as_rows(library: str, folder: Path, cache: Path) -> dict[str, Any]:
    splits = {"train_split": "train", "val_split": "validation"}
    return {"name": f"{library}/{folder}", "root": str(cache), "batch_size": 4, **splits}


@pytest.mark.parametrize("library", ["hfds", "hfids"])
def test_columns_are_chosen_by_their_names(
    library: str, table: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = as_rows(library, table, tmp_path)
    fine = opened(**named, **PLAIN, image_key="img", label_key="fine_label", in_memory=False)
    assert fine.classes == list(CLASSES)
    pixels, labels = joined(fine.validation())
    assert ids(pixels) == known(images, "validation")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    coarse = opened(**named, image_key="img", label_key="coarse_label", in_memory=False)
    assert coarse.classes == ["soft", "wet"]
    assert joined(coarse.validation())[1].tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("library", ["hfds", "hfids"])
def test_columns_that_are_not_there_list_those_that_are(
    library: str, on_error: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = as_rows(library, table, tmp_path) | {"on_error": on_error}
    columns = "it has the columns img, fine_label, coarse_label, title, weight; expected "
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, columns + "image and label: set data.image_key and data.label_key"),
        ({"image_key": "img"}, columns + "img and label: set"),
        ({"image_key": "image", "label_key": "fine_label"}, columns + "image and fine_label: set"),
        ({"image_key": "img", "label_key": "title"}, "its column title holds string; expected class labels or"),
        ({"image_key": "img", "label_key": "weight"}, "its column weight holds float32; expected class labels or"),
    ]
    for keys, says in cases:
        with pytest.raises(DataError, match=rf"^data set {library}/.* \(train\) cannot be opened: {re.escape(says)}"):
            opened(**named, **keys)


def test_a_number_that_is_no_output_of_the_network_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data set in memory, whose labels are plain numbers."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = next((images / "train" / "cat").iterdir())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "validation"):
        rows = {"image": [{"bytes": file.read_bytes(), "path": None}] * 3, "label": [0, 2, 3]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "table" / f"{split}.parquet")
    values = recipe(tmp_path)
    values["data"] |= as_rows("hfds", tmp_path / "table", tmp_path / "cache")
    says = r"^data set hfds/.* has the label 3; the network has 3 outputs, from 0"
    with pytest.raises(DataError, match=says):
        train(values, output=tmp_path / "run")


@pytest.mark.parametrize("key", ["image_key", "label_key"])
@pytest.mark.parametrize("name", ["folder", "digits", "torch/cifar10"])
def test_data_sets_without_such_names_refuse_them(name: str, key: str, images: Path) -> None:
    config: dict[str, Any] = {"root": None if name == "digits" else str(images), key: "img"}
    with pytest.raises(DataError, match=rf"^data\.{key} is 'img'; data set {name} has no such keys: expected null"):
        opened(size=(1, 8, 8) if name == "digits" else (3, 16, 16), name=name, **config)


# hfds, which is read by number


def test_a_local_folder_as_huggingfaces_library_reads_it(rows: dict[str, Any], images: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(images, tmp_path / "copied"))
    named = rows | {"name": f"hfds/{copied}", "batch_size": 4, "in_memory": False}
    data = opened(**named, **PLAIN)
    assert data.classes == list(CLASSES)
    assert sorted(ids(joined(data.validation())[0])) == sorted(known(images, "validation"))
    (copied / "validation" / "dog" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{copied}/validation/dog/1\.jpg cannot be read: it is not an image"):
        list(data.validation())


# runs


@pytest.fixture
def many(tmp_path: Path, make_images: Callable[..., None]) -> Path:
    """A recipe on shards of 120 images; validation has 7."""
    make_images(tmp_path / "images" / "train", count=40, seed=1)
    make_images(tmp_path / "images" / "validation", count=3, seed=2)
    for path in sorted((tmp_path / "images" / "validation").glob("eel/[12].*")):
        path.unlink()
    write_shards(tmp_path / "shards", tmp_path / "images", "train", (50, 40, 30))
    write_shards(tmp_path / "shards", tmp_path / "images", "validation", (4, 3))
    values = recipe(tmp_path / "shards", workers=2, **AUGMENTED)
    values["data"] |= {"name": "wds/x", "train_split": "train-{0..2}.tar", "val_split": "validation-{0..1}.tar"}
    values["training"] |= {"epochs": 3, "checkpoint_minutes": 0.0001}
    path = tmp_path / "net.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_a_run_on_shards_is_stopped_within_an_epoch_and_ends_in_the_same_file(many: Path, tmp_path: Path) -> None:
    through = train(many, output=tmp_path / "through")
    with pytest.raises(Stopped):
        train(many, output=tmp_path / "run", progress=stopping(after=40))
    done = train(many, output=tmp_path / "run", resume=True)
    assert done.file.read_bytes() == through.file.read_bytes()


@pytest.mark.slow
def test_two_processes_run_on_shards_and_go_on(many: Path, tmp_path: Path) -> None:
    more = ["--num-processes", "2", "--set", "training.epochs=2"]
    process = started(tmp_path / "run", many, *more)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said.count("resume with the same command")) == (75, 1), said
    assert "Traceback" not in said
    files = [tmp_path / name / "net.popup.safetensors" for name in ("through", "run")]
    for file in files:
        words = cli_run(file.parent, many, *more, "--resume")
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    found = evaluate(files[1], data=recorded_data(files[1], ["data.name=wds/x"]), data_dir=tmp_path / "shards")
    assert found.images == 7
    assert found.accuracy == lines(tmp_path / "run")[-1]["accuracy"]
