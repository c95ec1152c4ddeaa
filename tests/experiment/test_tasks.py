"""Many tasks on one network: the table of accuracies, with and without being told the task, and the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from popup_surgery import ArtifactError, DataError, Result, build, convert, evaluate, evaluate_tasks, save
from popup_surgery.bank.files import files_of
from support import Outcome, short

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(first: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs of digits whose pixels are in other orders, in runs' folders."""
    root = tmp_path_factory.mktemp("tasks")
    short(root / "turned", "training.epochs=3", "data.permute_seed=1")
    short(root / "plain", "training.epochs=3")
    return root


@pytest.mark.slow
def test_each_task_on_its_own_data(folder: Path) -> None:
    files = files_of(folder)
    assert list(files) == ["plain", "turned"]
    table = evaluate_tasks(files)
    assert table.fits
    assert table.how == "halving"
    for row in table.tasks:
        assert row.accuracy == evaluate(files[row.task]).accuracy
        assert row.images == 359
        assert row.data == ("digits" if row.task == "plain" else "digits, pixels permuted by seed 1"), row
        assert row.kept == 0.5
        assert row.inferred is not None
        assert row.found is not None
    by_entropy = evaluate_tasks(files, how="each")
    assert by_entropy.how == "each"
    assert (by_entropy.mean("found") or 0) > 0.7, "networks are surer of their own order of pixels"
    lines = str(table).splitlines()
    assert lines[0].split("  ")[0] == "task"
    assert len(lines) == 4
    assert table.to_json()["mean"]["accuracy"] == table.mean("accuracy")


def test_one_task_is_not_inferred(first: Result) -> None:
    table = evaluate_tasks({"digits": first.file})
    assert table.tasks[0].inferred is None
    assert table.how == ""
    assert "–" in str(table)


@pytest.mark.slow
def test_a_file_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    files = dict(files_of(folder))
    save(convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5, seed=9), tmp_path / "other")
    save(
        convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5, scaled=False),
        tmp_path / "no data",
    )
    with pytest.raises(ArtifactError, match="other: its weights are drawn from seed 9, the bank's from seed 0"):
        evaluate_tasks(files | {"other": tmp_path / "other"})
    with pytest.raises(DataError, match="no data does not say which data set"):
        evaluate_tasks(files | {"no data": tmp_path / "no data"})
    table = evaluate_tasks(files | {"other": tmp_path / "other", "no data": tmp_path / "no data"}, strict=False)
    assert not table.fits
    assert [bool(row.problem) for row in table.tasks] == [False, False, True, True]
    assert [row.accuracy is None for row in table.tasks] == [False, False, True, True]


def test_the_command(folder: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("bank", folder)
    assert done.status == 0, done
    assert [line.split()[0] for line in done.out.splitlines()] == ["task", "plain", "turned", "mean"]
    found = json.loads(cli("bank", folder, "--json", "--how", "each").out)
    assert found["how"] == "each"
    assert [row["task"] for row in found["tasks"]] == ["plain", "turned"]
    shutil.copytree(folder, tmp_path / "copy")
    bad = next((tmp_path / "copy").glob("turned/*.popup.safetensors"))
    bad.write_bytes(bad.read_bytes()[:-1])
    spoilt = cli("bank", tmp_path / "copy")
    assert spoilt.status == 1
    assert "turned: " in spoilt.out
    assert "the file is damaged" in spoilt.out


def test_folders_without_masks(cli: Cli, tmp_path: Path) -> None:
    for folder, says in (tmp_path, "has no file that ends in .popup.safetensors"), (tmp_path / "no", "is not there"):
        failed = cli("bank", folder)
        assert (failed.status, failed.err.count("\n")) == (2, 1)
        assert says in failed.err
    failed = cli("bank", tmp_path, "--how", "best")
    assert failed.status == 2
    assert "unknown --how 'best'" in failed.err


def test_names_of_tasks(tmp_path: Path) -> None:
    for name in ("a/one", "b/one"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.popup.safetensors").touch()
    assert list(files_of(tmp_path)) == ["a", "b"]
    (tmp_path / "two.popup.safetensors").touch()
    assert list(files_of(tmp_path)) == ["a/one", "b/one", "two"]


def test_other_data_for_all(folder: Path) -> None:
    table = evaluate_tasks(files_of(folder), overrides=["data.max_validation=64"])
    assert [row.images for row in table.tasks] == [64, 64]
