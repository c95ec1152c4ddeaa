"""Files whose masks are range-coded: the same network in fewer bits, and no memory for what no network confirms."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from artifact.hostile import File, Net, apply, attempt, both, masked, same, take_apart, top
from popup_surgery import (
    Artifact,
    ArtifactError,
    UnknownName,
    bake,
    convert,
    inspect,
    load,
    masks,
    overlap,
    repack,
    save,
    start_from,
    verify,
)
from popup_surgery.artifact import stored_masks
from popup_surgery.codecs import CODECS
from popup_surgery.codecs.bitpack import pack
from support import GOLDEN, golden_manifest

CODED = "range_coded"
GOLDEN_FILES = sorted(file.name for file in (GOLDEN / "artifacts").glob("*.popup.safetensors"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50), nn.Flatten(), nn.Linear(50, 40), nn.Linear(40, 3))


def converted() -> nn.Module:
    return convert(network(), {"*": 0.3, "3": 0.002, "4": 1.0}, seed=5)


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    path = tmp_path / "coded"
    save(converted(), path, encoding=CODED)
    return path


def test_golden_file() -> None:
    golden = json.loads((GOLDEN / "range_coded.json").read_text(encoding="utf-8"))["artifact"]
    manifest = golden_manifest(golden)
    assert manifest.requires == [CODED]


def test_every_reader_takes_it(coded: Path, tmp_path: Path) -> None:
    net = converted()
    plain = save(net, tmp_path / "plain")
    manifest = inspect(coded)
    assert manifest == replace(plain, masked=tuple(replace(entry, encoding=CODED) for entry in plain.masked))
    assert verify(coded, network())
    assert verify(coded), "the weights, without a network"
    state = load(coded, network()).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bake(net).state_dict().items())
    assert all(torch.equal(stored_masks(coded)[name], mask) for name, mask in masks(net).items())
    whole = Artifact.open(coded).network(network(), masked=False).state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in net.state_dict().items() if name in whole)
    again = convert(network(), {"*": 0.3, "3": 0.002, "4": 1.0}, seed=5)
    start_from(again, coded)
    save(again, tmp_path / "again", encoding=CODED)
    assert (tmp_path / "again").read_bytes() == coded.read_bytes()


def test_repacking_changes_no_bit_of_the_network(coded: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    save(converted(), plain, provenance={"of": "a test"}, probe=(1, 3, 3, 3))
    there, back = tmp_path / "there", tmp_path / "back"
    assert repack(plain, there, encoding=CODED) == inspect(there)
    assert repack(there, back, encoding="bitpack") == inspect(back) == inspect(plain)
    assert back.read_bytes() == plain.read_bytes()
    before, after = inspect(plain).text(), inspect(there).text()
    for text in (before, after):
        text["masked"] = [{key: value for key, value in entry.items() if key != "encoding"} for entry in text["masked"]]
    assert {key for key in before if before[key] != after[key]} == {"requires", "manifest_sha256"}
    assert verify(there, network())
    repack(there, there, encoding="bitpack")
    assert there.read_bytes() == plain.read_bytes(), "a file may be written over itself"


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_files_of_earlier_versions_are_repacked(name: str, tmp_path: Path) -> None:
    file, there, back = GOLDEN / "artifacts" / name, tmp_path / "there", tmp_path / "back"
    repack(file, there, encoding=CODED)
    assert inspect(there).masks_sha256 == inspect(file).masks_sha256
    assert Artifact.open(there).mask_bits <= limit(there)  # type: ignore[operator]
    repack(there, back, encoding="bitpack")
    assert back.read_bytes() == file.read_bytes()


def limit(path: Path) -> float:
    """The bits that all masks of a file may take."""

    def ways(n: int, kept: int) -> float:
        return (math.lgamma(n + 1) - math.lgamma(kept + 1) - math.lgamma(n - kept + 1)) / math.log(2)

    entries = inspect(path).masked
    return 1.001 * sum(ways(e.numel, e.kept or 0) for e in entries) + 64 * 8 * len(entries)


def test_what_cannot_be_repacked_leaves_the_old_file(coded: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_bytes(b"old")
    with pytest.raises(UnknownName, match="unknown encoding 'zip'; expected one of bitpack, range_coded"):
        repack(coded, output, encoding="zip")
    damaged = bytearray(coded.read_bytes())
    damaged[-1] ^= 1
    coded.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=f"^{coded}: "):
        repack(coded, output, encoding="bitpack")
    assert output.read_bytes() == b"old"


def test_an_artifact_in_memory_is_one_of_other_masks(coded: Path, tmp_path: Path) -> None:
    opened = Artifact.open(coded)
    other = {name: pack(~mask.numpy()) for name, mask in opened.masks().items()}
    made = Artifact.of(opened.manifest, other, opened.contents.stored, "the rest")
    assert (made.path, made.mask_bits) == ("the rest", None)
    assert [e.kept for e in made.manifest.masked] == [e.numel - (e.kept or 0) for e in opened.manifest.masked]
    manifest = made.write(tmp_path / "made")
    assert {entry.encoding for entry in manifest.masked} == {CODED}, "as it was"
    assert all(torch.equal(stored_masks(tmp_path / "made")[name], ~mask) for name, mask in opened.masks().items())
    given = made.network(network()).state_dict()
    assert all(
        torch.equal(tensor, given[name]) for name, tensor in load(tmp_path / "made", network()).state_dict().items()
    )


@pytest.mark.slow
def test_resnet101_takes_less_than_five_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "resnet101"
    save(convert("timm/resnet101", 0.3), path, encoding=CODED)
    assert path.stat().st_size <= 4.99e6
    bits = Artifact.open(path).mask_bits
    assert bits is not None
    assert bits <= limit(path)


# --- files that somebody else made -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "original"
    save(convert(Net(), exclude="kept", seed=3, k={"*": 0.5, "last": 1.0}), path, encoding=CODED)
    return take_apart(path.read_bytes())


def empty_of(shape: list[int], kept: int) -> Callable[[File], object]:
    """The second mask, which has no bytes, is for this shape."""
    return masked(1, shape=shape, kept=kept)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> Any:
        raise AssertionError("a mask was decoded")

    monkeypatch.setitem(CODECS, CODED, replace(CODECS[CODED], decode=decode))


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**33 + 1], [2**62, 2**62], [10**31] * 64])
def test_masks_of_no_bytes_for_huge_shapes_take_no_memory(
    shape: list[int], no_decoding: None, file: File, tmp_path: Path
) -> None:
    for kept in (0, math.prod(shape)):
        if len(str(kept)) > 32:
            continue
        data = apply(file, empty_of(shape, kept), digest=False)
        tried = attempt(tmp_path / "f", data)
        assert not isinstance(tried.inspected, ArtifactError), "the header is right"
        assert tried.refused_by_network
        path = tmp_path / "f"
        says = f"^{path}: the masks and planes have more than 8,589,934,592 bits, and no network is at hand to comp.*$"
        assert re.search(says, str(tried.verified))
        for read in (
            stored_masks, verify, lambda p: repack(p, tmp_path / "output", encoding="bitpack"), lambda p: overlap(p, p)
        ):  # fmt: skip
            with pytest.raises(ArtifactError, match=says):
                read(path)
        assert not (tmp_path / "output").exists()


def test_masks_are_decoded_only_for_a_network_of_their_shapes(no_decoding: None, coded: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50), nn.Flatten(), nn.Linear(50, 40), nn.Linear(40, 4))
    with pytest.raises(ArtifactError, match=r"'4.weight': the file's tensor is for \(3, 40\), the network has"):
        load(coded, other)
    with pytest.raises(AssertionError, match="a mask was decoded"):
        load(coded, network())


def test_a_network_that_large_confirms_its_masks(file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popup_surgery.artifact.reader.LIMIT", 10)
    (tmp_path / "f").write_bytes(file.bytes())
    assert load(tmp_path / "f", Net())
    assert verify(tmp_path / "f", Net())
    with pytest.raises(ArtifactError, match="the masks and planes have more than 10 bits"):
        verify(tmp_path / "f")


WRONG: dict[str, Callable[[File], object]] = {
    "requires nothing": top(requires=[]),
    "requires it twice": top(requires=[CODED, CODED]),
    "requires more": top(requires=[CODED, "more"]),
    "requires what no mask has": both(masked(0, encoding="bitpack"), masked(1, encoding="bitpack")),
    "bytes for no weight": lambda file: file.tensors.update({"last.weight.mask": ("U8", [4], b"\0\0\0\0")}),
    "no bytes": lambda file: file.tensors.update({"first.weight.mask": ("U8", [0], b"")}),
    "a byte more": lambda file: file.tensors.update({"first.weight.mask": ("U8", [9], b"\1" * 9)}),
    "a thousand words": lambda file: file.tensors.update({"first.weight.mask": ("U8", [4000], b"\1" * 4000)}),
    "more weights than bytes": masked(0, shape=[2**20, 2**20], kept=2**39),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", apply(file, WRONG[name], digest=False)).refused_at_once


def test_the_message_says_what_requires_must_be(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", apply(file, top(requires=[]), digest=False))
    assert str(tried.loaded).endswith(r"requires is []; expected ['range_coded'], as the encodings and planes say")


SEEDS, FILES = range(12), 200


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) if seed else seed for seed in SEEDS])
def test_masks_that_were_damaged(seed: int, tmp_path: Path) -> None:
    """2,400 files in all. Each mask is damaged, and `kept` may fit it: the file is refused, or is another whole one."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    k = float(rng.choice([0.5, 0.3, 0.01, 0.97, 0.995, 0.1]))
    path, target = tmp_path / "f", lambda: nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 2))
    save(convert(target(), k, seed=seed), path, encoding=CODED)
    whole, state = take_apart(path.read_bytes()), load(path, target()).state_dict()
    refused = 0
    for index in range(FILES):
        file = whole.copy()
        entry = file.manifest["masked"][index % 2]
        name = f"{entry['name']}.mask"
        data = bytearray(file.tensors[name][2])
        how = int(rng.integers(6))
        if how == 0 and data:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data = data[: rng.integers(len(data) + 1)]
        elif how == 2:
            data += bytes(4 * int(rng.integers(1, 4)))
        elif how == 3 and data:
            data[:] = rng.bytes(len(data))
        elif how == 4:
            entry["kept"] = max(0, min(math.prod(entry["shape"]), entry["kept"] + int(rng.integers(-2, 3))))
        else:
            data[-4:] = rng.bytes(4)
        file.tensors[name] = "U8", [len(data)], bytes(data)
        unchanged = file.manifest == whole.manifest and file.tensors == whole.tensors
        if rng.integers(2):  # with digests that fit, where the bytes are a mask's
            decodable(file)
        tried = attempt(path, file.bytes(), target, label=(seed, index, how))
        if isinstance(tried.loaded, ArtifactError):
            refused += 1
            assert isinstance(tried.verified, ArtifactError), (seed, index, how)
        elif unchanged:
            assert same(tried.loaded, state)
        else:  # another mask, written as it must be
            repack(path, tmp_path / "again", encoding=CODED)
            assert take_apart((tmp_path / "again").read_bytes()).tensors == file.tensors, (seed, index, how)
    assert refused > FILES / 3


def decodable(file: File) -> None:
    """Make `kept` and `masks_sha256` fit the masks, if all of them are masks."""
    digest = hashlib.sha256()
    for entry in file.manifest["masked"]:
        data = np.frombuffer(file.tensors[f"{entry['name']}.mask"][2], np.uint8)
        try:
            digest.update(CODECS[CODED].to_bits(data, tuple(entry["shape"]), entry["kept"]).tobytes())
        except ValueError:
            return
    file.manifest["masks_sha256"] = digest.hexdigest()
