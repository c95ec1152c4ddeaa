"""A file's images are prepared in one way wherever they are read, and their labels are the classes of its network."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from popup_surgery import DataError, RunError, evaluate, inspect, load, predict, sanity, save, train
from popup_surgery.data.batches import quiet
from popup_surgery.experiment.evaluate import recorded_data
from popup_surgery.experiment.setup import open_for
from popup_surgery.masking.convert import convert
from popup_surgery.models.build import build
from popup_surgery.models.paper_nets import ConvNet
from support import joined, recipe, stopping, write_images

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 16 × 16 pixels and of other sizes, of three classes that a network can tell apart."""
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 12), ("validation", 6)):
        for place, name in enumerate(("cat", "dog", "zebra")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (16, 16) if i % 2 else (23, 31)
                pixels = np.random.default_rng(i).integers(0, 120, (*size, 3), dtype=np.uint8)
                pixels[..., place] += 130
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def file(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows them."""
    values = recipe(three)
    values["model"]["kwargs"]["width"] = 0.5
    values["training"] |= {"epochs": 8}
    result = train(values, output=tmp_path_factory.mktemp("run") / "run")
    assert result.accuracy == 1
    return result.file


def again(file: Path, path: Path, **data: Any) -> Path:
    """The same file with another data section in its provenance; `same_size=None` leaves the key out."""
    provenance = inspect(file).provenance
    section = provenance["recipe"]["data"] | data
    provenance["recipe"]["data"] = {key: value for key, value in section.items() if (key, value) != ("same_size", None)}
    net = convert(build("popup_surgery/fc", **provenance["recipe"]["model"]["kwargs"]), 0.5, seed=3)
    save(net, path, provenance=provenance)
    return path


def files(root: Path) -> list[Path]:
    """The validation images in their order."""
    return sorted((root / "validation").glob("*/*.png"), key=lambda path: (path.parent.name, int(path.stem)))


def seen(file: Path, root: Path, *overrides: str) -> torch.Tensor:
    """The validation images as `evaluate` gives them to the network."""
    data = recorded_data(file, overrides).model_copy(update={"root": str(root), "workers": 0})
    return joined(open_for(load(file), data, quiet, False, []).validation())[0]


# one preparation


@pytest.mark.parametrize("same_size", ["keep", "crop"])
def test_the_network_sees_the_same_images_whatever_the_path(
    same_size: str, file: Path, three: Path, tmp_path: Path
) -> None:
    ours = again(file, tmp_path / "ours", same_size=same_size)
    streamed, held = seen(ours, three, "data.in_memory=false"), seen(ours, three, "data.in_memory=true")
    erased = seen(ours, three, "data.in_memory=false", "data.re_prob=0.3")
    assert torch.equal(streamed, held)
    assert torch.equal(streamed, erased)
    given: list[torch.Tensor] = []
    hook = register_module_forward_pre_hook(lambda net, x: given.append(x[0]) if isinstance(net, ConvNet) else None)
    try:
        predict(ours, files(three))
    finally:
        hook.remove()
    assert torch.equal(given[-1], streamed)
    for path, found in zip(files(three), streamed, strict=True):
        with Image.open(path) as image:
            as_it_is = image.size == (16, 16) and same_size == "keep"
            pixels = torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255
        assert torch.allclose(found * STD + MEAN, pixels, atol=1e-3) == as_it_is


def test_a_new_file_records_that_images_of_its_size_are_kept(file: Path) -> None:
    assert inspect(file).provenance["recipe"]["data"]["same_size"] == "keep"
    assert recorded_data(file).same_size == "keep"


@pytest.mark.parametrize(
    ("data", "before"),
    [
        ({"in_memory": True}, "keep"),
        ({"in_memory": False}, "crop"),
        ({"scale": [0.5, 1.0]}, "crop"),
        ({"auto_augment": "rand-m5-n2"}, "crop"),
        ({"re_prob": 0.1}, "crop"),
        ({"color_jitter": 0.1}, "crop"),
        ({"color_jitter": 0.1, "in_memory": True}, "keep"),
    ],
)
def test_an_older_file_keeps_the_way_of_its_own_run(
    data: dict[str, Any], before: str, file: Path, three: Path, tmp_path: Path
) -> None:
    old = again(file, tmp_path / "old", same_size=None, **data)
    new = again(file, tmp_path / "new", same_size=before, **data)
    assert recorded_data(old).same_size == before
    assert recorded_data(old, ["data.same_size=keep"]).same_size == "keep"
    for overrides in ([], ["data.in_memory=true"], ["data.in_memory=false"]):
        assert torch.equal(seen(old, three, *overrides), seen(new, three, *overrides))
    assert predict(old, files(three)) == predict(new, files(three))
    assert evaluate(old, data_dir=three).accuracy == evaluate(new, data_dir=three).accuracy


def test_the_size_of_an_older_files_whole_data_set_decides(
    file: Path, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was streamed where both splits together did not fit into memory, however few the validation images are."""
    old = again(file, tmp_path / "old", same_size=None)
    assert recorded_data(old).same_size is None
    ways = {way: seen(again(file, tmp_path / way, same_size=way), three) for way in ("keep", "crop")}
    assert torch.equal(seen(old, three), ways["keep"])
    monkeypatch.setattr("popup_surgery.data.open.MEMORY_LIMIT", 30 * 16 * 16 * 3)
    assert torch.equal(seen(old, three), ways["crop"])
    assert not caplog.records
    shutil.copytree(three / "validation", tmp_path / "alone" / "validation")
    assert torch.equal(seen(old, tmp_path / "alone"), ways["keep"])
    assert "data.same_size=keep or crop decides it" in caplog.text


# labels by name


def subset(three: Path, root: Path, names: dict[str, str]) -> Path:
    """The validation images of some classes, under other names."""
    for before, now in names.items():
        shutil.copytree(three / "validation" / before, root / "validation" / now)
    return root


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("names", [["cat", "dog", "zebra"], ["cat", "zebra"], ["zebra"]])
def test_a_part_of_the_classes_is_evaluated_rightly(
    names: list[str], in_memory: bool, file: Path, three: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    root = subset(three, tmp_path, {name: name for name in names})
    data = recorded_data(file, [f"data.in_memory={in_memory}"])
    found = evaluate(file, data=data, data_dir=root)
    assert (found.accuracy, found.images) == (1, 6 * len(names))
    done = cli("evaluate", file, "--data-dir", root, "--set", f"data.in_memory={str(in_memory).lower()}")
    assert done.out == f"100.00 % of {6 * len(names)} validation images of folder\n"
    assert sanity(file, data=data, data_dir=root, repeats=1).variations[0].accuracy == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_order_of_the_classes_is_evaluated_rightly(
    in_memory: bool, file: Path, three: Path, tmp_path: Path
) -> None:
    provenance = inspect(file).provenance | {"classes": ["zebra", "cat", "dog"]}
    permuted = _saved(file, tmp_path / "permuted", provenance)
    data = recorded_data(permuted, [f"data.in_memory={in_memory}"])
    here = data.model_copy(update={"root": str(three)})
    labels = joined(open_for(load(file), here, quiet, False, ["zebra", "cat", "dog"]).validation())[1]
    assert labels.tolist() == [1] * 6 + [2] * 6 + [0] * 6
    assert evaluate(permuted, data=data, data_dir=three).accuracy == pytest.approx(0)


def _saved(file: Path, path: Path, provenance: dict[str, Any]) -> Path:
    """The network of `file` with another provenance."""
    from popup_surgery import start_from

    net = convert(build("popup_surgery/fc", **provenance["recipe"]["model"]["kwargs"]), 0.5, scaled=False)
    start_from(net, file)
    save(net, path, provenance=provenance)
    return path


@pytest.mark.parametrize(
    ("names", "unknown", "rest"),
    [
        ({"cat": "cat", "dog": "horse", "zebra": "zebra"}, "'horse'", "'dog'"),
        ({"cat": "Cat", "dog": "dog"}, "'Cat'", "'cat', 'zebra'"),
        ({"cat": "emu", "dog": "fox"}, "'emu', 'fox'", "'cat', 'dog', 'zebra'"),
    ],
)
def test_classes_of_other_names_are_refused(
    names: dict[str, str], unknown: str, rest: str, file: Path, three: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    root = subset(three, tmp_path, names)
    outcome = cli("evaluate", file, "--data-dir", root)
    assert outcome.status == 2
    says = (
        f"data set folder has the classes {unknown}, which the network was not trained on; choose a data set with the "
        f"file's classes, such as {rest}"
    )
    assert outcome.err == f"error: {says}\n"
    with pytest.raises(DataError, match=f"^{says}$"):
        sanity(file, data_dir=root)


def test_more_classes_than_the_network_has_are_refused(file: Path, three: Path, tmp_path: Path) -> None:
    root = subset(three, tmp_path, {"cat": "cat", "dog": "dog", "zebra": "zebra"})
    write_images(root / "validation", ("yak",), count=1)
    with pytest.raises(
        DataError, match=r"has the classes 'yak', which the network was not trained on; choose a data set"
    ):
        evaluate(file, data_dir=root)


@pytest.mark.parametrize("classes", [[], None, "abc", ["cat", "cat", "dog"], ["cat", 3, "dog"]])
def test_a_file_without_names_is_evaluated_by_position(classes: Any, file: Path, three: Path, tmp_path: Path) -> None:
    plain = _saved(file, tmp_path / "plain", inspect(file).provenance | {"classes": classes})
    assert evaluate(plain, data_dir=three).accuracy == 1
    with pytest.raises(DataError, match="the data set has 2 classes, and the network has 3 outputs"):
        evaluate(plain, data_dir=subset(three, tmp_path / "two", {"cat": "cat", "dog": "dog"}))
    ((first, *_),) = predict(plain, [three / "validation" / "zebra" / "0.png"])
    assert first[0] == "2"


def test_names_that_are_too_few_are_not_shown(file: Path, three: Path, tmp_path: Path) -> None:
    few = _saved(file, tmp_path / "few", inspect(file).provenance | {"classes": ["a", "b"]})
    ((first, *_),) = predict(few, [three / "validation" / "zebra" / "0.png"])
    assert first[0] == "2"


# classes on resume


@pytest.fixture
def stopped(three: Path, tmp_path: Path) -> tuple[dict[str, Any], Path, Path]:
    """A recipe on a copy of the images, the run's folder, and the images' folder; it is stopped within its 2 epochs."""
    root = Path(shutil.copytree(three, tmp_path / "images"))
    values = recipe(root)
    values["training"] |= {"epochs": 2}
    with pytest.raises(RunError, match="stopped after step"):
        train(values, output=tmp_path / "run", progress=stopping(after=12))
    return values, tmp_path / "run", root


def rename(root: Path, **names: str) -> None:
    for before, now in names.items():
        for split in ("train", "validation"):
            (root / split / before).rename(root / split / now)


def test_a_class_that_is_renamed_stops_the_resuming_run(stopped: tuple[dict[str, Any], Path, Path]) -> None:
    values, run, root = stopped
    rename(root, dog="eel")
    before = sorted((path.name, path.read_bytes()) for path in run.rglob("*") if path.is_file())
    with pytest.raises(RunError) as caught:
        train(values, output=run, resume=True)
    assert str(caught.value) == (
        "the data set has other classes than at the checkpoint: it lacks 'dog' and 'eel' is new; give the classes "
        "their names again, or start a new run in another folder with --output"
    )
    assert sorted((path.name, path.read_bytes()) for path in run.rglob("*") if path.is_file()) == before
    rename(root, eel="dog")
    assert inspect(train(values, output=run, resume=True).file).provenance["classes"] == ["cat", "dog", "zebra"]


def test_a_checkpoint_without_classes_resumes(stopped: tuple[dict[str, Any], Path, Path]) -> None:
    """As those of earlier versions, some of which are in tests/golden."""
    values, run, root = stopped
    for path in (run / "checkpoints").glob("*.json"):
        state = json.loads(path.read_text())
        assert state["classes"] == ["cat", "dog", "zebra"]
        del state["classes"], state["sha256"]
        text = json.dumps(state, sort_keys=True).encode()
        path.write_text(json.dumps(state | {"sha256": hashlib.sha256(text).hexdigest()}))
    rename(root, dog="eel")
    assert len(train(values, output=run, resume=True).history) == 2
