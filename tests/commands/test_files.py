"""Any file given to any command: the message says what it is and which command takes it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import popup_surgery
from popup_surgery import Result, build, convert, evaluate, predict, save, train
from support import GOLDEN, Outcome, write_digit

Cli = Callable[..., Outcome]
COMMANDS = {
    "inspect": (), "verify": (), "evaluate": (), "sanity": (), "export": ("-o", "out.safetensors"),
    "predict": ("digit.png",), "diff": ("net.popup.safetensors",), "convert": (), "train": (), "sweep": (),
    "recipes": (),
}  # fmt: skip
DENSE = r"dense weights \(\d+ tensors\); popup-surgery evaluate takes them in their run's folder"
KINDS = {
    "dense.safetensors": DENSE,
    "foreign.safetensors": DENSE,
    "exported.safetensors": r"dense weights of a run or an export \(5 tensors\); popup-surgery evaluate and predict",
    "run.masks.safetensors": r"masks \(5 tensors\), as a run writes .*; popup-surgery diff takes them",
    "run.scores.safetensors": r"the scores of a run \(1 tensors\); the run's artifact",
    "0000000140.safetensors": r"a checkpoint \(\d+ tensors\); popup-surgery train RECIPE -o FOLDER --resume continues",
    "adapter.safetensors": r"an adapter of PEFT \(1 tensors\), .*; nothing here takes it",
    "numbers.safetensors": r"a safetensors file of 1 tensors, none of floats; nothing here takes it",
    "net.pt": r"a ZIP file, as torch\.save writes; popup-surgery convert NAME --scheme pretrained --weights FILE takes",
    "old.pt": r"a pickle, as old versions of torch\.save write; ",
    "picture.png": "a picture; popup-surgery predict takes pictures",
    "numbers.npz": "a ZIP file, as torch.save writes",
    "notes.txt": "a text file; popup-surgery train and sweep take recipes",
    "pointer.bin": "a pointer of Git LFS; git lfs pull fetches the file itself",
    "run.folder": r"the folder of a run, whose file is \S+/tiny\.popup\.safetensors",
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    model = convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5)
    save(model, folder / "net.popup.safetensors")
    shutil.copy(GOLDEN / "artifacts" / "dense.safetensors", folder)
    shutil.copy(GOLDEN / "artifacts" / "dnw.masks.safetensors", folder / "run.masks.safetensors")
    shutil.copy(GOLDEN / "stopped" / "tiny" / "checkpoints" / "0000000140.safetensors", folder)
    shutil.copytree(GOLDEN / "finished" / "tiny", folder / "run.folder")
    save_file(timm.create_model("test_resnet").state_dict(), folder / "foreign.safetensors")
    save_file({"a.weight_score": torch.zeros(3)}, folder / "run.scores.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(3)}, folder / "adapter.safetensors")
    save_file({"a": torch.zeros(3, dtype=torch.int64)}, folder / "numbers.safetensors")
    torch.save({"a": torch.zeros(3)}, folder / "net.pt")
    torch.save({"a": torch.zeros(3)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    Image.new("L", (8, 8)).save(folder / "picture.png")
    np.savez(folder / "numbers.npz", a=np.zeros(3))
    (folder / "notes.txt").write_text("of no use\nhere\n")
    (folder / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    from popup_surgery.experiment.dense import write_dense

    write_dense(popup_surgery.bake(model), folder / "exported.safetensors", {})
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind(command: str, cli: Cli, kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kinds)
    before = sorted(kinds.iterdir())
    for name, says in KINDS.items():
        if command in ("evaluate", "predict") and name == "exported.safetensors":
            continue
        if command == "diff" and name == "run.masks.safetensors":
            continue
        outcome = cli(command, name, *COMMANDS[command])
        fails = command == "verify" and name != "run.folder"
        said = outcome.out if fails else outcome.err
        assert outcome.status == (1 if fails else 2), (name, outcome)
        assert said.count("\n") == 1, said
        assert re.search(says, said), (name, said)
    assert sorted(kinds.iterdir()) == before


def test_an_artifact_where_something_else_is_taken(cli: Cli, kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kinds)
    for command in ("convert", "train", "sweep", "recipes"):
        says = r"is not a .* but a popup artifact; popup-surgery inspect, verify, evaluate, .* take it\n"
        assert re.search(says, cli(command, "net.popup.safetensors").err), command
    for file, says in {
        "net.popup.safetensors": (
            "is a popup artifact, which has a seed and masks; popup-surgery export writes its weights"
        ),
        "run.masks.safetensors": "is a file of masks; the weights are in the file beside it",
        "0000000140.safetensors": "is a checkpoint of a run; the file that the run ends with has its weights",
    }.items():
        told = cli("convert", "conv2", "--scheme", "pretrained", "--weights", file)
        assert (told.status, told.err) == (2, f"error: {file} {says}\n")


def test_an_artifact_that_something_else_wrote_again(kinds: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(kinds / "net.popup.safetensors", "pt") as file:
        metadata = {**file.metadata(), "format": "pt"}
    save_file(load_file(kinds / "net.popup.safetensors"), tmp_path / "again", metadata)
    with pytest.raises(popup_surgery.ArtifactError, match=r"`__metadata__` has more than 'popup_surgery', so it was"):
        popup_surgery.inspect(tmp_path / "again")


# dense results


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    overrides = ["surgery=none", "training.epochs=2", "training.lr=0.01"]
    return train("digits", overrides=overrides, output=tmp_path_factory.mktemp("dense") / "run")


def test_evaluate_takes_dense_results_wherever_they_are(dense_run: Result, cli: Cli, tmp_path: Path) -> None:
    file = Path(shutil.copy(dense_run.file, tmp_path / "moved.safetensors"))
    assert evaluate(file).accuracy == dense_run.accuracy
    done = cli("evaluate", file)
    assert done.out == f"{100 * dense_run.accuracy:.2f} % of 359 validation images of digits\n", done.err
    write_digit(tmp_path / "digit.png", 4)
    assert len(predict(file, [tmp_path / "digit.png"])[0]) == 5
    told = cli("evaluate", file, "--base", file)
    assert told.err == f"error: {file}: a base was given, and these weights are dense\n"


def test_evaluate_takes_an_export(cli: Cli, first: Result, tmp_path: Path) -> None:
    assert cli("export", first.file, "-o", tmp_path / "dense.safetensors").status == 0
    assert evaluate(tmp_path / "dense.safetensors").accuracy == first.accuracy
    plain = timm.models.load_state_dict(str(tmp_path / "dense.safetensors"))
    assert plain.keys() == first.model.state_dict().keys()


@pytest.mark.parametrize("run", ["finished/ticket", "sweep/7598a27d71749e28"])
def test_evaluate_takes_dense_results_of_earlier_versions_in_their_folder(run: str) -> None:
    (file,) = (f for f in (GOLDEN / run).glob("*.safetensors") if "masks" not in f.name)
    import json

    *_, last = map(json.loads, (GOLDEN / run / "metrics.jsonl").read_text().splitlines())
    assert evaluate(file).accuracy == pytest.approx(last["accuracy"], abs=0.01)


def test_dense_weights_from_a_stranger(dense_run: Result, tmp_path: Path) -> None:
    """The description in the file is checked as that of an artifact is."""
    import json

    from popup_surgery.artifact.kinds import DENSE

    state = load_file(dense_run.file)
    good = {"library": "popup_surgery", "name": "conv2", "version": "", "kwargs": {"in_chans": 1, "img_size": 8}}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"library": "os"}, "architecture.library is 'os'"),
        ({"name": "../conv2"}, "architecture.name is '../conv2'"),
        ({"kwargs": {"pretrained": True}}, "architecture.kwargs has 'pretrained'"),
        ({}, r"'classifier\.1\.weight' is \(64, 256\); conv2 has \(256, 1024\)"),
        ({"name": 3}, "has an architecture of"),
        ({"kwargs": {"in_chans": 1, "img_size": 16}}, r"'classifier\.1\.weight' is \(64, 256\); conv2 has"),
    ]
    for change, says in changes:
        about = {"architecture": {**good, **change}, "provenance": {"recipe": {"data": {"name": "digits"}}}}
        save_file(state, tmp_path / "x.safetensors", {"format": "pt", DENSE: json.dumps(about)})
        with pytest.raises(popup_surgery.ArtifactError, match=says):
            evaluate(tmp_path / "x.safetensors")
    for text in ("{", "[]", "3", '{"architecture": {}}'):
        save_file(state, tmp_path / "x.safetensors", {DENSE: text})
        with pytest.raises(popup_surgery.ArtifactError, match=r"x\.safetensors: the metadata popup_surgery_dense"):
            evaluate(tmp_path / "x.safetensors")
