"""Runs that are stopped, killed, damaged and shared: real processes, and the same file at the end."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from popup_surgery import PopupError, RunError, train
from popup_surgery.config import Recipe
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import run_folder
from popup_surgery.training import checkpoint
from support import (
    PATIENCE,
    SHORT,
    Outcome,
    digits_begun,
    digits_command,
    run_digits,
    slow_except,
    stopping,
    wait_for,
)


def resume(folder: Path) -> bytes:
    """Go on with a run, in this process. The file that it ends in."""
    return train("digits", overrides=SHORT, output=folder, resume=True).file.read_bytes()


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run that nothing disturbed."""
    return train("digits", overrides=SHORT, output=tmp_path_factory.mktemp("through") / "run").file.read_bytes()


# stopped and killed


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_run_goes_on_to_the_same_file(number: signal.Signals, through: bytes, tmp_path: Path) -> None:
    process = digits_begun(tmp_path / "run")
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert re.fullmatch(r"stopped after step \d+, in epoch \d; resume with the same command and --resume\n", said)
    assert resume(tmp_path / "run") == through
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "curve.png", "digits.popup.safetensors", "masks.png", "metrics.jsonl", "recipe.yaml",
    ]  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.fault
@pytest.mark.parametrize("how", slow_except(["one process", "two processes", "sweep"], []))
def test_further_signals_change_nothing_once_a_stop_is_under_way(how: str, tmp_path: Path) -> None:
    """Each of them many times, until the process has ended."""
    if how == "sweep":
        words = [sys.executable, "-m", "popup_surgery", "sweep", "digits", "-o", str(tmp_path / "sweep"), "--jobs", "1"]
        words += ["--set", "training.checkpoint_minutes=0.0001"]
        process = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_for(process, lambda: list((tmp_path / "sweep").glob("*/checkpoints/*.json")))
    else:
        process = digits_begun(tmp_path / "run", *(["--num-processes", "2"] if how == "two processes" else []))
    numbers = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    while process.poll() is None:
        process.send_signal(next(numbers))
        time.sleep(0.002)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert len(re.findall(r"stopped (after step|with \d of)", said)) == 1, said
    assert "Traceback" not in said
    if how == "one process":
        assert said.count("\n") == 1


def test_a_stop_leaves_the_handlers_of_a_caller_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        train("digits", overrides=SHORT, output=tmp_path / "run", progress=stopping(2))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_stop_that_comes_with_the_end_of_an_epoch_waits_for_no_step(through: bytes, tmp_path: Path) -> None:
    def stop(epoch: Any) -> None:
        if epoch.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"^stopped after step 45, in epoch 1$"):
        train("digits", overrides=SHORT, output=tmp_path / "run", after_epoch=stop)
    assert resume(tmp_path / "run") == through


