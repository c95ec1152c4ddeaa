"""Files of networks with a pattern such as 2:4: in every encoding, for every reader, and from strangers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from artifact.hostile import File, Net, apply, attempt, masked, take_apart, top
from masking.layers import with_scores
from popup_surgery import (
    Artifact,
    ArtifactError,
    MaskBank,
    Recipe,
    RecipeError,
    bake,
    build,
    combine,
    convert,
    export,
    inspect,
    load,
    masks,
    model_card,
    overlap,
    repack,
    save,
    start_from,
    verify,
)
from popup_surgery.artifact import stored_masks
from popup_surgery.codecs import CODECS
from support import GOLDEN, Outcome, equal_states, golden_manifest

CODED = "pattern_coded"
ENCODINGS = ["bitpack", "range_coded", CODED]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, groups=24), nn.Flatten(), nn.Linear(24, 10)
    return nn.Sequential(*layers)


def converted(seed: int = 0) -> Any:
    """The same weights under masks of this seed."""
    return with_scores(convert(network(), pattern="2:4", seed=5), seed)


@pytest.fixture(params=ENCODINGS)
def coded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.popup.safetensors"
    save(converted(), path, encoding=request.param)
    return path


def test_golden_file() -> None:
    golden = json.loads((GOLDEN / "pattern_coded.json").read_text(encoding="utf-8"))["artifact"]
    manifest = golden_manifest(golden)
    assert manifest.requires == [CODED]
    assert {str(entry.pattern) for entry in manifest.masked} == {"2:4"}


def test_every_reader_takes_it(coded: Path, tmp_path: Path) -> None:
    net = converted()
    plain = bake(net).eval()
    manifest, encoding = inspect(coded), coded.name.split(".")[0]
    assert manifest.requires == ([] if encoding == "bitpack" else [encoding]), "an older reader takes bits as they are"
    assert [str(entry.pattern) for entry in manifest.masked] == ["2:4"] * 3
    assert [(e.pattern.channels, e.pattern.stride) for e in manifest.masked if e.pattern] == [(3, 9), (1, 9), (24, 1)]
    assert verify(coded, network())
    assert verify(coded)
    assert equal_states(load(coded, network()), plain)
    assert all(torch.equal(stored_masks(coded)[name], mask) for name, mask in masks(net).items())
    assert all(each.kept_both == each.kept_a == each.kept_b for each in overlap(coded, coded).layers)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(load(coded, network(), packed=True)(x), load(coded, network())(x))
    again = convert(network(), pattern="2:4", seed=5)
    start_from(again, coded)
    save(again, tmp_path / "again", encoding=encoding)
    assert (tmp_path / "again").read_bytes() == coded.read_bytes()
    bank = MaskBank(coded, model=network())
    bank.add("task", coded)
    assert equal_states(bank.use("task"), load(coded, network()))


def test_repacking_changes_no_bit_of_the_network(tmp_path: Path) -> None:
    first = tmp_path / "bitpack"
    save(converted(), first, provenance={"of": "a test"})
    for one in ENCODINGS:
        repack(first, tmp_path / one, encoding=one)
        for other in ENCODINGS:
            repack(tmp_path / one, tmp_path / "there", encoding=other)
            repack(tmp_path / "there", tmp_path / "back", encoding="bitpack")
            assert (tmp_path / "back").read_bytes() == first.read_bytes()
    sizes = {each: Artifact.open(tmp_path / each).mask_bits or 0 for each in ENCODINGS}
    limit = sum(entry.pattern.bits(entry.numel) for entry in inspect(first).masked if entry.pattern)
    assert sizes[CODED] <= 1.001 * limit + 64 * 8 * 3
    assert sizes[CODED] < sizes["range_coded"] < sizes["bitpack"]


@pytest.mark.slow
def test_a_resnet_at_two_of_four(tmp_path: Path) -> None:
    manifest = save(convert("timm/resnet18", pattern="2:4"), tmp_path / "net", encoding=CODED)
    bits = Artifact.open(tmp_path / "net").mask_bits or 0
    limit = sum(entry.pattern.bits(entry.numel) for entry in manifest.masked if entry.pattern)
    assert bits <= 1.001 * limit + 64 * 8 * len(manifest.masked)
    assert bits / manifest.weights < 0.648
    assert verify(tmp_path / "net")


def test_a_combination_drops_a_pattern_that_it_does_not_obey(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    files = [tmp_path / str(seed) for seed in range(3)]
    for seed, file in enumerate(files):
        save(converted(seed), file, encoding=CODED)
    union = combine(files[:2], "union")
    manifest = union.write(tmp_path / "union")
    assert [entry.pattern is None for entry in manifest.masked] == [True, False, True], (
        "all of a depthwise layer is kept"
    )
    assert [entry.encoding for entry in manifest.masked] == ["range_coded", CODED, "range_coded"]
    assert manifest.requires == ["range_coded", CODED]
    assert "of neighbours in 1 of 3 layers, " in cli("inspect", tmp_path / "union").out
    expected = {key: mask | stored_masks(files[1])[key] for key, mask in stored_masks(files[0]).items()}
    assert all(torch.equal(mask, expected[key]) for key, mask in stored_masks(tmp_path / "union").items())
    same = combine([files[0], files[0]], "intersection").write(tmp_path / "same")
    assert [(e.pattern, e.encoding) for e in same.masked] == [(e.pattern, CODED) for e in inspect(files[0]).masked]


def test_an_encoding_of_patterns_needs_one(tmp_path: Path) -> None:
    says = (
        r"the encoding pattern_coded is for masks of a pattern such as 2:4, and '0.weight' has none; expected bitpack"
    )
    path = tmp_path / "net"
    with pytest.raises(ArtifactError, match=says):
        save(convert(network(), 0.5), path, encoding=CODED)
    save(convert(network(), 0.5), path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=says):
        repack(path, path, encoding=CODED)
    assert path.read_bytes() == before
    with pytest.raises(
        RecipeError, match=r"surgery\.encoding is 'pattern_coded'; expected bitpack or range_coded, or a"
    ):
        Recipe.load(GOLDEN / "tiny.yaml", ["surgery.encoding=pattern_coded"])
    made = Recipe.load(GOLDEN / "tiny.yaml", ["surgery.encoding=pattern_coded", "surgery.pattern=2:4"])
    assert made.surgery.encoding == CODED  # type: ignore[union-attr]


# --- files that somebody else made -----------------------------------------------------------------------------------


@pytest.fixture(params=["bitpack", CODED])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    path = tmp_path / "original"
    save(convert(Net(), exclude="kept", seed=3, pattern="2:4"), path, encoding=request.param)
    return take_apart(path.read_bytes())


def pattern(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["masked"][0]["pattern"].update(change)


WRONG: dict[str, Callable[[File], object]] = {
    "more than all": pattern(keep=5),
    "as many as all": pattern(keep=4),
    "none": pattern(keep=0),
    "others kept": pattern(keep=1),
    "too many neighbours": pattern(of=17),
    "a negative number": pattern(of=-4, keep=-2),
    "no channels": pattern(channels=0),
    "channels that do not divide": pattern(channels=3),
    "a far stride": pattern(channels=1, stride=2**21),
    "a huge number": pattern(channels=10**30),
    "a float": pattern(keep=2.0),
    "true": pattern(keep=True),
    "text": pattern(keep="2"),
    "nothing": pattern(keep=None),
    "a list": masked(0, pattern=[2, 4, 4, 1]),
    "a word": masked(0, pattern="2:4"),
    "null": masked(0, pattern=None),
    "empty": masked(0, pattern={}),
    "another number kept": masked(0, kept=9),
    "requires more": top(requires=[CODED, "more"]),
    "bytes that are too many": lambda file: file.tensors.update({"first.weight.mask": ("U8", [4000], b"\1" * 4000)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", apply(file, WRONG[name], digest=False)).refused_at_once


@pytest.mark.parametrize("file", [CODED], indirect=True)
@pytest.mark.parametrize("change", [
    top(requires=[]), top(requires=["range_coded"]), top(requires=[CODED, CODED]), masked(0, encoding="pattern"),
    lambda file: file.manifest["masked"][0].pop("pattern"),
    lambda file: file.tensors.update({"first.weight.mask": ("U8", [0], b"")}),
    lambda file: file.tensors.update({"first.weight.mask": ("U8", [3], b"\1\1\1")}),
])  # fmt: skip
def test_what_says_that_it_is_coded_and_is_not(change: Any, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", apply(file, change, digest=False)).refused_at_once


@pytest.mark.parametrize("file", ["bitpack"], indirect=True)
def test_bits_that_are_not_of_their_pattern_are_refused(file: File, tmp_path: Path) -> None:
    kind, shape, bits = file.tensors["first.weight.mask"]
    file.tensors["first.weight.mask"] = kind, shape, bytes([0b00010111, *bits[1:]])
    tried = attempt(tmp_path / "f", apply(file, lambda file: file.digest()))
    assert tried.refused_with_data
    assert str(tried.loaded).endswith("'first.weight.mask' does not keep 2:4 of its neighbours, as its pattern says")


@pytest.mark.parametrize("file", [CODED], indirect=True)
def test_damaged_masks_are_refused(file: File, tmp_path: Path) -> None:
    for name in ("first.weight.mask", "last.weight.mask"):
        for place in range(len(file.tensors[name][2])):
            damaged = file.copy()
            kind, shape, data = damaged.tensors[name]
            changed = bytearray(data)
            changed[place] ^= 1
            damaged.tensors[name] = kind, shape, bytes(changed)
            assert attempt(tmp_path / "f", damaged.bytes()).refused_with_data


@pytest.mark.parametrize("file", [CODED], indirect=True)
@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**62, 2**62], [10**31] * 64])
def test_masks_of_no_bytes_for_huge_shapes_take_no_memory(
    shape: list[int], file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remainder of one is kept: such a mask has no bytes."""

    def decode(*_: Any) -> Any:
        raise AssertionError("a mask was decoded")

    monkeypatch.setitem(CODECS, CODED, replace(CODECS[CODED], decode=decode))
    if len(str(math.prod(shape))) > 32:
        return
    alone = {"keep": 2, "of": 4, "channels": 1, "stride": 1}
    data = apply(file, masked(1, shape=shape, kept=math.prod(shape), pattern=alone), digest=False)
    taken = take_apart(data)
    taken.tensors["last.weight.mask"] = "U8", [0], b""
    tried = attempt(tmp_path / "f", taken.bytes())
    assert not isinstance(tried.inspected, ArtifactError), "the header is right"
    assert tried.refused_by_network
    assert "the masks and planes have more than 8,589,934,592 bits" in str(tried.verified)


