"""Planes at the entropy limit: the same network in fewer bytes, and no memory for what no network confirms."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import popup_surgery as ps
from artifact.hostile import File, attempt, drop, masked, same, take_apart, tensor
from docs.test_docs import reader
from popup_surgery import Artifact, ArtifactError
from popup_surgery.artifact.manifest import TensorSpec
from popup_surgery.artifact.mask_bytes import decode_planes, encode_planes, plane_sizes, recoded
from popup_surgery.artifact.planes import PLANES, Bits
from popup_surgery.codecs import CODECS
from popup_surgery.codecs.bitpack import ones, pack
from support import GOLDEN, golden_manifest, state_digest

FILE = GOLDEN / "coded_planes.popup.safetensors"
GOLDEN_JSON = json.loads((GOLDEN / "coded_planes.json").read_text(encoding="utf-8"))
SHARES = [0.3, 0.08, 0.03]


# --- the vectors and the file of the format's page --------------------------------------------------------------------


def test_the_golden_file(tmp_path: Path) -> None:
    golden = GOLDEN_JSON["artifact"]
    manifest = golden_manifest(golden)
    assert manifest.requires == golden["requires"] == ["range_coded", "coded_planes", "coat2", "coat3"]
    coded = [entry.name for entry in manifest.masked if entry.plane_ones]
    assert coded == ["classifier.1.weight"], "the others are too small"
    page = {name: torch.from_numpy(np.asarray(array)) for name, array in reader(6)["read"](FILE).items()}
    assert state_digest(page) == golden["state_dict_sha256"], "the page's reader"
    with pytest.raises(ValueError, match="needs a newer reader"):
        reader(5)["read"](FILE)
    ps.repack(FILE, tmp_path / "again", encoding="range_coded")
    assert (tmp_path / "again").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize("vector", GOLDEN_JSON["vectors"])
def test_vectors(vector: dict[str, Any]) -> None:
    bits, coded = ({k: np.frombuffer(bytes.fromhex(v), np.uint8) for k, v in vector[of].items()} for of in BOTH)
    entry = entry_of(vector["kept"], bits)
    assert list(entry.plane_ones) == vector["plane_ones"]
    assert {kind: data.tobytes() for kind, data in encode_planes(entry, bits).items()} == {
        kind: data.tobytes() for kind, data in coded.items()
    }
    of_page, about = reader(6)["UNPACK"]["coded_planes"], vector["kept"]
    for kind, plane in decode_planes(entry, coded).items():
        assert plane.tobytes() == bits[kind].tobytes()
        assert of_page(coded[kind], about, (entry.text(), kind)).tobytes() == plane.tobytes()
        about = about if kind == "sign" else ones(plane)


BOTH = ("planes", "coded")


def entry_of(kept: int, planes: dict[str, Any], encoding: str = "range_coded") -> TensorSpec:
    """The entry of a weight whose planes are coded."""
    plane_ones = tuple(ones(plane) for plane in planes.values())
    return TensorSpec(
        "w",
        "w",
        (kept + 9,),
        "F32",
        "normal",
        1.0,
        kept,
        planes=tuple(planes),
        plane_ones=plane_ones,
        encoding=encoding,
    )


def some_planes(kept: int, shares: dict[str, float], seed: int = 0) -> dict[str, Any]:
    rng, about, found = np.random.default_rng(seed), kept, {}
    for kind, share in shares.items():
        bits = rng.permutation(np.arange(about) < round(share * about))
        found[kind] = pack(bits)
        about = about if kind == "sign" else int(bits.sum())
    return found


# --- what is coded, and what it takes ---------------------------------------------------------------------------------


def limit(n: int, found: int) -> float:
    """The bytes that choose which `found` of n bits are 1."""
    return (math.lgamma(n + 1) - math.lgamma(found + 1) - math.lgamma(n - found + 1)) / math.log(2) / 8


@given(
    st.integers(0, 5000), st.booleans(), st.lists(st.sampled_from([0, 0.003, 0.1, 0.4, 0.5, 0.9, 1]), max_size=7),
    st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_planes_are_what_they_were(kept: int, signs: bool, shares: list[float], seed: int) -> None:
    kinds = ["sign"] * signs + [f"coat{i}" for i in range(2, len(shares) + 2)]
    bits = some_planes(kept, dict(zip(kinds, [0.5] * signs + shares, strict=True)), seed)
    entry = entry_of(kept, bits)
    coded = encode_planes(entry, bits)
    assert all(len(coded[kind]) in plane_sizes(entry, kind) for kind in kinds)
    found = decode_planes(entry, coded)
    assert {kind: plane.tobytes() for kind, plane in found.items()} == {k: plane.tobytes() for k, plane in bits.items()}
    assert not Bits(np.empty(0, np.uint8), found).wrong("w", kept)
    about = kept
    for kind, plane in bits.items():
        assert len(coded[kind]) <= 1.001 * limit(about, ones(plane)) + 64
        about = about if kind == "sign" else ones(plane)


@pytest.mark.parametrize(
    ("kept", "shares", "expected"),
    [
        (4000, {"coat2": 0.27, "coat3": 0.38}, True),
        (400, {"coat2": 0.27, "coat3": 0.38}, False),
        (400, {"coat2": 0.02}, True),
        (40000, {"sign": 0.5}, False),
        (40000, {"sign": 0.4}, True),
        (40000, {"sign": 0.5, "coat2": 0.27}, True),
        (0, {"sign": 0.5}, False),
    ],
)
def test_planes_are_coded_where_that_saves_bytes(kept: int, shares: dict[str, float], expected: bool) -> None:
    planes = some_planes(kept, shares)
    entry = entry_of(kept, planes)
    for encoding in ("range_coded", "pattern_coded"):
        found = recoded(entry, encoding, planes)
        assert bool(found.plane_ones) == expected
        assert found.encoding == encoding
    assert not recoded(entry, "bitpack", planes).plane_ones


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 3))


def coated(**arguments: Any) -> nn.Module:
    return ps.convert(network(), SHARES[0], seed=3, learner_options={"coats": SHARES}, **arguments)


def test_coats_are_at_the_entropy_limit(tmp_path: Path) -> None:
    ps.save(coated(), tmp_path / "bits")
    manifest = ps.repack(tmp_path / "bits", tmp_path / "coded", encoding="range_coded")
    large, small = manifest.masked
    assert (large.plane_ones, small.plane_ones) == ((4800, 1800), ())
    before, after = (Artifact.open(tmp_path / name).sizes for name in ("bits", "coded"))
    assert before is not None
    assert after is not None
    of_small = 23 + 6  # bytes: coat 2 has a bit for each of 180 weights, and coat 3 for each of 48
    least = limit(18000, 4800) + limit(4800, 1800) + of_small
    assert least < after.planes < 1.001 * least + 16
    assert after.planes < 0.88 * before.planes
    assert after.total < before.total
    text, other = (ps.inspect(tmp_path / name).text() for name in ("bits", "coded"))
    for each in (text, other):
        for entry in each["masked"]:
            entry.pop("encoding")
            entry.pop("plane_ones", None)
    assert {key for key in text if text[key] != other[key]} == {"requires", "tensors_sha256", "manifest_sha256"}


def test_generations_stay_as_they_are_beside_coded_coats(tmp_path: Path) -> None:
    net = coated(scheme="kaiming_normal")
    for step in range(1, 3):
        ps.redraw(net, step, every=1, share=0.5)
        for name, parameter in net.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(step)))
    ps.save(net, tmp_path / "bits")
    manifest = ps.save(net, tmp_path / "coded", encoding="range_coded")
    assert manifest.requires == ["range_coded", "coded_planes", "generation", "coat2", "coat3"]
    files = [take_apart((tmp_path / name).read_bytes()).tensors for name in ("bits", "coded")]
    assert files[0]["0.weight.generation"] == files[1]["0.weight.generation"]
    assert files[0]["0.weight.coat2"] != files[1]["0.weight.coat2"]
    found, page = ps.load(tmp_path / "coded", network()).state_dict(), reader(6)["read"](tmp_path / "coded")
    for name, value in ps.bake(net).state_dict().items():
        assert torch.equal(found[name], value)
        assert page[name].tobytes() == value.numpy().tobytes()


def test_files_of_coded_masks_and_planes_of_bits_are_read_and_repacked(tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    net, (bits, coded, earlier, again) = coated(), (tmp_path / name for name in ("bits", "coded", "earlier", "again"))
    ps.save(net, bits)
    ps.save(net, coded, encoding="range_coded")
    file, planes = take_apart(coded.read_bytes()), take_apart(bits.read_bytes())
    for entry in file.manifest["masked"]:
        entry.pop("plane_ones", None)
        for kind in entry["planes"]:
            name = f"{entry['name']}.{kind}"
            file.tensors[name] = planes.tensors[name]
    file.manifest |= {
        "tensors_sha256": planes.manifest["tensors_sha256"],
        "requires": ["range_coded", "coat2", "coat3"],
    }
    earlier.write_bytes(file.bytes())
    assert same(ps.load(earlier, network()), ps.bake(net).state_dict())
    Artifact.open(earlier).write(again)
    assert take_apart(again.read_bytes()) == take_apart(earlier.read_bytes()), "as they are"
    for encoding, expected in (("range_coded", coded), ("bitpack", bits)):
        ps.repack(earlier, again, encoding=encoding)
        assert again.read_bytes() == expected.read_bytes()


# --- files that somebody else made ------------------------------------------------------------------------------------


@pytest.fixture(params=["bitpack", "range_coded"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    """Planes may be coded whatever the mask's encoding is."""
    coded, plain = tmp_path / "coded", tmp_path / "plain"
    ps.save(coated(), coded, encoding="range_coded")
    ps.save(coated(), plain)
    file, bits = (take_apart(path.read_bytes()) for path in (coded, plain))
    if request.param == "bitpack":
        for entry in file.manifest["masked"]:
            entry["encoding"] = "bitpack"
            file.tensors[f"{entry['name']}.mask"] = bits.tensors[f"{entry['name']}.mask"]
        file.manifest["requires"].remove("range_coded")
    return file


