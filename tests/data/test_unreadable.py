"""Images that are missing or damaged, and worker processes that die: named, or left out and counted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from popup_surgery import DataError, RunError, evaluate, train
from popup_surgery.data.batches import ProcessShard
from popup_surgery.data.sources import Numbered
from popup_surgery.data.workers import worker_deaths
from popup_surgery.errors import Stopped
from popup_surgery.experiment.evaluate import recorded_data
from support import (
    AUGMENTED,
    PATIENCE,
    TARS,
    TESTS,
    cli_run,
    joined,
    lines,
    opened,
    pack,
    recipe,
    started,
    stopping,
)

# timm's reader leaves the closing of tar files to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar'>:ResourceWarning")


def flip_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60:] = bytes(byte ^ 0x55 for byte in data[60:])
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "flipped": flip_bytes,
}


@pytest.fixture
def copied(images: Path, tmp_path: Path) -> Path:
    """Our own copy of the folder of images."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def drain(data: Any, split: str, **how: Any) -> list[Any]:
    return list(data.train(0, **how) if split == "train" else data.validation(**how))


# stop


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_image_that_cannot_be_read_is_named(copied: Path, split: str, in_memory: bool, workers: int) -> None:
    file = copied / split / "dog" / "1.jpg"
    file.write_text("no image")
    with pytest.raises(DataError) as caught:  # noqa: PT012
        data = opened(name="folder", root=str(copied), batch_size=4, in_memory=in_memory, workers=workers)
        drain(data, split)
    assert str(caught.value) == (
        f"{file} cannot be read: it is not an image of a kind that Pillow knows; set data.on_error to "
        "skip to leave such images out"
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["dog/0.png", "eel/1.jpg"])
def test_no_damage_gives_another_image(copied: Path, name: str, damage: str) -> None:
    data = opened(name="folder", root=str(copied), batch_size=4, in_memory=False)
    DAMAGES[damage](copied / "train" / name)
    with pytest.raises(DataError, match=rf"^{copied}/train/{name} cannot be read: \S.*; set data\.on_error to skip"):
        drain(data, "train")


