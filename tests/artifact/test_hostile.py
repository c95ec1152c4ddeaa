"""Files that somebody made to do harm: each is refused with an `ArtifactError` that names the file, or does no harm."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact.hostile import (
    File,
    Net,
    alias,
    apply,
    attempt,
    both,
    canonical,
    constant,
    drop,
    edit_mask,
    entry,
    generated,
    masked,
    same,
    take_apart,
    tensor,
    top,
    twice,
)
from popup_surgery import ArtifactError, build, convert, save, verify


def test_the_tools_of_this_file_change_nothing_by_themselves(
    original: bytes, file: File, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file.digest()
    tried = attempt(tmp_path / "f", file.bytes())
    assert same(tried.loaded, state)
    assert tried.verified
    assert file.text() == json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])["__metadata__"][
        "popup_surgery"
    ]  # fmt: skip


# --- changes that the format forbids, with all digests made to match -------------------------------------------------


BASE = {"library": "timm", "version": "1", "name": "resnet18", "tag": "a1_in1k", "sha256": "0" * 64}
HUGE = 2**62
AT_ONCE: dict[str, Callable[[File], object]] = {
    "unknown requires": top(requires=["entropy-coding"]),
    "requires that are no names": top(requires=[1]),
    "another format": top(format="popup"),
    "format_version 0": top(format_version=0),
    "format_version 2": top(format_version=2),
    "format_version 1.0": top(format_version=1.0),
    "format_version true": top(format_version=True),
    "format_version as text": top(format_version="1"),
    "a base": top(base=BASE),
    "a base and its distribution": both(top(base=BASE), masked(distribution="base")),
    "the distribution base alone": masked(distribution="base"),
    "unknown encoding": masked(encoding="arithmetic"),
    "no encoding": lambda file: file.manifest["masked"][0].pop("encoding"),
    "unknown distribution": masked(distribution="cauchy"),
    "seed as an integer": top(seed=3),
    "seed with a sign": top(seed="+3"),
    "negative seed": top(seed="-3"),
    "seed with a leading zero": top(seed="03"),
    "seed with white space": top(seed=" 3"),
    "seed with a line end": top(seed="3\n"),
    "seed in other digits": top(seed="٣"),
    "seed 2**64": top(seed=str(2**64)),
    "seed of 20 nines": top(seed="9" * 20),
    "seed of 5,000 digits": top(seed="9" * 5000),
    "seed in hexadecimal": top(seed="0x3"),
    "std 0": masked(std=0.0),
    "std -0": masked(std=-0.0),
    "negative std": masked(std=-1.0),
    "integer std": masked(std=1),
    "text std": masked(std="1.0"),
    "generated std 0": generated(std=0.0),
    "generated std integer": generated(std=1),
    "kept negative": masked(kept=-1),
    "kept above n": masked(kept=21),
    "kept true": masked(kept=True),
    "kept a float": masked(kept=10.0),
    "masked integers": masked(dtype="I32"),
    "masked booleans": masked(dtype="BOOL"),
    "masked complex": masked(dtype="C64"),
    "masked in a dtype that is none": masked(dtype="F33"),
    "masked in a dtype by torch's name": masked(dtype="float32"),
    "generated integers": generated(dtype="I64"),
    "masked shape with 0": masked(shape=[0, 4]),
    "masked shape negative": masked(shape=[-5, -4]),
    "masked shape with a boolean": masked(shape=[20, True]),
    "masked shape of floats": masked(shape=[5.0, 4.0]),
    "masked shape for another mask": masked(shape=[5, 5]),
    "masked shape huge": masked(shape=[HUGE, HUGE]),
    "masked shape whose product wraps to what is there": masked(shape=[2**61 + 20 // 4, 4][::-1]),
    "masked shape of 65 sizes": masked(shape=[1] * 63 + [5, 4]),
    "generated shape with 0": generated(shape=[0]),
    "generated shape negative": generated(shape=[-7, -3]),
    "a name twice among the masked": twice("masked"),
    "a name twice among the generated": twice("generated"),
    "a name masked and generated": generated(name="last.weight"),
    "a name masked and constant": lambda file: file.manifest["constants"].update(
        {"last.weight": {"shape": [3, 5], "dtype": "F32", "value": 1.0}}
    ),
    "a name constant and alias": alias("first.bias", "tied.bias"),
    "a name stored and constant": lambda file: file.manifest["constants"].update(
        {"bn.running_mean": {"shape": [5], "dtype": "F32", "value": 1.0}}
    ),
    "a name stored and masked": tensor("last.weight", "F32", [3, 5], bytes(60)),
    "a name stored and alias": tensor("tied.weight", "F32", [5, 4], bytes(80)),
    "alias of itself": alias("tied.weight", "tied.weight"),
    "aliases in a circle": both(alias("tied.weight", "a"), alias("a", "tied.weight")),
    "alias of an alias": alias("x", "tied.weight"),
    "alias of nothing": alias("tied.weight", "nothing"),
    "alias of a number": alias("tied.weight", 1),
    "alias of a list": alias("tied.weight", []),
    "alias of null": alias("tied.weight", None),
    "alias of a mask": alias("tied.weight", "first.weight.mask"),
    "an alias where a mask stands": alias("first.weight.mask", "first.weight"),
    "no mask": drop("first.weight.mask"),
    "mask of another dtype": tensor("first.weight.mask", "I8", [3], bytes(3)),
    "mask of booleans": tensor("first.weight.mask", "BOOL", [20], bytes(20)),
    "mask of 0 and 1": tensor("first.weight.mask", "U8", [20], bytes(20)),
    "mask of the weight's shape": tensor("first.weight.mask", "U8", [5, 4], bytes(20)),
    "mask too short": tensor("first.weight.mask", "U8", [2], bytes(2)),
    "mask too long": tensor("first.weight.mask", "U8", [4], bytes(4)),
    "mask of two dimensions": tensor("first.weight.mask", "U8", [1, 3], bytes(3)),
    "constant not exact in F16": constant("first.bias", dtype="F16", value=0.1),
    "constant not exact in F32": constant("first.bias", value=0.1),
    "constant above F32": constant("first.bias", value=1e39),
    "constant above F16": constant("first.bias", dtype="F16", value=65536.0),
    "constant -0.0": constant("first.bias", value=-0.0),
    "float constant without a point": constant("first.bias", value=0),
    "float constant true": constant("first.bias", value=True),
    "float constant as text": constant("first.bias", value="0.0"),
    "float constant null": constant("first.bias", value=None),
    "float constant in a list": constant("first.bias", value=[0.0]),
    "integer constant with a point": constant("bn.num_batches_tracked", value=1.0),
    "integer constant true": constant("bn.num_batches_tracked", value=True),
    "integer constant above I64": constant("bn.num_batches_tracked", value=2**63),
    "integer constant below I64": constant("bn.num_batches_tracked", value=-(2**63) - 1),
    "integer constant above U8": constant("bn.num_batches_tracked", dtype="U8", value=256),
    "integer constant below U64": constant("bn.num_batches_tracked", dtype="U64", value=-1),
    "boolean constant 1": constant("flag", value=1),
    "boolean constant 1.0": constant("flag", value=1.0),
    "constant of an unknown dtype": constant("flag", dtype="F4"),
    "constant that is empty": constant("flag", shape=[0]),
    "constant of a negative shape": constant("flag", shape=[-2]),
    "constant of a boolean shape": constant("flag", shape=[True]),
    "constant of a nested shape": constant("flag", shape=[[2]]),
    "masks_sha256 in capitals": lambda file: file.manifest.update(masks_sha256="A" * 64),
    "weights_sha256 too short": top(weights_sha256="0" * 63),
    "weights_sha256 with a line end": top(weights_sha256="0" * 64 + "\n"),
    "probe of nothing": lambda file: file.manifest["probe"].update(shape=[0, 4]),
    "probe of a negative shape": lambda file: file.manifest["probe"].update(shape=[-2, -4]),
    "probe of text": lambda file: file.manifest["probe"].update(output=["1"]),
    "probe of booleans": lambda file: file.manifest["probe"].update(output=[True]),
    "probe without tolerance": lambda file: file.manifest["probe"].pop("rtol"),
    "metadata of two entries": lambda file: file.entries.update(
        __metadata__={"popup_surgery": file.text(), "format": "pt"}
    ),
    "metadata without us": lambda file: file.entries.update(__metadata__={"format": "pt"}),
    "metadata of an object": lambda file: file.entries.update(__metadata__={"popup_surgery": file.manifest}),
    "metadata that is a list": lambda file: file.entries.update(__metadata__=["popup_surgery"]),
    "metadata that is null": lambda file: file.entries.update(__metadata__=None),
    "a hole": entry("last.weight.mask", data_offsets=[1, 3]),
    "an overlap": entry("first.weight.mask", data_offsets=[0, 3]),
    "offsets behind the end": entry("first.weight.mask", data_offsets=[10**9, 10**9 + 3]),
    "offsets turned round": entry("first.weight.mask", data_offsets=[3, 0]),
    "offsets negative": entry("first.weight.mask", data_offsets=[-3, 0]),
    "offsets of booleans": entry("first.weight.mask", data_offsets=[False, 3]),
    "offsets of floats": entry("first.weight.mask", data_offsets=[0.0, 3.0]),
    "one offset": entry("first.weight.mask", data_offsets=[0]),
    "three offsets": entry("first.weight.mask", data_offsets=[0, 3, 3]),
    "offsets as text": entry("first.weight.mask", data_offsets="03"),
    "offsets huge": entry("first.weight.mask", data_offsets=[10**31, 10**31 + 3]),
    "header dtype unknown": entry("kept.bias", dtype="F33"),
    "header dtype a number": entry("kept.bias", dtype=1),
    "header dtype a list": entry("kept.bias", dtype=["F32"]),
    "header shape negative": entry("kept.bias", shape=[-3]),
    "header shape of two negatives": entry("kept.bias", shape=[-3, -1]),
    "header shape boolean": entry("kept.bias", shape=[3, True]),
    "header shape float": entry("kept.bias", shape=[3.0]),
    "header shape nested": entry("kept.bias", shape=[[3]]),
    "header shape text": entry("kept.bias", shape="3"),
    "header shape null": entry("kept.bias", shape=None),
    "header shape huge": entry("kept.bias", shape=[HUGE, HUGE, HUGE]),
    "header shape that wraps": entry("kept.bias", shape=[2**62 + 3]),
    "header shape of 65 sizes": entry("kept.bias", shape=[1] * 64 + [3]),
    "header shape of 10**31": entry("kept.bias", shape=[10**31] * 64),
    "header entry with a key more": entry("kept.bias", strides=[1]),
    "header entry that is null": lambda file: file.entries.update({"kept.bias": None}),
    "header entry that is a list": lambda file: file.entries.update({"kept.bias": ["F32", [3], [0, 12]]}),
    "header entry without dtype": lambda file: file.entries.update({"x": {"shape": [0], "data_offsets": [0, 0]}}),
    "an empty tensor in the midst of another": lambda file: file.entries.update(
        {"x": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]}}
    ),
    "a tensor more without data": lambda file: file.entries.update(
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    ),
}

WITH_DATA: dict[str, Callable[[File], object]] = {
    "padding bit 4": edit_mask(lambda packed: packed.__setitem__(2, packed[2] | 1 << 4)),
    "padding bit 7": edit_mask(lambda packed: packed.__setitem__(2, packed[2] | 1 << 7)),
    "padding bits instead of bits": edit_mask(lambda packed: packed.__setitem__(slice(None), b"\xff\x00\x30")),
    "kept one too many": lambda file: file.manifest["masked"][0].update(kept=file.manifest["masked"][0]["kept"] + 1),
    "kept one too few": lambda file: file.manifest["masked"][0].update(kept=file.manifest["masked"][0]["kept"] - 1),
    "mask without ones": edit_mask(lambda packed: packed.__setitem__(slice(None), bytes(3))),
    "mask with all ones": edit_mask(lambda packed: packed.__setitem__(slice(None), b"\xff\xff\x0f")),
}

UNMATCHED: dict[str, Callable[[File], object]] = {  # the digest is not made to match
    "masks_sha256": top(masks_sha256="0" * 64),
    "tensors_sha256": top(tensors_sha256="0" * 64),
    "a stored byte": tensor("kept.bias", "F32", [3], bytes(12)),
    "a stored dtype": lambda file: file.tensors.update({"kept.bias": ("I32", *file.tensors["kept.bias"][1:])}),
    "a stored shape": lambda file: file.tensors.update({"kept.bias": ("F32", [3, 1], file.tensors["kept.bias"][2])}),
    "a stored name": lambda file: file.tensors.update({"kept.bios": file.tensors.pop("kept.bias")}),
    "a mask bit moved": edit_mask(lambda packed: packed.__setitem__(slice(None), packed[:2][::-1] + packed[2:])),
}

BY_NETWORK: dict[str, Callable[[File], object]] = {
    "a tensor more": tensor("extra", "F32", [1], bytes(4)),
    "a pickle as a tensor more": tensor("extra.pkl", "U8", [4], b"\x80\x04N."),
    "an empty tensor more": tensor("extra", "F32", [0], b""),
    "a mask more": tensor("kept.weight.mask", "U8", [2], bytes(2)),
    "a stored tensor less": drop("kept.bias"),
    "a stored tensor of another name": both(drop("kept.bias"), tensor("kept.bios", "F32", [3], bytes(12))),
    "a stored tensor of another shape": tensor("kept.bias", "F32", [3, 1], bytes(12)),
    "a stored tensor of another dtype": tensor("kept.bias", "I32", [3], bytes(12)),
    "a stored tensor of a smaller dtype": tensor("kept.bias", "F16", [3], bytes(6)),
    "no masked weights": top(masked=[]),
    "no generated tensors": top(generated=[]),
    "no constants": top(constants={}),
    "no aliases": top(aliases={}),
    "masked weight of another shape": masked(shape=[4, 5]),
    "masked weight of another dtype": masked(dtype="F16"),
    "masked weight in eight bits": masked(dtype="F8_E4M3"),
    "generated tensor of another name": generated(name="table.wait"),
    "generated tensor of another shape": generated(shape=[3, 7]),
    "generated tensor of a huge shape": generated(shape=[HUGE, HUGE]),
    "generated tensor of another dtype": generated(dtype="F64"),
    "constant of another shape": constant("first.bias", shape=[5, 1]),
    "constant of a huge shape": constant("first.bias", shape=[HUGE] * 64),
    "constant of another dtype": constant("first.bias", dtype="F64"),
    "constant more": lambda file: file.manifest["constants"].update(
        {"x": {"shape": [10**12], "dtype": "F32", "value": 1.0}}
    ),
    "alias more": alias("x", "first.weight"),
    "alias of a tensor of another shape": alias("tied.weight", "last.weight"),
    "alias the wrong way round": both(masked(name="tied.weight"), top(aliases={"first.weight": "tied.weight"}),
        lambda file: file.tensors.update({"tied.weight.mask": file.tensors.pop("first.weight.mask")})),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    data = apply(file, AT_ONCE[name], digest=not name.startswith("masks_sha256"))
    assert data != file.bytes()
    assert attempt(tmp_path / "f", data).refused_at_once


@pytest.mark.parametrize("name", WITH_DATA)
def test_refused_when_the_tensors_are_read(name: str, file: File, tmp_path: Path) -> None:
    result = attempt(tmp_path / "f", apply(file, WITH_DATA[name]))
    assert result.refused_with_data
    assert "first.weight.mask" in str(result.loaded)


@pytest.mark.parametrize("name", UNMATCHED)
def test_refused_for_its_digest(name: str, file: File, tmp_path: Path) -> None:
    result = attempt(tmp_path / "f", apply(file, UNMATCHED[name], digest=False))
    assert result.refused_with_data
    assert "_sha256 does not match" in str(result.loaded)


@pytest.mark.parametrize("name", BY_NETWORK)
def test_refused_for_the_network_and_before_it_is_changed(name: str, file: File, tmp_path: Path) -> None:
    network = Net()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert attempt(tmp_path / "f", apply(file, BY_NETWORK[name]), lambda: network).refused_by_network
    assert same(network, before)


HARMLESS: dict[str, Callable[[File], object]] = {
    "an unknown key": top(later={"x": [1, 2.5, None, "y"]}),
    "an unknown key of a weight": masked(mood="good"),
    "another architecture, as a module is handed over": top(
        architecture={"library": "?", "version": "", "name": "hf-hub:x/y", "kwargs": {"a": None}}
    ),
    "other provenance": top(provenance={"deep": {"er": [[[]]]}}),
    "an integer of 32 digits": top(provenance={"n": 10**31}),
    "32 levels": top(provenance={"deep": json.loads("[" * 30 + "]" * 30)}),
    "a whole surrogate pair": top(provenance={"smile": "\U0001f642"}),
    "brackets in a string": top(provenance={"smile": "[{" * 100 + '"\\'}),
    "informing values": masked(scheme="", scaled=False, k=0.5, fan_in=1.0),
    "tensors in another order": lambda file: setattr(file, "tensors", dict(sorted(file.tensors.items(), reverse=True))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_is_read(name: str, file: File, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    result = attempt(tmp_path / "f", apply(file, HARMLESS[name]))
    assert not isinstance(result.inspected, ArtifactError)
    assert same(result.loaded, state)
    assert result.verified


# --- the JSON text itself --------------------------------------------------------------------------------------------


def with_provenance(file: File, value: str) -> str:
    """The manifest with `value` as the text of its provenance, and the digest of that text."""
    manifest = {key: item for key, item in file.manifest.items() if key != "manifest_sha256"}
    text = canonical(manifest | {"provenance": "@"}).replace('"@"', value)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    mark = canonical(manifest | {"provenance": "@", "manifest_sha256": digest})
    return mark.replace('"@"', value)


TEXTS = {
    "NaN": '{"a":NaN}',
    "Infinity": '{"a":Infinity}',
    "-Infinity": '{"a":-Infinity}',
    "1e999": '{"a":1e999}',
    "-1e999": '{"a":-1e999}',
    "a key twice": '{"a":1,"a":1}',
    "a key twice, deep": '{"a":[{"b":1,"b":2}]}',
    "a key twice, once escaped": '{"a":1,"\\u0061":1}',
    "a high surrogate alone": '{"a":"\\ud800"}',
    "a low surrogate alone": '{"a":"\\udc00x"}',
    "surrogates turned round": '{"a":"\\udc00\\ud800"}',
    "a surrogate in a key": '{"\\ud800":1}',
    "33 levels": '{"a":' + "[" * 31 + "]" * 31 + "}",
    "33 levels of objects": '{"a":' + '{"a":' * 31 + "1" + "}" * 31 + "}",
    "100,000 levels": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "an integer of 33 digits": '{"a":1' + "0" * 32 + "}",
    "a negative integer of 33 characters": '{"a":-1' + "0" * 31 + "}",
    "a float of 33 characters": '{"a":0.' + "1" * 31 + "}",
    "an integer of 5,000 digits": '{"a":' + "1" * 5000 + "}",
    "white space": '{"a": 1}',
    "a line end": '{"a":1}\n',
    "keys out of order": '{"b":1,"a":1}',
    "a float in another form": '{"a":1.50}',
    "an exponent": '{"a":1E5}',
    "minus zero as an integer": '{"a":-0}',
    "an escape that need not be": '{"a":"\\u0062"}',
    "an escape in capitals": '{"a":"\\u00E9"}',
    "a character that must be escaped": '{"a":"é"}',
    "a solidus escaped": '{"a":"\\/"}',
    "a control character": '{"a":"\x01"}',
    "single quotes": "{'a':1}",
    "a comment": '{"a":1}/**/',
    "a comma more": '{"a":1,}',
    "a leading zero": '{"a":01}',
    "a plus sign": '{"a":+1}',
    "a bare word": '{"a":undefined}',
    "an open string": '{"a":"',
    "nothing": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_manifest_text(name: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", file.bytes(with_provenance(file, TEXTS[name]))).refused_at_once


def test_the_harness_of_texts_passes_what_is_right(file: File, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    result = attempt(tmp_path / "f", file.bytes(with_provenance(file, '{"a":"\\u00e9","b":1.5}')))
    assert same(result.loaded, state)


@pytest.mark.parametrize("text", ["", "null", "[]", "1", '"x"', "{}", "{", "\ufeff{}", "\x00", "{}{}"])
def test_manifest_that_is_none(text: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", file.bytes(text)).refused_at_once


def in_header(value: str) -> Callable[[File], str | bytes]:
    """The header with the text of one more entry."""
    return lambda file: json.dumps(file.header())[:-1] + value + "}"


HEADERS: dict[str, Callable[[File], str | bytes]] = {
    "NaN": in_header(',"x":NaN'),
    "a number too large": in_header(',"x":1e999'),
    "a tensor twice": lambda file: in_header(',"kept.bias":' + json.dumps(file.header()["kept.bias"]))(file),
    "metadata twice": lambda file: in_header(',"__metadata__":' + json.dumps(file.header()["__metadata__"]))(file),
    "a key of an entry twice": lambda file: json.dumps(file.header()).replace('"dtype"', '"dtype": "F32", "dtype"', 1),
    "the metadata's key twice": lambda file: json.dumps(file.header()).replace(
        '"popup_surgery"', '"popup_surgery": "", "popup_surgery"', 1
    ),
    "a lone surrogate": in_header(',"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
    "an encoded surrogate": in_header(',"\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
    "33 levels": in_header(',"x":' + "[" * 32 + "]" * 32),
    "1,000,000 levels": in_header(',"x":' + "[" * 1_000_000),
    "a number of 33 digits": in_header(',"x":{"dtype":"F32","shape":[0,1' + "0" * 32 + '],"data_offsets":[0,0]}'),
    "no UTF-8": lambda file: json.dumps(file.header()).encode() + b"\xff",
    "UTF-16": lambda file: json.dumps(file.header()).encode("utf-16"),
    "a byte order mark": lambda file: "\ufeff" + json.dumps(file.header()),
    "a list": lambda file: json.dumps([file.header()]),
    "a string": lambda file: json.dumps(json.dumps(file.header())),
    "two objects": lambda file: json.dumps(file.header()) * 2,
    "nothing": lambda file: b"",
    "an empty object": lambda file: b"{}",
    "NULs": lambda file: json.dumps(file.header()).encode() + bytes(8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_text(name: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", file.bytes(header=HEADERS[name](file))).refused_at_once


class Bomb:
    """A pickle that would leave a mark."""

    mark: str

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(None))
    return path.read_bytes()


def test_nothing_is_unpickled(file: File, tmp_path: Path) -> None:
    Bomb.mark = str(tmp_path / "mark")
    bomb = pickle.dumps(Bomb())
    torch.save(Bomb(), tmp_path / "saved")
    in_tensor = file.copy()
    in_tensor.tensors["kept.bomb"] = "U8", [len(bomb)], bomb
    in_tensor.digest()
    in_manifest = file.copy()
    in_manifest.manifest["provenance"] = {"pickle": bomb.decode("latin1")}
    for data in (bomb, (tmp_path / "saved").read_bytes(), zipped(tmp_path / "zip"), in_tensor.bytes()):
        assert isinstance(attempt(tmp_path / "f", data).loaded, ArtifactError)
    attempt(tmp_path / "f", in_manifest.bytes())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("data", [b"", b"\0", bytes(7), bytes(8), bytes(9), b"{}", bytes(4096), b"\xff" * 64])
def test_files_that_are_nothing(data: bytes, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", data).refused_at_once


def test_every_truncation_of_the_last_bytes_and_the_first(original: bytes, tmp_path: Path) -> None:
    for size in [*range(64), *range(len(original) - 64, len(original))]:
        assert attempt(tmp_path / "f", original[:size], label=size).refused_at_once


@pytest.mark.parametrize("std", [1e300, 1.7e308, 1e-46, 1e-300])
@pytest.mark.parametrize("distribution", ["signed_constant", "unsigned_constant", "normal", "uniform"])
def test_a_std_that_float32_does_not_hold(std: float, distribution: str, file: File, tmp_path: Path) -> None:
    # finite and above 0, as the format asks; float32 makes infinity or 0 of it, without a warning
    attempt(tmp_path / "f", apply(file, masked(std=std, distribution=distribution)))


# --- the architecture ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> File:
    path = tmp_path_factory.mktemp("own") / "net"
    save(convert(build("popup_surgery/fc", width=0.05, img_size=6, num_classes=2), seed=3), path, probe=(1, 1, 6, 6))
    assert verify(path)
    return take_apart(path.read_bytes())


NAMES = [
    ("timm", "hf-hub:x/y"), ("timm", "hf_hub:timm/resnet18.a1_in1k"), ("timm", "local-dir:/tmp"),
    ("timm", "resnet18.a1_in1k"),
    ("timm", "timm/resnet18"), ("timm", "../x"), ("timm", "/etc/passwd"), ("timm", ""), ("timm", "resnet18 "),
    ("timm", "resnet18\n"), ("timm", "ResNet18"), ("timm", "no_such_network"), ("timm", "create_model"),
    ("timm", "__init__"), ("timm", "fc"), ("torchvision", "ResNet18_Weights"), ("torchvision", "get_model"),
    ("torchvision", "os"), ("torchvision", "fc"), ("popup_surgery", "resnet18"), ("popup_surgery", "ConvNet"),
    ("popup_surgery", "fc\x00"), ("popup_surgery", "ｆｃ"), ("popup_surgery", "popup_surgery/fc"),
    ("huggingface", "fc"),
    ("popup_surgery.models.paper_nets", "fc"), ("os", "system"), ("", "fc"), ("POPUP_SURGERY", "fc"), ("custom", "fc"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_architecture_that_is_no_name(library: str, name: str, own: File, tmp_path: Path) -> None:
    change = top(architecture={"library": library, "version": "", "name": name, "kwargs": {}})
    result = attempt(tmp_path / "f", apply(own, change), lambda: None)
    assert isinstance(result.loaded, ArtifactError)
    assert library == "custom" or isinstance(result.verified, ArtifactError) or not result.verified


KWARGS: list[dict[str, Any]] = [
    {"pretrained": True}, {"pretrained": False}, {"weights": "DEFAULT"}, {"weights": None}, {"checkpoint_path": "/x"},
    {"pretrained_cfg": {}}, {"weights_backbone": "DEFAULT"}, {"block": "x"}, {"": 1}, {"self": 1}, {"convs": [1]},
    {"scriptable": True}, {"num_classes": True}, {"num_classes": -1}, {"num_classes": 1_000_001}, {"num_classes": 2.0},
    {"num_classes": "2"}, {"num_classes": None}, {"num_classes": [2]}, {"num_classes": 10**31}, {"in_chans": 0},
    {"in_chans": 1025}, {"in_chans": True}, {"in_chans": 1.0}, {"img_size": 0}, {"img_size": -6}, {"img_size": 8193},
    {"img_size": [6]}, {"img_size": []}, {"img_size": [6, 6, 6]}, {"img_size": [6, True]}, {"img_size": [6, 8193]},
    {"img_size": "6"}, {"img_size": 6.0}, {"img_size": {"a": 6}}, {"img_size": True}, {"patch_size": 0},
    {"patch_size": 1025}, {"patch_size": [1025, 1]}, {"patch_size": True}, {"global_pool": "avg pool"},
    {"global_pool": "__import__"}, {"global_pool": "AVG"}, {"global_pool": "avg\n"}, {"global_pool": 1},
    {"global_pool": None}, {"width": 0}, {"width": 0.0}, {"width": -1.0}, {"width": 64.5}, {"width": True},
    {"width": "1"}, {"width": 10**31}, {"width": [1.0]}, {"drop_rate": -0.1}, {"drop_rate": 1.1}, {"drop_rate": True},
    {"drop_rate": None}, {"drop_path_rate": 2}, {"drop_path_rate": -1}, {"drop_path_rate": "0"}, {"output_stride": 4},
    {"output_stride": 8.0}, {"output_stride": True}, {"output_stride": 64}, {"output_stride": "8"},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_architecture_arguments_outside_the_list_or_its_bounds(
    kwargs: dict[str, Any], own: File, tmp_path: Path
) -> None:
    library, name = ("popup_surgery", "fc") if kwargs.keys() & {"width", "img_size"} else ("timm", "resnet10t")
    mine = own.manifest["architecture"]["kwargs"] if library == "popup_surgery" else {}
    change = top(architecture={"library": library, "version": "", "name": name, "kwargs": {**mine, **kwargs}})
    result = attempt(tmp_path / "f", apply(own, change), lambda: None)
    assert isinstance(result.loaded, ArtifactError)
    assert "architecture.kwargs" in str(result.loaded)
    assert isinstance(result.verified, ArtifactError) or not result.verified


UNFIT: list[tuple[str, str, dict[str, Any]]] = [
    ("popup_surgery", "fc", {"width": 64, "img_size": 8192, "in_chans": 1024, "num_classes": 1_000_000}),
    ("popup_surgery", "conv8", {"width": 64, "img_size": 8192}),
    ("popup_surgery", "conv8", {"img_size": 1}),
    ("popup_surgery", "fc", {"patch_size": 4}),
    ("timm", "resnet10t", {"num_classes": 1_000_000}),
    ("timm", "resnet10t", {"global_pool": "nosuchpool"}),
    ("timm", "resnet10t", {"width": 2.0}),
    ("timm", "vit_tiny_patch16_224", {"img_size": 8192, "patch_size": 1}),
    ("timm", "vit_tiny_patch16_224", {"img_size": 1, "patch_size": 1024}),
    ("torchvision", "squeezenet1_1", {"num_classes": 1_000_000}),
    ("torchvision", "resnet18", {"in_chans": 3}),
]


@pytest.mark.parametrize(("library", "name", "kwargs"), UNFIT, ids=str)
def test_architecture_that_does_not_fit_is_built_without_memory(
    library: str, name: str, kwargs: dict[str, Any], own: File, tmp_path: Path
) -> None:
    change = top(architecture={"library": library, "version": "", "name": name, "kwargs": kwargs})
    result = attempt(tmp_path / "f", apply(own, change), lambda: None)
    assert result.refused_by_network
