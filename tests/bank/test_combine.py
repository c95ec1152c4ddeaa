"""Masks of several files combined into one: bit by bit, and a file like any other."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bank.conftest import Make
from popup_surgery import (
    Artifact,
    ArtifactError,
    ConversionError,
    MaskBank,
    UnknownName,
    combine,
    convert,
    inspect,
    load,
    masks,
    save,
    verify,
)  # fmt: skip
from support import Outcome, equal_states

Cli = Callable[..., Outcome]

RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "union": lambda kept: kept.any(0),
    "intersection": lambda kept: kept.all(0),
    "majority": lambda kept: 2 * kept.sum(0) > len(kept),
}


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_masks_of_several_files(how: str, count: int, make: Make, tmp_path: Path) -> None:
    files = [make(name) for name in ("ants", "bees", "cows", "dogs")[:count]]
    combined = combine(files, how)
    found = [masks(file) for file in files]
    for name, mask in combined.masks().items():
        assert torch.equal(mask, RULES[how](torch.stack([each[name] for each in found])))
    manifest = combined.write(tmp_path / "combined")
    assert all(verify(tmp_path / "combined").checks[i][1] for i in range(3))
    for entry in manifest.masked:
        assert entry.kept == int(combined.masks()[entry.name].sum())
        assert entry.note["k"] == entry.kept / entry.numel
    network, first = load(tmp_path / "combined"), load(files[0])
    assert equal_states(network, combined.network())
    base = Artifact.open(files[0]).network(masked=False).state_dict()
    for name, tensor in network.state_dict().items():
        kept = combined.masks()
        assert torch.equal(tensor, base[name] * kept[name] if name in kept else first.state_dict()[name])


def test_what_a_combined_file_says(make: Make, tmp_path: Path) -> None:
    model = convert("timm/test_resnet", 0.5, seed=3)
    recipe = {"data": {"name": "digits"}, "surgery": {"k": 0.5}}
    for i in range(2):
        save(
            model,
            tmp_path / f"{i}",
            provenance={"accuracy": 0.5, "classes": ["a"], "recipe": recipe},
            probe=(1, 3, 32, 32),
        )
    manifest = combine([tmp_path / "0", tmp_path / "1"], "union").write(tmp_path / "both")
    assert manifest.provenance.keys() == {"combined", "classes", "recipe"}
    assert manifest.provenance["recipe"] == {"data": {"name": "digits"}}
    assert manifest.probe is None
    digest = inspect(tmp_path / "0").masks_sha256
    of = [{"file": f"{i}", "masks_sha256": digest, "kept": pytest.approx(0.5, abs=1e-3)} for i in range(2)]
    assert manifest.provenance["combined"] == {"how": "union", "of": of}
    again = combine([tmp_path / "both", tmp_path / "0"], "intersection")
    assert again.manifest.masks_sha256 == digest
    bank = MaskBank(again)
    bank.add("combined", again)
    assert equal_states(bank.use("combined"), load(tmp_path / "0"))


def test_coded_masks_stay_coded(make: Make, tmp_path: Path) -> None:
    files = [make(name, k=0.03, encoding="range_coded", seed=8) for name in "ab"]
    manifest = combine(files, "union").write(tmp_path / "both")
    assert {entry.encoding for entry in manifest.masked} == {"range_coded"}
    combine(files, "union").write(tmp_path / "packed", "bitpack")
    assert equal_states(load(tmp_path / "both"), load(tmp_path / "packed"))


def test_pretrained_weights(make: Make, weights: Path, tmp_path: Path) -> None:
    files = [make(name, pretrained=True, seed=4) for name in ("ants", "bees")]
    with pytest.raises(ArtifactError, match=r"ants.popup.safetensors: .* pass the network or the file that holds them"):
        combine(files, "union")
    combine(files, "union", base=weights).write(tmp_path / "both")
    assert verify(tmp_path / "both", base=weights)
    other = [files[0], make("cows", pretrained=True, seed=5)]
    with pytest.raises(ArtifactError, match=r"cows.* 'fc.weight' is drawn from seed 5; in .*ants.* from seed 4"):
        combine(other, "union", base=weights)


def test_other_tensors_are_those_of_the_first(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    files = [make("ants"), make("bees")]
    combined = combine(files, "intersection").network()
    name = "bn1.running_mean"
    assert torch.equal(combined.state_dict()[name], load(files[0]).state_dict()[name])
    assert re.search(
        r"norms, statistics and other tensors .* are those of .*ants.*; those of '.*bees.*' differ", caplog.text
    )
    caplog.clear()
    combine([files[0], files[0]], "union")
    assert not caplog.text


def test_what_cannot_be_combined(make: Make, weights: Path, tmp_path: Path) -> None:
    first = make("ants")
    refused: dict[Path, str] = {
        make("seed", seed=4): "its weights are drawn from seed 4; those of .* are drawn from seed 3",
        make(
            "scheme", scheme="kaiming_normal"
        ): "the distribution of 'conv1.0.weight' is normal; in .* signed_constant",
        make("std", k=0.3): r"the std of 'conv1.0.weight' is .*, because the files have other k and scaled weights",
        make("head", classes=7): r"the shape of 'fc.weight' is \(7, 96\); in .* it is \(10, 96\)",
        make("network", network="timm/test_efficientnet"): "its network is timm/test_efficientnet; that of .* is timm/",
        make("kind", pretrained=True): "its weights are those of timm/test_resnet; those of .* are drawn from seed 3",
        make("part", exclude="fc"): "'fc.weight' is not masked; in .* it is masked",
    }
    for file, says in refused.items():
        with pytest.raises(ArtifactError, match=f"{file.name}: {says}"):
            combine([first, file], "union")
    with pytest.raises(UnknownName, match="unknown how 'both'; the nearest known: intersection, majority, union"):
        combine([first, first], "both")
    sources: Any
    for sources in ([first], [], first, str(first)):
        with pytest.raises(ConversionError, match="a list of two files or more"):
            combine(sources, "union")
    with pytest.raises(ArtifactError, match="leave out `base`"):
        combine([first, first], "union", base=weights)
    (tmp_path / "bad").write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bad: "):
        combine([first, tmp_path / "bad"], "union")


def test_a_layer_that_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(2):
        model = convert(nn.Sequential(nn.Linear(8, 2, bias=False)), 0.5, seed=1, scaled=False)
        with torch.no_grad():
            score = model.get_parameter("0.weight_score")
            score.copy_(torch.eye(2)[i][:, None].expand(2, 8))
        save(model, tmp_path / f"{i}")
    combined = combine([tmp_path / "0", tmp_path / "1"], "intersection")
    assert combined.manifest.kept == 0
    assert "the intersection keeps no weight of '0.weight'" in caplog.text
    combined.write(tmp_path / "none")
    assert not load(tmp_path / "none", nn.Sequential(nn.Linear(8, 2, bias=False)))(torch.ones(1, 8)).any()


def test_the_command(make: Make, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = make("ants"), make("bees")
    done = cli("combine", a, b, "--how", "majority", "-o", "both.popup.safetensors")
    kept = inspect("both.popup.safetensors").kept
    assert done.status == 0
    assert f"majority of 2 masks: 371,568 weights, {kept:,} kept" in done.out
    assert "wrote both.popup.safetensors" in done.out
    assert cli("combine", a, b, "--how", "union", "-o", "both.popup.safetensors").status == 2
    assert inspect("both.popup.safetensors").kept == kept
    failed = cli("combine", a, make("seed", seed=4), "--how", "union", "-o", "none.popup.safetensors")
    assert (failed.status, failed.err.count("\n")) == (2, 1)
    assert "its weights are drawn from seed 4" in failed.err
    assert cli("combine", a, "--how", "union", "-o", "none.popup.safetensors").status == 2
    assert not Path("none.popup.safetensors").exists()