def test_torchvisions_files_are_named_too(copied: Path) -> None:
    (copied / "train" / "cat" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{copied}/train/cat/2\.png cannot be read"):
        opened(name="torch/folder", root=str(copied), batch_size=4)


def test_an_image_without_a_file_is_named_by_its_number() -> None:
    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise KeyError("pixels")

    assert Numbered(Broken(), "data set x (train)").name(2) == "image 2 of data set x (train)"


def test_images_in_tar_files_are_named(copied: Path, tmp_path: Path) -> None:
    (copied / "train" / "dog" / "0.png").write_bytes(b"")
    for split in ("train", "validation"):
        pack(tmp_path / f"{split}.tar", copied / split)
    with pytest.raises(DataError, match=r"^dog/0\.png of data set folder \(train\.tar\) cannot be read"):
        opened(root=str(tmp_path), **TARS)


def test_the_command_line_says_it_in_one_sentence(cli: Any, copied: Path, tmp_path: Path) -> None:
    (copied / "train" / "dog" / "3.jpg").unlink()
    (copied / "train" / "dog" / "3.jpg").mkdir()  # timm lists files alone, so it is missing from the start
    (copied / "train" / "dog" / "4.png").write_bytes(b"")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(copied, in_memory=False)))
    outcome = cli("train", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    assert outcome.status == 2
    assert re.fullmatch(rf"error: {copied}/train/dog/4\.png cannot be read: .*\n", outcome.err)


# skip


def damaged(root: Path, *names: str) -> list[str]:
    for name in names:
        (root / name).write_bytes(b"")
    return [str(root / name) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_contribute_nothing_and_the_others_stay_as_they_are(copied: Path, workers: int) -> None:
    config: dict[str, Any] = {"name": "folder", "root": str(copied), "batch_size": 4, "in_memory": False, **AUGMENTED}
    whole = drain(opened(**config), "train")
    bad = damaged(copied, "train/cat/1.jpg", "train/dog/0.png", "train/dog/2.png")
    data = opened(workers=workers, on_error="skip", **config)
    order = [copied / "train" / name for name, _ in data.sources["train"].dataset.reader.samples]
    order = [str(order[index]) for index, _ in data.sources["train"].keys([0, 0])]
    seen = drain(data, "train")
    assert len(seen) == len(whole) == 4
    for start, (images, labels, weight), (all_images, all_labels, all_weight) in zip((0, 4, 8, 12), seen, whole):
        kept = [i for i, file in enumerate(order[start : start + 4]) if file not in bad]
        assert torch.equal(images, all_images[kept])
        assert torch.equal(labels, all_labels[kept])
        assert weight == len(kept) / len(all_labels)
        assert all_weight == 1
    assert data.skipped == 3
    first = min(bad, key=order.index)
    assert data.left_out == f"{first} cannot be read: it is not an image of a kind that Pillow knows"


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_pieces_share_what_remains_of_a_batch(copied: Path, workers: int) -> None:
    damaged(copied, "train/cat/1.jpg", "train/dog/0.png", "train/eel/0.png", "train/eel/1.jpg", "train/eel/2.png")
    config: dict[str, Any] = {"name": "folder", "root": str(copied), "batch_size": 6, "in_memory": False, **AUGMENTED}
    alone = opened(on_error="skip", workers=workers, **config)
    whole = drain(alone, "train")
    parts = [opened(on_error="skip", workers=workers, **config) for _ in range(2)]
    pieces = [drain(data, "train", part=ProcessShard(rank, 2, 2)) for rank, data in enumerate(parts)]
    assert [len(found) for found in pieces] == [6, 6]
    empty = 0
    for batch, (images, labels, weight) in enumerate(whole):
        four = [pieces[rank][2 * batch + i] for rank in (0, 1) for i in (0, 1)]
        empty += sum(share == 0 for _, _, share in four)
        real = [piece for piece in four if piece[2]]
        assert torch.equal(torch.cat([piece[0] for piece in real]), images)
        assert torch.equal(torch.cat([piece[1] for piece in real]), labels)
        assert sum(share for _, _, share in four) == pytest.approx(weight)
        for dummy, label, share in four:
            if not share:
                assert dummy.shape == (1, 3, 16, 16)
                assert label.shape == (1,)
    assert empty > 0, "a piece without images is among them"
    assert alone.skipped == sum(data.skipped for data in parts) == 5


def test_a_batch_of_which_nothing_remains_is_one_image_without_weight(copied: Path) -> None:
    data = opened(name="folder", root=str(copied), batch_size=2, in_memory=False, on_error="skip")
    samples = data.sources["train"].dataset.reader.samples
    for index, _ in list(data.sources["train"].keys([0, 0]))[2:4]:
        Path(samples[index][0]).unlink()
    images, labels, weight = drain(data, "train")[1]
    assert torch.equal(images, torch.zeros(1, 3, 16, 16))
    assert (labels.tolist(), weight) == ([0], 0.0)
    assert data.skipped == 2


def test_an_image_that_only_fills_a_piece_is_counted_once(copied: Path) -> None:
    """A batch of one image for two processes: the second repeats it with the share 0."""
    for path in sorted((copied / "train").glob("*/*"))[1:]:
        if path.name not in ("0.png", "1.jpg"):
            path.unlink()
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(copied),
        "batch_size": 5,
        "in_memory": False,
        "on_error": "skip",
    }
    both = [opened(**config) for _ in range(2)]
    samples = both[0].sources["train"].dataset.reader.samples
    assert len(samples) == 6
    last, _ = list(both[0].sources["train"].keys([0, 0]))[-1]
    Path(samples[last][0]).unlink()
    pieces = [drain(data, "train", part=ProcessShard(rank, 2)) for rank, data in enumerate(both)]
    assert [found[-1][2] for found in pieces] == [0, 0]
    assert sum(data.skipped for data in both) == 1


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_counts_what_can_be_read(copied: Path, in_memory: bool, workers: int) -> None:
    config: dict[str, Any] = {
        "name": "folder",
        "root": str(copied),
        "batch_size": 2,
        "in_memory": in_memory,
        "workers": workers,
    }
    images, labels = joined(opened(**config).validation())
    damaged(copied, "validation/dog/0.png", "validation/dog/1.jpg", "validation/eel/1.jpg")
    data = opened(on_error="skip", **config)
    got, same = joined(data.validation())
    assert torch.equal(got, images[[0, 1, 4]])
    assert torch.equal(same, labels[[0, 1, 4]])
    assert data.skipped == 3
    assert data.left_out.startswith(f"{copied}/validation/dog/0.png cannot be read")
    shares = [joined(opened(on_error="skip", **config).validation(ProcessShard(rank, 2)))[1] for rank in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == sorted(same.tolist())


def test_images_in_memory_are_counted_in_each_epoch_by_the_first_process(copied: Path) -> None:
    damaged(copied, "train/dog/0.png", "train/dog/1.jpg")
    data = opened(name="folder", root=str(copied), batch_size=4, on_error="skip")
    assert sum(len(labels) for _, labels, _ in drain(data, "train")) == 13
    assert data.skipped == 2
    data.skipped = 0
    drain(data, "train", first=2)
    assert data.skipped == 0, "an epoch that is gone on with has them in its checkpoint"
    drain(data, "train", part=ProcessShard(1, 2))
    assert data.skipped == 0


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_which_nothing_can_be_read(copied: Path, tmp_path: Path, split: str, in_memory: bool) -> None:
    for path in (copied / split).glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises((DataError, RunError), match=rf"none of the .*\b{split}(ing)? images\b.* can be read"):
        train(recipe(copied, in_memory=in_memory, on_error="skip"), output=tmp_path / "run")


# runs


@pytest.mark.parametrize("in_memory", [True, False])
def test_metrics_count_what_was_skipped_and_one_warning_names_it(
    copied: Path, tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    damaged(copied, "train/dog/0.png", "validation/eel/1.jpg", "validation/cat/0.png")
    values = recipe(copied, in_memory=in_memory, on_error="skip") | {"training": {"epochs": 3, "lr": 0.1}}
    result = train(values, output=tmp_path / "run")
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [3, 3, 3]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "popup_surgery"]
    assert said.startswith(f"left out 3 images that could not be read; the first: {copied}/train/dog/0.png cannot be")
    caplog.clear()
    found = evaluate(result.file, data_dir=copied)
    assert found.images == 4
    assert found.accuracy == result.accuracy
    (said,) = [record.getMessage() for record in caplog.records if record.name == "popup_surgery"]
    assert f"left out 2 images that could not be read; the first: {copied}/validation/cat/0.png" in said


def test_nothing_is_said_where_nothing_is_skipped(cli: Any, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(copied, in_memory=False, on_error="skip")))
    outcome = cli("train", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    assert "skipped" not in outcome.out + outcome.err
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [0]
    damaged(copied, "train/dog/0.png")
    outcome = cli("train", tmp_path / "recipe.yaml", "-o", tmp_path / "again")
    assert re.search(r"left  1 skipped$", outcome.out, re.MULTILINE)


@pytest.fixture
def many(tmp_path: Path, make_images: Callable[..., None]) -> Path:
    """A recipe of a streamed run of some seconds; its images are in images/ beside it."""
    make_images(tmp_path / "images" / "train", count=40, seed=1)
    make_images(tmp_path / "images" / "validation", count=3, seed=2)
    values = recipe(tmp_path / "images", in_memory=False, workers=2, **AUGMENTED)
    values["training"] |= {"epochs": 3, "checkpoint_minutes": 0.0001}
    path = tmp_path / "net.yaml"
    path.write_text(json.dumps(values))
    return path


def artifact(folder: Path) -> bytes:
    return (folder / "net.popup.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_add_up_what_they_skip_and_one_speaks(many: Path, tmp_path: Path) -> None:
    bad = damaged(tmp_path / "images", "train/cat/0.png", "train/eel/7.jpg", "train/dog/3.jpg", "validation/dog/1.jpg")
    sets = ["--set", "data.on_error=skip", "--set", "training.epochs=2"]
    words = cli_run(tmp_path / "run", many, "--num-processes", "2", *sets)
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [4, 4]
    said = re.findall(r"left out (\d+) images? that could not be read; the first: (.*) cannot be read", done.stderr)
    assert len(said) == 1
    assert said[0][1] in bad


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False])
def test_a_file_that_is_lost_within_a_run_is_named_and_the_run_goes_on(
    many: Path, tmp_path: Path, back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    through = train(many, output=tmp_path / "through").file.read_bytes()
    file = tmp_path / "images" / "train" / "dog" / "5.jpg"
    kept = file.read_bytes()
    with pytest.raises(DataError, match=rf"^{file} cannot be read: No such file or directory"):
        train(many, output=tmp_path / "run", after_epoch=lambda epoch: file.unlink() if epoch.epoch == 1 else None)
    assert lines(tmp_path / "run")[-1]["epoch"] == 1
    if back:
        file.write_bytes(kept)
        train(many, output=tmp_path / "run", resume=True)
        assert artifact(tmp_path / "run") == through
    else:
        train(many, overrides=["data.on_error=skip"], output=tmp_path / "run", resume=True)
        assert lines(tmp_path / "run")[-1]["epoch"] == 3
        (said,) = [record.getMessage() for record in caplog.records if record.name == "popup_surgery"]
        assert said.startswith("the checkpoint was written with 120 training images and resumes with 119; ")


@pytest.mark.slow
def test_skipped_images_are_counted_once_however_often_a_run_stops(many: Path, tmp_path: Path) -> None:
    damaged(tmp_path / "images", "train/cat/0.png", "train/eel/7.jpg", "train/dog/3.jpg", "validation/dog/1.jpg")
    skip = ["data.on_error=skip"]
    through = train(many, overrides=skip, output=tmp_path / "through").file.read_bytes()
    for _ in range(3):
        with pytest.raises(Stopped):
            train(many, overrides=skip, output=tmp_path / "run", resume=True, progress=stopping(after=25))
    train(many, overrides=skip, output=tmp_path / "run", resume=True)
    assert artifact(tmp_path / "run") == through
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [4, 4, 4]


# worker processes


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The loader's workers, of which a run of one process has no other children; new ones with each epoch."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        if len(found := psutil.Process(process.pid).children()) >= 2:
            return found
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.fault
def test_a_worker_that_dies_is_said_to_and_the_run_goes_on(many: Path, tmp_path: Path) -> None:
    through = train(many, output=tmp_path / "through").file.read_bytes()
    process = started(tmp_path / "run", many)
    workers_of(process)[0].kill()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert re.search(
        r"^error: a worker process of the data loader died: .*set data\.workers to 0", said, re.MULTILINE
    ), said
    train(many, output=tmp_path / "run", resume=True)
    assert artifact(tmp_path / "run") == through


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_stops_it_in_order(
    many: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As SLURM, torchrun and a terminal send it: to the workers too."""
    process = started(tmp_path / "run", many)
    workers = workers_of(process)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert re.fullmatch(r"stopped after step \d+, in epoch \d; resume with the same command and --resume\n", said)
    psutil.wait_procs(workers, timeout=PATIENCE)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.fault
def test_workers_end_with_a_run_that_is_killed(many: Path, tmp_path: Path) -> None:
    process = started(tmp_path / "run", many)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []


@pytest.mark.slow
def test_workers_end_with_a_process_that_fails(images: Path) -> None:
    """As it exits it tells them to end; the error still holds the loader then."""
    script = (
        "from support import opened\n"
        f"data = opened(name='folder', root={str(images)!r}, in_memory=False, batch_size=4, workers=2)\n"
        "for batch in data.train(0): 1 / 0\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, cwd=TESTS)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_death_is_known_wherever_it_is_met() -> None:
    said = "DataLoader worker (pid 7) is killed by signal: Killed. "

    @worker_deaths()
    def busy() -> None:
        try:
            raise RuntimeError(said)
        finally:
            raise KeyError("gone")

    with pytest.raises(DataError, match=rf"^a worker process of the data loader died: {re.escape(said.strip('. '))}; "):
        busy()
    with pytest.raises(RuntimeError, match=r"^Caught"), worker_deaths():
        raise RuntimeError("Caught KeyError in DataLoader worker process 0.")


def test_a_death_while_sending_is_known_and_a_lack_of_open_files_is_none() -> None:
    with pytest.raises(DataError, match=r"died: received 0 items of ancdata; "), worker_deaths():
        raise RuntimeError("received 0 items of ancdata")
    with pytest.raises(RuntimeError, match=r"^Too many open files"), worker_deaths():  # noqa: PT012
        try:
            raise RuntimeError("received 0 items of ancdata")
        except RuntimeError:  # torch looks whether it could open more, and says so
            raise RuntimeError("Too many open files. Communication with the workers is no longer possible.") from None


@pytest.mark.parametrize("shown", [EOFError(), RuntimeError("received 0 items of ancdata")])
def test_torchs_report_of_a_death_that_has_shown_already_comes_nowhere_else(shown: Exception) -> None:
    def report(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, report)
    try:
        with (  # noqa: PT012
            pytest.raises(DataError, match=r"died: DataLoader worker \(pid 7\) is killed"),
            worker_deaths(),  # as in a run, one in the other
            worker_deaths(EOFError),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise shown
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.fault
def test_a_worker_dies_in_evaluation(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(many, overrides=["training.epochs=1", "data.workers=0"], output=tmp_path / "run")

    def die(self: Any, key: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Numbered, "read", die)
    data = recorded_data(result.file, ["data.workers=2"])
    with pytest.raises(DataError, match=r"^a worker process of the data loader died: "):
        evaluate(result.file, data=data, data_dir=tmp_path / "images")