def changed(file: File, change: Callable[[File], object]) -> bytes:
    """The file after a change of its planes, which its digests allow."""
    other, masks = file.copy(), file.manifest["masks_sha256"]
    change(other)
    other.digest()
    other.manifest["masks_sha256"] = masks
    return other.bytes()


def coat(share: float, n: int = 18000, found: int = 4800, kind: str = "coat2") -> Callable[[File], object]:
    """The bytes of another plane of n bits, in a model of `found` ones."""
    packed = pack(np.random.default_rng(0).permutation(np.arange(n) < round(share * n)))
    return put(CODECS["range_coded"].to_bytes(packed, (n,), found).tobytes(), kind)


def put(data: bytes, kind: str = "coat2") -> Callable[[File], object]:
    return tensor(f"0.weight.{kind}", "U8", [len(data)], data)


def edited(change: Callable[[bytes], bytes]) -> Callable[[File], object]:
    return lambda file: put(change(file.tensors["0.weight.coat2"][2]))(file)


SAYS = "expected a list of how many ones each plane of bits has, for 18000 weights"
AT_ONCE: dict[str, tuple[Callable[[File], object], str]] = {
    "no plane": (drop("0.weight.coat2"), r"'0\.weight' has no plane 'coat2'; expected the tensor '0\.weight\.coat2'"),
    "no bytes": (put(b""), r"'0\.weight\.coat2' is U8 \[0\]; expected U8 \[\d+ to \d+\] for 18,000 kept weights"),
    "bytes of bits": (put(bytes(2250)), r"'0\.weight\.coat2' is U8 \[2250\]; expected U8 \[\d+ to \d+\] for 18,000"),
    "half a word": (edited(lambda data: data + b"\0"), r"'0\.weight\.coat2' is U8 \[\d+\]; expected U8 \["),
    "bytes for a plane of zeros": (masked(0, plane_ones=[4800, 0]), r"'0\.weight\.coat3' is U8 .*; expected U8 \[0\]"),
    "one number": (masked(0, plane_ones=[4800]), r"masked\[0\]\.plane_ones is \[4800\]; " + SAYS),
    "three numbers": (masked(0, plane_ones=[4800, 1800, 0]), r"plane_ones is \[4800, 1800, 0\]; " + SAYS),
    "none": (masked(0, plane_ones=[]), r"plane_ones is \[\]; " + SAYS),
    "no list": (masked(0, plane_ones=4800), r"plane_ones is 4800; " + SAYS),
    "null": (masked(0, plane_ones=None), r"plane_ones is None; " + SAYS),
    "booleans": (masked(0, plane_ones=[True, True]), r"plane_ones is \[True, True\]; " + SAYS),
    "floats": (masked(0, plane_ones=[4800.0, 1800.0]), r"plane_ones is \[4800\.0, 1800\.0\]; " + SAYS),
    "less than none": (masked(0, plane_ones=[4800, -1]), r"plane_ones is \[4800, -1\]; " + SAYS),
    "more than take part": (masked(0, plane_ones=[18001, 1800]), r"plane_ones is \[18001, 1800\]; " + SAYS),
    "more than in the coat before": (masked(0, plane_ones=[4800, 4801]), r"plane_ones is \[4800, 4801\]; " + SAYS),
    "no planes": (lambda file: file.manifest["masked"][0].pop("planes"), r"plane_ones is \[4800, 1800\]; " + SAYS),
    "no name": (
        lambda file: file.manifest["requires"].remove("coded_planes"),
        r"requires is \[.*'coat2', 'coat3'\]; expected \[.*'coded_planes', 'coat2', 'coat3'\], as the encodings and",
    ),
    "a name of what is not there": (
        lambda file: file.manifest["masked"][0].pop("plane_ones"),
        r"'coded_planes', 'coat2', 'coat3'\]; expected \[.*'coat2', 'coat3'\], as the encodings and planes say",
    ),
}
WITH_DATA: dict[str, tuple[Callable[[File], object], str]] = {
    "fewer ones": (coat(0.25), r"'0\.weight\.coat2' has 4500 ones; expected 4800, as plane_ones says"),
    "more ones": (coat(0.28), r"'0\.weight\.coat2' has 5040 ones; expected 4800, as plane_ones says"),
    "another number": (masked(0, plane_ones=[4801, 1800]), r"'0\.weight\.coat2' has "),
    "a word more": (
        edited(lambda data: data + bytes(4)),
        r"'0\.weight\.coat2' has other bytes than range_coded writes",
    ),
    "a word less": (edited(lambda data: data[:-4]), r"'0\.weight\.coat2' has "),
    "a bit": (edited(lambda data: bytes([data[0] ^ 1]) + data[1:]), r"'0\.weight\.coat2' has "),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *WITH_DATA])
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    change, says = {**AT_ONCE, **WITH_DATA}[name]
    tried = attempt(tmp_path / "f", changed(file, change), network)
    assert tried.refused_at_once if name in AT_ONCE else tried.refused_with_data
    assert re.search(says, str(tried.loaded)), tried.loaded
    with pytest.raises(ArtifactError):
        ps.masks(tmp_path / "f")
    tried = attempt(tmp_path / "f", file.bytes(), network)
    assert tried.verified
    assert same(tried.loaded, ps.bake(coated()).state_dict())