@pytest.mark.slow
@pytest.mark.fault
def test_kills_at_random_moments_change_nothing(through: bytes, tmp_path: Path) -> None:
    pause = random.Random(0)
    for kill in range(4):
        process = digits_begun(tmp_path / "run", "--resume")
        if kill % 2:
            wait_for(process, lambda: list((tmp_path / "run" / "checkpoints").glob(".*.part")))
        else:
            time.sleep(pause.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    assert resume(tmp_path / "run") == through
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
def test_resume_starts_where_there_is_no_run_and_says_when_one_is_finished(
    cli: Callable[..., Outcome], through: bytes, tmp_path: Path
) -> None:
    first = train("digits", overrides=SHORT, output=tmp_path / "run", resume=True)
    assert first.file.read_bytes() == through
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = cli(*digits_command(tmp_path / "run", "--resume")[3:])
    assert again.status == 0
    assert "had already finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    result = train("digits", overrides=SHORT, output=tmp_path / "run", resume=True)
    assert (result.accuracy, result.kept, result.history) == (first.accuracy, first.kept, first.history)


# damaged and contested


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed with two checkpoints in it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = digits_begun(folder)
    wait_for(process, lambda: len(list((folder / "checkpoints").glob("*.json"))) >= 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    return folder


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """Our own copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.with_suffix(".safetensors").write_bytes(b"\0" * 9),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.with_suffix(".safetensors").unlink(),
    "flipped tensor": lambda path: flip(path.with_suffix(".safetensors")),
    "flipped state": flip,
}


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, stopped: Path, through: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    newest = next(checkpoint.newest_first(stopped / "checkpoints"))
    DAMAGES[damage](newest)
    assert resume(stopped) == through
    assert f"{newest.parent / newest.stem}." in caplog.text.split(" is damaged")[0]
    assert "trying the checkpoint before it" in caplog.text


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_count_among_the_two_that_are_kept(stopped: Path) -> None:
    newest, before = list(checkpoint.newest_first(stopped / "checkpoints"))[:2]
    flip(newest)
    folder = run_folder(stopped, Recipe.load("digits", SHORT), "digits")
    found = folder.begin()
    assert found is not None
    assert found.state["step"] == int(before.stem)
    assert newest not in checkpoint.newest_first(stopped / "checkpoints")
    assert not newest.with_suffix(".safetensors").exists()


@pytest.mark.slow
@pytest.mark.fault
def test_no_whole_checkpoint_is_an_error_and_loses_nothing(stopped: Path) -> None:
    for path in (stopped / "checkpoints").glob("*.json"):
        flip(path)
    before = sorted(path.name for path in stopped.rglob("*"))
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged; remove .* to start again"):
        train("digits", overrides=SHORT, output=stopped, resume=True)
    assert sorted(path.name for path in stopped.rglob("*") if path.name != "lock") == [
        name for name in before if name != "lock"
    ]


@pytest.mark.slow
@pytest.mark.fault
def test_another_recipe_is_refused_by_the_keys_that_differ(stopped: Path) -> None:
    more = ["training.lr=0.5", "surgery.k=0.4"]
    with pytest.raises(RunError, match=r"another recipe: surgery\.k is 0\.5 there and 0\.4 here, and training\.lr$"):
        train("digits", overrides=SHORT + more, output=stopped, resume=True)
    file = stopped / "recipe.yaml"
    file.write_text(file.read_text().replace("lr: 0.1\n", "lr: 0.2\n"))
    with pytest.raises(RunError, match=r"another recipe: training\.lr is 0\.1 there and 0\.2 here$"):
        train(file, output=stopped, resume=True)
    file.write_text(file.read_text().replace("lr: 0.2\n", "lr: 0.1\n"))
    train("digits", overrides=[*SHORT, "training.checkpoint_minutes=5"], output=stopped, resume=True)
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"holds a finished run with the file digits\.popup\.safetensors, and this run "):
        train(file, output=stopped, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault
@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    process = digits_begun(tmp_path / "run")
    with pytest.raises(RunError, match="another process runs in"):
        train("digits", overrides=SHORT, output=tmp_path / "run", resume=True)
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / "lock").exists()  # and holds nobody up
    resume(tmp_path / "run")


def small_disk(tmp_path: Path, size: str) -> Path:
    """A folder on a file system of that size."""
    (disk := tmp_path / "disk").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    return disk


@pytest.mark.slow
@pytest.mark.fault
def test_a_disk_that_is_full(tmp_path: Path, through: bytes) -> None:
    """During a checkpoint: it ends with what did not fit, those before stay, and the run goes on from them."""
    disk = small_disk(tmp_path, "1m")
    try:
        process = digits_begun(disk / "run")
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2
        found = re.search(
            r"checkpoints/\d+\.(safetensors|json) cannot be written: No space left on device; (.*)\n", said
        )
        assert found, said
        assert re.match(r"[\d,]+ of [\d,]+ bytes did not fit", found[2])
        assert not list(disk.rglob("*.part"))
        assert list(checkpoint.newest_first(disk / "run" / "checkpoints"))
        ballast.unlink()
        assert resume(disk / "run") == through
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.fault
def test_a_folder_that_is_read_only(tmp_path: Path, through: bytes) -> None:
    disk = small_disk(tmp_path, "4m")
    try:
        process = digits_begun(disk / "run")
        process.kill()
        process.communicate()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in (disk / "run", disk / "new"):
            with pytest.raises(PopupError, match=rf"^{folder} cannot be written: Read-only file system$"):
                resume(folder)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert resume(disk / "run") == through
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.fault
def test_a_clock_that_goes_backwards(stopped: Path, through: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoint is the newest is a matter of steps, not of the files' times."""
    newest, before, *_ = checkpoint.newest_first(stopped / "checkpoints")
    for path, when in ((newest, 1e9), (before, 2e9)):
        for file in (path, path.with_suffix(".safetensors")):
            os.utime(file, (when, when))
    times = iter(range(2**31, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    result = train("digits", overrides=SHORT, output=stopped, resume=True)
    assert result.file.read_bytes() == through
    assert all(epoch.seconds > 0 and epoch.images_per_second > 0 for epoch in result.history)


@pytest.mark.slow
@pytest.mark.fault
def test_a_limit_on_files(tmp_path: Path) -> None:
    script = (
        "import resource, signal; from popup_surgery import train, PopupError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"try: train('digits', overrides=['training.epochs=1'], output={str(tmp_path / 'run')!r})\n"
        "except PopupError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    found = re.search(r"checkpoints/\d+\.safetensors cannot be written: File too large; (.*) bytes did", done.stdout)
    assert found, done.stderr
    missing, needed = (int(number.replace(",", "")) for number in found[1].split(" of "))
    assert needed - missing == 20_000
    assert not list((tmp_path / "run").rglob("*.part"))


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        checkpoint.write(tmp_path / "c", step, checkpoint.Checkpoint({"x": torch.tensor([step])}, {"step": step}))
    assert [path.stem for path in checkpoint.newest_first(tmp_path / "c")] == ["0000000100", "0000000020"]
    assert len(list((tmp_path / "c").iterdir())) == 4
    found = checkpoint.read(tmp_path / "c" / "0000000020.json")
    assert found.tensors["x"].item() == found.state["step"] == 20


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_says_what_that_changes(stopped: Path) -> None:
    done = run_digits(stopped, "--resume", "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    assert "written by 1 process and resumes with 2" in done.stderr
    with pytest.raises(PopupError):
        train("digits", overrides=SHORT, output=stopped)
