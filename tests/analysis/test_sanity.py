"""What `sanity` measures: each network it makes against the same made by hand, and what the command shows of it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import popup_surgery
from popup_surgery import (
    ConversionError,
    DataError,
    bake,
    build,
    convert,
    evaluate,
    load,
    masks,
    sanity,
    save,
    train,
)  # fmt: skip
from popup_surgery.analysis import sanity as module
from popup_surgery.artifact import stored_masks
from popup_surgery.config.schema import Data
from popup_surgery.sharing.sanity_table import SanityTable
from support import ROOT

# timm's readers hand out open files and leave the closing to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.(png|jpg|tar)'>:ResourceWarning")

State = dict[str, Tensor]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The state of each network whose accuracy is measured."""
    states: list[State] = []
    real = module.accuracy_of

    def spy(model: nn.Module, *rest: Any) -> tuple[float, int]:
        result = real(model, *rest)
        assert not any(part.training for part in model.modules())
        states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return result

    monkeypatch.setattr(module, "accuracy_of", spy)
    return states


def raw_digits(seed: int) -> State:
    net = convert(build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8), k=1.0, scaled=False, seed=seed)
    return bake(net).state_dict()


def accuracy(net: nn.Module, state: State) -> float:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(np.rint(digits.images[4::5] * (255 / 16)), dtype=torch.float32)[:, None]
    net.load_state_dict(state)
    with torch.no_grad():
        right = net((images - 0.306 * 255) / (0.376 * 255)).argmax(1) == torch.tensor(digits.target[4::5])
    return float(right.float().mean())


def test_each_network_is_the_one_that_is_named(artifact: Path, measured: list[State]) -> None:
    found = sanity(artifact, repeats=3, values=[-1.5, 0.25])
    changes = [(one.change, one.value) for one in found.variations]
    assert changes == [
        ("as it is", None),
        *[("other seeds", seed) for seed in (1, 2, 3)],
        *[("mask shuffled", i) for i in range(3)],
        ("mask inverted", None),
        *[("all weights", value) for value in (-1.5, 0.25)],
    ]
    assert len(measured) == len(changes)
    chosen, net = stored_masks(artifact), load(artifact)
    weights = raw_digits(0)
    shuffles = []
    for (change, value), state in zip(changes, measured, strict=True):
        for key, mask in chosen.items():
            got = state[key]
            if change == "as it is":
                assert torch.equal(got, torch.where(mask, weights[key], 0.0))
            elif change == "other seeds":
                assert torch.equal(got, torch.where(mask, raw_digits(int(value or 0))[key], 0.0))
            elif change == "mask inverted":
                assert torch.equal(got, torch.where(mask, 0.0, weights[key]))
            elif change == "all weights":
                assert torch.equal(got, mask * torch.tensor(value))
            else:
                assert (got != 0).sum() == mask.sum()
                assert torch.equal(got[got != 0], weights[key][got != 0])
                overlap = ((got != 0) & mask).sum() / mask.sum()
                assert abs(float(overlap) - float(mask.float().mean())) < 0.15, "by lot"
        if change == "mask shuffled":
            shuffles.append(state)
    assert len({tuple((state["classifier.5.weight"] != 0).view(-1).tolist()) for state in shuffles}) == 3
    assert [one.accuracy for one in found.variations] == pytest.approx([accuracy(net, state) for state in measured])
    assert (found.images, found.data, found.chance) == (359, "digits", 0.1)


def test_a_mask_is_not_agnostic_to_the_weights(artifact: Path) -> None:
    found = sanity(artifact)
    assert found.variations[0].accuracy == evaluate(artifact).accuracy > 0.97
    assert len(found.variations) == 1 + 5 + 5 + 1 + 6
    assert all(one.accuracy < 0.4 for one in found.variations[1:])
    assert all(one.recalibrated is None for one in found.variations)
    assert "statistics" not in str(found)
    assert sanity(artifact) == found, "the same again"