# --- together with other kinds ---------------------------------------------------------------------------------------


def test_signs_beside_a_pattern(tmp_path: Path) -> None:
    net = convert(network(), pattern="2:4", learner="signed", seed=5)
    manifest = save(net, tmp_path / "net", encoding=CODED)
    assert manifest.requires == [CODED, "sign"]
    assert equal_states(load(tmp_path / "net", network()), bake(net))
    assert verify(tmp_path / "net", network())


@pytest.mark.slow
def test_the_golden_file_in_other_formats(tmp_path: Path) -> None:
    path = GOLDEN / "pattern_coded.popup.safetensors"
    export(path, tmp_path / "dense.safetensors")
    dense = build("popup_surgery/conv2", pretrained=tmp_path / "dense.safetensors", width=0.25, in_chans=3, img_size=8)
    assert equal_states(dense, load(path))
    done = export(path, tmp_path / "net.onnx", packed=True)
    assert all(layer.how.endswith("too small to gain") for layer in done.layers)  # and not "not ternary"


def test_what_people_read_says_the_pattern(tmp_path: Path) -> None:
    save(converted(), tmp_path / "net.popup.safetensors")
    assert "| pattern | 2:4 of neighbours along the input channels |" in model_card(tmp_path / "net.popup.safetensors")
