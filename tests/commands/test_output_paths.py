"""What commands write: never over what they read, and refused before the work where it cannot be written."""

import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from popup_surgery import PopupError, RunError, build, convert, save
from popup_surgery.atomic import check_writable, write_atomically
from popup_surgery.plots import PICTURES
from support import Outcome, short, write_images

Cli = Callable[..., Outcome]
DENSE, LONG = "dense.safetensors", "x" * 300


def refused(outcome: Outcome, says: str) -> None:
    """Status 2, a sentence on stderr that matches, nothing on stdout."""
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert re.fullmatch(rf"error: {says}\n", outcome.err), outcome.err


@pytest.fixture
def inputs(artifact: Path) -> Path:
    """A folder with an artifact, a mask on pretrained weights and its base, a recipe and a folder of images."""
    folder = artifact.parent
    save_file(build("conv2", width=0.25).state_dict(), folder / "base.safetensors")
    model = convert(build("conv2", width=0.25, pretrained=folder / "base.safetensors"), scheme="pretrained")
    save(model, folder / "mask.popup.safetensors")
    shutil.copy(Path(__file__).parents[2] / "recipes" / "digits.yaml", folder / "mine.yaml")
    write_images(folder / "images" / "validation", ("cat",), count=1)
    return folder


def spellings(path: Path) -> dict[str, Path]:
    """Other names of the same file."""
    folder = path.parent
    (folder / f"link{path.suffix}").symlink_to(path.name)
    os.link(path, folder / f"hard{path.suffix}")
    (folder / "folder").symlink_to(folder)
    return {
        "itself": path,
        "relative": Path(path.name),
        "dots": folder / "images" / ".." / path.name,
        "link": folder / f"link{path.suffix}",
        "hard": folder / f"hard{path.suffix}",
        "through a linked folder": folder / "folder" / path.name,
    }


WRITERS = {
    "export": ("digits.popup.safetensors", ["export", "digits.popup.safetensors"]),
    "export with a base": (
        "base.safetensors", ["export", "mask.popup.safetensors", "--base", "base.safetensors"]
    ),
    "convert": (
        "base.safetensors", ["convert", "conv2", "--scheme", "pretrained", "--weights", "base.safetensors"]
    ),
    "recipes": ("mine.yaml", ["recipes", "mine.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("command", WRITERS)
def test_no_command_writes_over_its_own_input(command: str, cli: Cli, inputs: Path) -> None:
    name, call = WRITERS[command]
    before = (inputs / name).read_bytes()
    for spelling, path in spellings(inputs / name).items():
        refused(cli(*call, "-o", path, "--force"), r"-o \S+ is \S+, which the command reads; choose another name .*")
        assert (inputs / name).read_bytes() == before, spelling
    assert (inputs / f"link{path.suffix}").is_symlink()


def test_a_picture_in_the_folder_of_the_images(cli: Cli, inputs: Path) -> None:
    image = inputs / "images" / "validation" / "cat" / "0.png"
    before = image.read_bytes()
    sets = "--set", "data.name=folder"
    for folder in (("--data-dir", inputs / "images"), ("--set", f"data.root={inputs / 'images'}")):
        call = ("sanity", inputs / "digits.popup.safetensors", *sets, *folder, "-o", image, "--force")
        refused(cli(*call), r"-o \S+ is in \S+, which the command reads; choose another name with -o")
    assert image.read_bytes() == before


def test_a_recipe_in_the_runs_own_folder_stays_as_it_is(cli: Cli, inputs: Path) -> None:
    run = inputs / "run"
    run.mkdir()
    text = "# my own words\n" + (inputs / "mine.yaml").read_text().replace("epochs: 40", "epochs: 1")
    (run / "recipe.yaml").write_text(text)
    call = ("train", run / "recipe.yaml", "-o", run)
    refused(cli(*call), ".* holds a run already.*")
    assert (run / "recipe.yaml").read_text() == text
    assert cli(*call, "--resume").status == 0
    assert (run / "recipe.yaml").read_text() == text


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("export", "digits.popup.safetensors", "-o", "net.tflite"), r"\.safetensors or \.onnx or \.pt2"),
        (("export", "digits.popup.safetensors", "-o", "net.pt"), r"\.safetensors or \.onnx or \.pt2"),
        (("export", "digits.popup.safetensors", "-o", "net.safetensor"), r"\.safetensors or \.onnx or \.pt2"),
        (("export", "digits.popup.safetensors", "-o", "net"), r"\.safetensors or \.onnx or \.pt2"),
        (("convert", "conv2", "-o", "net.pth"), r"\.safetensors"),
        (("sanity", "digits.popup.safetensors", "-o", "net.txt"), r"\.png or \.svg or \.pdf"),
        (("sanity", "digits.popup.safetensors", "-o", "net"), r"\.png or \.svg or \.pdf"),
        (("recipes", "digits", "-o", "net.json"), r"\.yaml or \.yml"),
    ],
)
def test_a_name_that_says_something_else(call: tuple[str, ...], expected: str, cli: Cli, artifact: Path) -> None:
    refused(cli(*call), rf"-o is {re.escape(call[-1])}; expected a name that ends in {expected}")
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("suffix", [*PICTURES, ".PNG"])
def test_every_suffix_of_a_picture_gives_one(suffix: str, tmp_path: Path) -> None:
    from popup_surgery.plots import canvas, write_figure

    write_figure(canvas(2, 2)[0], tmp_path / f"p{suffix}")
    start = (tmp_path / f"p{suffix}").read_bytes()[:5]
    assert start == {".png": b"\x89PNG\r", ".svg": b"<?xml", ".pdf": b"%PDF-"}[suffix.lower()]