@pytest.fixture(scope="module")
def normed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a network with BatchNorm, a few steps trained."""
    values = {
        "model": {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}},
        "surgery": {"k": 0.5, "scaled": False, "norm": "train"},
        "data": {"name": "folder", "root": str(images), "batch_size": 6, "workers": 0, "input_size": [3, 16, 16]},
        "training": {"epochs": 3, "lr": 0.1},
    }
    return train(values, output=tmp_path_factory.mktemp("normed") / "run").file


def inputs_of(net: nn.Module, part: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """What reaches `part`."""
    seen: list[Tensor] = []
    with part.register_forward_pre_hook(lambda _, x: seen.append(x[0])), torch.no_grad():
        for x in batches:
            net(x)
    return seen


def test_new_statistics_are_those_of_the_training_images(
    normed: Path, images: Path, measured: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCHES", 2)
    found = sanity(normed, data_dir=images, repeats=1, values=[0.5])
    assert len(measured) == 2 * len(found.variations) == 10
    stored = {key: tensor for key, tensor in load(normed).state_dict().items() if "running" in key}
    assert stored

    from popup_surgery.data.batches import quiet
    from popup_surgery.data.open import open_data
    from popup_surgery.experiment.evaluate import recorded_data

    data = recorded_data(normed).model_copy(update={"root": str(images)})
    batches = [x for x, *_ in open_data(data, (3, 16, 16), 0, torch.device("cpu"), quiet).train(0)][:2]
    for as_stored, anew, one in zip(measured[::2], measured[1::2], found.variations, strict=True):
        assert one.recalibrated is not None
        assert all(torch.equal(as_stored[key], tensor) for key, tensor in stored.items()), "put back each time"
        assert all(
            torch.equal(as_stored[key], anew[key]) for key in as_stored if key not in stored and "num_" not in key
        )
        net = load(normed)
        net.load_state_dict(anew)
        name, first = next((name, part) for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d))
        reached = inputs_of(net, first, batches)
        mean = torch.stack([x.mean((0, 2, 3)) for x in reached]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in reached]).mean(0)
        torch.testing.assert_close(anew[f"{name}.running_mean"], mean)
        torch.testing.assert_close(anew[f"{name}.running_var"], var)
    assert "with new statistics" in str(found)
    assert found.variations[0].accuracy == evaluate(normed, data_dir=images).accuracy


def test_rescaled_weights_stay_as_wide_under_other_seeds(images: Path, tmp_path: Path, measured: list[State]) -> None:
    net = build("popup_surgery/fc", width=0.05, in_chans=3, img_size=16, num_classes=3)
    convert(net, learner="supermask", learner_options={"rescale": True})
    section = {"name": "folder", "workers": 0}
    save(net, tmp_path / "net", provenance={"recipe": {"data": section}})
    sanity(tmp_path / "net", data_dir=images, repeats=1, values=[1])
    baked = bake(net).state_dict()
    assert all(torch.equal(measured[0][key], baked[key]) for key in baked)
    for key in baked:
        assert measured[1][key].abs().max() == baked[key].abs().max()
        assert not torch.equal(measured[1][key], baked[key])


def test_pretrained_weights_have_no_other_seeds(images: Path, tmp_path: Path, measured: list[State]) -> None:
    net = build("popup_surgery/fc", width=0.05, in_chans=3, img_size=16, num_classes=3)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    convert(net, 0.5, scheme="pretrained")
    provenance = {"recipe": {"data": {"name": "folder", "workers": 0}}}
    save(net, tmp_path / "net", provenance=provenance)
    found = sanity(tmp_path / "net", data_dir=images, base=tmp_path / "base.safetensors", repeats=2, values=[])
    assert [one.change for one in found.variations] == ["as it is", *["mask shuffled"] * 2, "mask inverted"]
    assert "other seeds: not measured, because the weights are pretrained and no seed draws them" in str(found)
    for key, mask in masks(net).items():
        assert torch.equal(measured[-1][key], torch.where(mask, 0.0, before[key]))


@pytest.mark.parametrize("repeats", [0, -1, 2.0, True])
def test_a_bad_number_of_repeats(artifact: Path, repeats: Any) -> None:
    with pytest.raises(ConversionError, match=rf"repeats is {repeats}; expected an integer from 1"):
        sanity(artifact, repeats=repeats)


# the command


def test_the_command_prints_the_table_and_draws_it(cli: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copy(artifact, tmp_path))
    drawn = tmp_path / "digits.sanity.png"
    done = cli("sanity", artifact, "--repeats", "2", "--value", "-1", "--value", "3")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines[:7]] == [
        "network", "as it is", "other seeds (2)", "mask shuffled (2)", "mask inverted", "all weights −1",
        "all weights 3",
    ]  # fmt: skip
    assert re.fullmatch(r"as it is +9\d\.\d\d %", lines[1])
    assert re.fullmatch(r"other seeds \(2\) +\d+\.\d\d ± \d+\.\d\d %", lines[2])
    table = drawn.with_suffix(".json")
    wrote = f"wrote {drawn} and {table}, which push puts into the model card"
    assert lines[7:] == ["359 validation images of digits; chance is 10.00 %", wrote]
    found = SanityTable.beside(artifact, popup_surgery.inspect(artifact).text()["manifest_sha256"])
    assert found is not None
    assert [row[0] for row in found.rows] == [re.split(r"  +", line)[0] for line in lines[:7]]
    assert found.notes == (lines[7],)
    assert SanityTable.beside(artifact, "of another artifact") is None
    with Image.open(drawn) as picture:
        assert picture.format == "PNG"
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (0x4C, 0x9C, 0xC9)).max(1) < 12).sum() > 7 * 30, "a dot for each network"
    again = cli("sanity", artifact)
    assert again.status == 2
    assert f"{drawn} exists already; pass --force" in again.err
    assert cli("sanity", artifact, "--repeats", "1", "--force").status == 0
    assert cli("sanity", artifact, "--repeats", "1", "-o", "other.png").status == 0


def test_a_network_with_norms_has_a_second_column(
    cli: Callable[..., Any], normed: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("sanity", normed, "--data-dir", images, "--repeats", "1")
    assert done.status == 0, done.err
    assert re.search(r"^network +accuracy +with new statistics$", done.out, re.M)
    assert len(re.findall(r"^\S.* %  +\d+\.\d\d %$", done.out, re.M)) == 10


def test_what_the_command_refuses(cli: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (("--repeats", "0"), "repeats"),
        (("--set", "data.name=folder"), "--data-dir"),
        (("--set", "data.batchsize=7"), "batch_size"),
        (("-o", "no/such/folder.png"), "no/such/folder.png"),
    ):
        done = cli("sanity", artifact, *arguments)
        assert done.status == 2
        assert says in done.err
        assert "Traceback" not in done.err
    assert not artifact.with_name("digits.sanity.png").exists()
    with pytest.raises(DataError, match="does not exist"):
        sanity(artifact, data=Data(name="folder"), data_dir=tmp_path / "nowhere")


def test_the_page_shows_what_the_command_prints(
    cli: Callable[..., Any], artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(artifact, tmp_path)
    page = (ROOT / "docs" / "sanity.md").read_text()
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    printed = cli("sanity", artifact.name).out
    assert re.sub(r"\d+\.\d+", "#", shown).split() == re.sub(r"\d+\.\d+", "#", printed).split()
