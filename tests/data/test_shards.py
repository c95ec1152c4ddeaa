"""Data sets that are read in a walk, shards and rows: the same whatever the number of workers and processes."""

import json
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
from popup_surgery.errors import Stopped
from popup_surgery.experiment.evaluate import recorded_data
from support import AUGMENTED, PATIENCE, cli_run, joined, lines, opened, recipe, started, stopping

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


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(walked: dict[str, Any], workers: int) -> None:
    config: dict[str, Any] = {**walked, **AUGMENTED, "re_prob": 0.3, "batch_size": 4}
    alone, helped = opened(**config), opened(**config, workers=workers)
    for one, other in ((alone.train(3), helped.train(3)), (alone.validation(), helped.validation())):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (3, 2), (5, 1)])
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


@pytest.mark.parametrize("processes", [1, 2, 4, 7])
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
        ({"txt": "no image", "cls": 1}, "it has no jpg, jpeg, png or webp"),
        ({"png": None}, "KeyError: 'cls'"),
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
    assert (process.returncode, said.count("goes on with --resume")) == (75, 1), said
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