def test_other_coats_are_other_weights(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", changed(file, coat(4800 / 18000)), network)
    assert isinstance(tried.loaded, nn.Module)
    assert "do not match weights_sha256" in str(tried.verified)


def test_a_plane_that_was_changed_is_refused(file: File, tmp_path: Path) -> None:
    other = file.copy()
    coat(4800 / 18000)(other)
    tried = attempt(tmp_path / "f", other.bytes(), network)
    assert tried.refused_with_data
    assert "tensors_sha256 does not match" in str(tried.loaded)


def test_planes_of_no_bytes_for_huge_shapes_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven coats that all weights wear, beside a mask that keeps all: no byte, and 8 bits for each weight."""
    ps.save(coated(), tmp_path / "f", encoding="range_coded")
    file = take_apart((tmp_path / "f").read_bytes())
    coats = [kind for kind in PLANES if kind.startswith("coat")]
    file.tensors |= {f"0.weight.{part}": ("U8", [0], b"") for part in ("mask", *coats)}

    def worn(n: int) -> bytes:
        masked(0, shape=[n], kept=n, planes=coats, plane_ones=[n] * 7)(file)
        file.manifest["requires"] = ["range_coded", "coded_planes", *coats]
        return changed(file, lambda _: None)

    def decode(*_: Any) -> Any:
        raise AssertionError("it was decoded")

    monkeypatch.setitem(CODECS, "range_coded", replace(CODECS["range_coded"], decode=decode))
    tried = attempt(tmp_path / "f", worn(2**30 + 1), network)
    assert not isinstance(tried.inspected, ArtifactError), "the header is right"
    assert "the network has (200, 300)" in str(tried.loaded)
    with pytest.raises(ArtifactError, match=r"the masks and planes have more than 8,589,934,592 bits"):
        ps.masks(tmp_path / "f")
    (tmp_path / "f").write_bytes(worn(2**30 - 100))  # and there are the 600 weights of the other layer
    with pytest.raises(AssertionError, match="it was decoded"):
        ps.masks(tmp_path / "f")


@given(st.binary(max_size=24), st.integers(0, 2000), st.integers(0, 18000), st.integers(0, 18000))
@settings(max_examples=25, deadline=None)
def test_whatever_the_bytes_are_the_reader_says_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, more: bytes, place: int, first: int, second: int
) -> None:
    path = tmp_path_factory.mktemp("f") / "f"
    ps.save(coated(), path, encoding="range_coded")
    file = take_apart(path.read_bytes())
    data = file.tensors["0.weight.coat2"][2]
    put(data[:place] + more + data[place + len(more) :])(file)
    if second % 2:
        masked(0, plane_ones=[first, second])(file)
    attempt(path, changed(file, lambda _: None), network)