def made(path: Path, how: Callable[[Path], object]) -> Path:
    how(path)
    return path


NEVER: dict[str, Callable[[Path, str], Path]] = {
    "a name too long": lambda folder, suffix: folder / f"{LONG}{suffix}",
    "a folder": lambda folder, suffix: made(folder / f"there{suffix}", Path.mkdir),
    "below a file": lambda folder, suffix: made(folder / "file", Path.touch) / f"x{suffix}",
    "no such folder": lambda folder, suffix: folder / "no" / f"x{suffix}",
    "no file": lambda folder, suffix: made(folder / f"pipe{suffix}", os.mkfifo),
}
CALLS: dict[str, tuple[str, list[str]]] = {
    "export": (".safetensors", ["export", "digits.popup.safetensors"]),
    "export to ONNX": (".onnx", ["export", "digits.popup.safetensors"]),
    "convert": (".safetensors", ["convert", "conv2"]),
    "sanity": (".png", ["sanity", "digits.popup.safetensors"]),
    "bench": (".png", ["bench", "digits.popup.safetensors"]),
    "recipes": (".yaml", ["recipes", "digits"]),
}


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize("why", NEVER)
def test_a_file_that_can_never_be_written_is_said_before_the_work(
    command: str, why: str, cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from popup_surgery.artifact import Artifact

    suffix, call = CALLS[command]

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(Artifact, "open", work)
    monkeypatch.setattr("popup_surgery.masking.convert.convert_as_given", work)
    path = NEVER[why](artifact.parent, suffix)
    refused(cli(*call, "-o", path, "--force"), rf"{re.escape(str(path))} cannot be written: .*")
    assert not list(artifact.parent.rglob("*.part"))


@pytest.mark.parametrize("command", ["train", "sweep", "reproduce", "zoo"])
@pytest.mark.parametrize("why", ["a name too long", "below a file"])
def test_a_folder_that_can_never_be_written(command: str, why: str, cli: Cli, tmp_path: Path) -> None:
    calls = {
        "train": ["train", "digits"],
        "sweep": ["sweep", "digits"],
        "reproduce": ["reproduce", "figure7", "--scale", "tiny", "--only", "Signed Constant", "--set",
                      "data.name=digits", "--set", "model.kwargs={in_chans: 1, img_size: 8}",
                      "--set", "data.mean=null", "--set", "data.std=null"],
        "zoo": ["zoo", "popup_surgery"],
    }  # fmt: skip
    path = NEVER[why](tmp_path, "")
    outcome = cli(*calls[command], "-o", path)
    refused(outcome, rf"{re.escape(str(path))}(/\S+)? (cannot be written: .*|is not a folder; .*)")


def test_a_result_whose_name_is_too_long_is_said_before_the_first_step(cli: Cli, tmp_path: Path) -> None:
    """The files are named after the recipe."""
    recipe = tmp_path / f"{'x' * 240}.yaml"
    recipe.write_text((Path(__file__).parents[2] / "recipes" / "digits.yaml").read_text())
    for more in ((), ("--resume",)):
        outcome = cli("train", recipe, "-o", tmp_path / "run", *more)
        refused(outcome, r"\S+\.popup\.safetensors cannot be written: .*")
        assert not (tmp_path / "run").exists()


def test_a_file_with_the_longest_name_is_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        check_writable(tmp_path / name)
        write_atomically(tmp_path / name, b"all")
        assert (tmp_path / name).read_bytes() == b"all"
    with pytest.raises(PopupError, match="cannot be written: "):
        write_atomically(tmp_path / LONG, b"all")
    assert len(list(tmp_path.iterdir())) == 2


def test_an_input_whose_name_is_too_long(cli: Cli) -> None:
    name = f"{LONG}.yaml"
    for call in (("train", name), ("inspect", name), ("predict", name, "x.png"), ("train", "digits", "--set",
                 f"model.pretrained={LONG}.pt", "--set", "surgery.scheme=pretrained")):  # fmt: skip
        outcome = cli(*call)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert outcome.err.startswith("error: ")
        assert LONG in outcome.err


@pytest.mark.parametrize("error", [ImportError("no module named 'six'"), AttributeError("io"), OSError(28, "full")])
def test_a_tracker_that_cannot_start_is_said_before_the_first_step(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Any = types.ModuleType("torch.utils.tensorboard")

    def fail(name: str) -> Any:
        raise error

    broken.__getattr__ = fail
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    monkeypatch.setattr("torch.utils.tensorboard", broken, raising=False)
    with pytest.raises(RunError, match=r"^training\.trackers: tensorboard cannot start: .+"):
        short(tmp_path / "run", 'training.trackers=["tensorboard"]')
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    result = short(tmp_path / "run", 'training.trackers=["tensorboard"]')
    assert result.file.exists()
    assert [record.message for record in caplog.records if "tracker" in record.message] == [
        "the tracker tensorboard has failed, and the run continues without it: [Errno 28] No space left on device"
    ]
