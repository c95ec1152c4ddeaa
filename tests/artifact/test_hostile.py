"""Files that somebody made to do harm: each is refused with an `ArtifactError` that names the file, or does no harm."""

import copy
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popup_surgery import ArtifactError, build, convert, inspect, load, save, verify
from support import TESTS, asked, slow_except

BYTE_MUTATIONS = 1500
CHUNKS = 10


class Net(nn.Module):
    """Small, and with an entry of each sort: masked, generated, constant, alias and stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.bn = nn.BatchNorm1d(5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(5, 3, bias=False)
        self.kept = nn.Linear(3, 3)
        self.table = nn.Embedding(7, 3)
        self.register_buffer("flag", torch.tensor([True, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept(self.last(self.bn(self.first(x) + self.tied(x)))) + self.table.weight[0]


@dataclass
class File:
    """A popup file taken apart. `bytes()` puts it together again, with digests that match unless they are kept."""

    manifest: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]
    entries: dict[str, Any] = field(default_factory=dict)  # header entries that replace or join the tensors'

    def copy(self) -> "File":
        return copy.deepcopy(self)

    def text(self) -> str:
        """The manifest's canonical text, with its digest."""
        manifest = {key: value for key, value in self.manifest.items() if key != "manifest_sha256"}
        if "manifest_sha256" in self.manifest:
            manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest).encode()).hexdigest()
        return canonical(manifest)

    def digest(self) -> None:
        """Make the masks' and the stored tensors' digests match."""
        masks, joined = [f"{entry['name']}.mask" for entry in self.manifest["masked"]], hashlib.sha256()
        for mask in masks:
            joined.update(self.tensors[mask][2])
        self.manifest["masks_sha256"] = joined.hexdigest()
        joined = hashlib.sha256()
        for name, (dtype, shape, data) in sorted(self.tensors.items()):
            if name not in masks:
                joined.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode() + data)
        self.manifest["tensors_sha256"] = joined.hexdigest()

    def header(self, text: str | None = None) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"popup_surgery": self.text() if text is None else text}}
        start = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
        return header | self.entries

    def bytes(self, text: str | None = None, header: str | bytes | None = None) -> bytes:
        raw = json.dumps(self.header(text)) if header is None else header
        raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        return struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in self.tensors.values())


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)


def take_apart(data: bytes) -> File:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["popup_surgery"])
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = entry["dtype"], entry["shape"], data[start:stop]
    return File(manifest, tensors)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of `Net`, whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = convert(Net(), exclude="kept", seed=3, k=0.5)
    model(torch.randn(16, 4))
    path = tmp_path_factory.mktemp("original") / "net"
    manifest = save(model, path, probe=(2, 4), provenance={"note": "é", "accuracy": 0.5})
    sorts = manifest.masked, manifest.generated, manifest.constants, manifest.aliases, manifest.probe
    assert all(sorts)
    return path.read_bytes()


@pytest.fixture(scope="module")
def state(original: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("state") / "net"
    path.write_bytes(original)
    assert verify(path, Net())
    return load(path, Net()).state_dict()


@pytest.fixture
def file(original: bytes) -> File:
    return take_apart(original)


@dataclass
class Attempt:
    """What each reader said: its result or its `ArtifactError`."""

    inspected: Any
    loaded: Any
    verified: Any

    @property
    def refused_at_once(self) -> bool:
        return all(isinstance(r, ArtifactError) for r in (self.inspected, self.loaded, self.verified))

    @property
    def refused_with_data(self) -> bool:
        return isinstance(self.loaded, ArtifactError) and isinstance(self.verified, ArtifactError)

    @property
    def refused_by_network(self) -> bool:
        return isinstance(self.loaded, ArtifactError) and (
            isinstance(self.verified, ArtifactError) or not self.verified
        )


def attempt(path: Path, data: bytes, network: Callable[[], nn.Module | None] = Net, label: object = "") -> Attempt:
    """Let all three readers have the file. Anything but a result or an `ArtifactError` that names the file fails."""
    path.write_bytes(data)
    results: list[Any] = []
    for reader in (inspect, lambda p: load(p, network()), lambda p: verify(p, network())):
        try:
            results.append(reader(path))
        except ArtifactError as error:
            results.append(error)
        except Exception as error:
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    for result in results:
        assert not isinstance(result, ArtifactError) or str(result).startswith(f"{path}: "), label
    return Attempt(*results)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


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


# --- bytes changed at random -----------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One of a dozen ways to damage a file."""
    length = int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    # half of the places lie in the data and the JSON around the manifest, which are the shorter parts
    place = rng.choice([rng.randrange(len(data)), rng.randrange(8 + length, len(data)), rng.randrange(8, 40)])
    sort = rng.randrange(12)
    if sort == 0:
        changed[place] ^= 1 << rng.randrange(8)
    elif sort == 1:
        del changed[rng.randrange(len(changed)) :]
    elif sort == 2:
        changed[place:place] = rng.randbytes(rng.randint(1, 9))
    elif sort == 3:
        changed[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, length + 8, rng.getrandbits(20)]))
    elif sort == 4:
        changed[:8] = struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 1 << 40, len(data), len(data) - 8, 16 << 20]))
    elif sort == 5:
        other = rng.randrange(len(data))
        changed[place], changed[other] = changed[other], changed[place]
    elif sort == 6:
        del changed[place : place + rng.randint(1, 40)]
    elif sort == 7:
        changed[place : place + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"-", b"e", b"\x00"])
    elif sort == 8:
        changed[place : place + 4] = rng.choice(
            [b"null", b"true", b"1e99", b"-1.0", b'"\\u0', b"9999", b"\xff\xfe\x80\xc0"]
        )
    elif sort == 9:
        digits = [i for i in range(8, 8 + length) if 48 <= data[i] <= 57]
        changed[rng.choice(digits)] = rng.randrange(48, 58)
    elif sort == 10:
        start = rng.randrange(len(data))
        changed[place:place] = data[start : start + rng.randint(1, 300)]
    else:
        changed += rng.randbytes(rng.randint(1, 64))
    return f"sort {sort} at {place}", bytes(changed)


@pytest.mark.parametrize("chunk", slow_except(range(CHUNKS), [0]))
def test_bytes_changed_at_random(chunk: int, original: bytes, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rng, refused = random.Random(chunk), 0
    count = BYTE_MUTATIONS // CHUNKS
    for index in range(count):
        label, data = mutate(original, rng)
        tried = attempt(tmp_path / "f", data, label=f"{chunk}/{index}: {label}")
        if isinstance(tried.loaded, ArtifactError):
            refused += 1
            continue
        assert same(tried.loaded, state), label  # what is loaded all the same is what was saved
        assert tried.verified, label
    assert refused > 0.8 * count


# --- each key of the manifest, of each wrong type --------------------------------------------------------------------

WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -1.5, 0.0, -0.0, 10**31, -(10**30), 1e308, "", "x", "7", "\x00é", "a" * 64,
    [], [1], [-1], [True], [1.5], ["x"], [0], [[]], {}, {"a": 1}, {"a": {}}, {"a": "b"},
]  # fmt: skip


def is_float(value: Any) -> bool:
    return type(value) is float


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_list(value: Any) -> bool:
    return value == []


def is_hex(value: Any) -> bool:
    return value == "a" * 64


def sizes(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(size) is int and size >= low for size in value)


def dictionary(holds: Callable[[Any], bool] = lambda value: False) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


NEVER = one_of()
# what the format allows at each place, of the values above; places by their path, with * for an index or a name
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "format": NEVER,
    "format_version": one_of(1),
    "requires": one_of([]),
    "architecture": NEVER,
    "architecture.library": is_text,
    "architecture.version": is_text,
    "architecture.name": is_text,
    "architecture.kwargs": dictionary(lambda value: True),
    "seed": one_of("7"),
    "masked": is_list,
    "masked.*": NEVER,
    "masked.*.name": NEVER,  # its mask has another name
    "masked.*.stream": is_text,
    "masked.*.shape": NEVER,  # its mask has another size
    "masked.*.dtype": NEVER,
    "masked.*.distribution": NEVER,
    "masked.*.std": one_of(1.5),
    "masked.*.kept": one_of(0, 1, 2),
    "masked.*.encoding": NEVER,
    "masked.*.scheme": is_text,
    "masked.*.scaled": one_of(True, False),
    "masked.*.k": is_number,
    "masked.*.fan_in": is_number,
    "generated": is_list,
    "generated.*": NEVER,
    "generated.*.name": is_text,
    "generated.*.stream": is_text,
    "generated.*.shape": sizes(1),
    "generated.*.dtype": NEVER,
    "generated.*.distribution": NEVER,
    "generated.*.std": one_of(1.5),
    "constants": dictionary(),
    "constants.*": NEVER,
    "constants.*.shape": sizes(1),
    "constants.*.dtype": NEVER,
    "aliases": dictionary(),
    "aliases.*": NEVER,  # there is no such key
    "masks_sha256": is_hex,
    "weights_sha256": is_hex,
    "tensors_sha256": is_hex,
    "probe": NEVER,
    "probe.shape": sizes(1),
    "probe.output": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "probe.rtol": lambda value: is_number(value) and value > 0,
    "provenance": dictionary(lambda value: True),
    "provenance.*": lambda value: True,
    "manifest_sha256": NEVER,
}
OPTIONAL = {"probe", "provenance.*", "constants.*", "aliases.*"}  # without them, the network finds out
FLOATS = ("F32", "F16", "BF16", "F64")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def pattern(path: tuple[Any, ...]) -> str | None:
    """The path's key in `ALLOWED`, None within shapes and outputs, where the list as a whole is tried."""
    if any(isinstance(key, int) for key in path[1:]) and path[0] not in ("masked", "generated"):
        return None
    if len(path) > 3 or (path[0] in ("masked", "generated") and len(path) > 2 and path[2] == "shape" and len(path) > 3):
        return None
    stars = path[0] in ("masked", "generated", "constants", "aliases", "provenance")
    return ".".join("*" if stars and i == 1 else str(key) for i, key in enumerate(path))


def put(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        manifest = manifest[key]
    manifest[path[-1]] = value


def allowed(place: str, value: Any, dtype: str | None) -> bool:
    if place != "constants.*.value":
        return ALLOWED[place](value)
    if dtype == "BOOL":
        return isinstance(value, bool)
    if dtype in FLOATS:
        return is_float(value) and str(value) != "-0.0" and abs(value) < 1e30
    return type(value) is int and abs(value) < 1e19


def test_each_key_of_the_manifest_with_each_wrong_value(file: File, tmp_path: Path) -> None:
    tried = set()
    for path in list(places(file.manifest)):
        place = pattern(path)
        if place is None or (place.startswith(("masked", "generated")) and path[1:2] > (0,)):
            continue
        if path[0] == "constants" and path[1:2] and path[1] not in ("first.bias", "bn.num_batches_tracked", "flag"):
            continue  # one of each sort is enough
        tried.add(place)
        dtype = file.manifest["constants"][path[1]]["dtype"] if place == "constants.*.value" else None
        for value in WRONG:
            if place.endswith("std") and value == 1e308:
                continue  # has a test of its own
            label = f"{path} = {value!r}"
            changed = file.copy()
            put(changed.manifest, path, value)
            text = canonical(changed.manifest) if place == "manifest_sha256" else None
            result = attempt(tmp_path / "f", changed.bytes(text), label=label)
            assert result.refused_at_once or allowed(place, value, dtype), label
    assert tried == {*ALLOWED, "constants.*.value"}


def test_each_key_of_the_manifest_missing(file: File, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for path in list(places(file.manifest)):
        place = pattern(path)
        if place is None or isinstance(path[-1], int):
            continue
        changed = file.copy()
        holder = changed.manifest
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        result = attempt(tmp_path / "f", changed.bytes(), label=path)
        if place in ("probe", "provenance.*"):
            assert same(result.loaded, state), path
        elif place in OPTIONAL:
            assert result.refused_by_network, path
        else:
            assert result.refused_at_once, path


# --- changes that the format forbids, with all digests made to match -------------------------------------------------


def constant(name: str, **change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["constants"][name].update(change)


def masked(index: int = 0, **change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["masked"][index].update(change)


def generated(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["generated"][0].update(change)


def top(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest.update(change)


def alias(name: str, target: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["aliases"].update({name: target})


def tensor(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[File], object]:
    return lambda file: file.tensors.update({name: (dtype, shape, data)})


def drop(name: str) -> Callable[[File], object]:
    return lambda file: file.tensors.pop(name)


def both(*changes: Callable[[File], Any]) -> Callable[[File], object]:
    return lambda file: [change(file) for change in changes]


def twice(key: str) -> Callable[[File], object]:
    return lambda file: file.manifest[key].append(copy.deepcopy(file.manifest[key][0]))


def edit_mask(change: Callable[[bytearray], Any]) -> Callable[[File], object]:
    def apply(file: File) -> None:
        dtype, shape, data = file.tensors["first.weight.mask"]
        packed = bytearray(data)
        change(packed)
        file.tensors["first.weight.mask"] = dtype, shape, bytes(packed)

    return apply


def entry(name: str, **change: Any) -> Callable[[File], object]:
    def apply(file: File) -> None:
        file.entries[name] = {**file.header()[name], **change}

    return apply


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


def apply(file: File, change: Callable[[File], Any], digest: bool = True) -> bytes:
    changed = file.copy()
    change(changed)
    if digest and all(f"{entry['name']}.mask" in changed.tensors for entry in changed.manifest["masked"]):
        changed.digest()
    return changed.bytes()


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


# --- memory and time -------------------------------------------------------------------------------------------------

HEADER, MANIFEST = 16 << 20, 8 << 20
SECONDS = 8  # a few, on a machine that has other work too
ALLOWANCE = 256 << 20


def filled(start: str, pieces: Iterator[str] | str, stop: str, size: int) -> bytes:
    """`start`, then pieces up to `size` bytes in all, then `stop`."""
    room = size - len(start.encode()) - len(stop.encode())
    if isinstance(pieces, str):
        return (start + pieces * (room // len(pieces.encode()))).encode() + stop.encode()
    parts = []
    for piece in pieces:
        room -= len(piece.encode())
        if room < 0:
            break
        parts.append(piece)
    return (start + "".join(parts)).encode() + stop.encode()


def count(form: str) -> Iterator[str]:
    return (form.format(i) for i in range(10**8))


# the inside of a list or an object, in ways that cost a parser the most
LISTS: dict[str, Callable[[], Iterator[str] | str]] = {
    "empty lists": lambda: "[],",
    "objects of one": lambda: '{"a":1},',
    "short strings": lambda: count('"{0:x}",'),
    "strings and commas": lambda: '"",,',
    "strings and wide characters": lambda: '""\u0100',
}
OBJECTS: dict[str, Callable[[], Iterator[str] | str]] = {
    "unique keys": lambda: count('"{0:x}":0,'),
    "unique keys of floats": lambda: count('"{0:x}":{0}.5,'),
    "unique wide keys": lambda: (f'"{chr(0x10000 + i % 0xFFFFF)}{i // 0xFFFFF}":{i},' for i in range(10**8)),
    "tensors": lambda: count('"{0:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},'),
    "aliases": lambda: count('"a{0:x}":"b{0:x}",'),
}
STRINGS = {
    "escapes": lambda: '\\"',
    "wide characters": lambda: "\U0001f642",
}


def adversaries() -> dict[str, Callable[[File], bytes]]:
    """Files by name. A header is 16 MiB, a manifest 8 MiB; some are shorter, for what takes more than linear time."""

    def header(start: str, pieces: Callable[[], Any], stop: str, size: int = HEADER) -> Callable[[File], bytes]:
        return lambda file: file.bytes(header=filled(start, pieces(), stop, size))

    def manifest(key: str, start: str, pieces: Callable[[], Any], stop: str, size: int) -> Callable[[File], bytes]:
        def make(file: File) -> bytes:
            value = filled(start, pieces(), stop, size - len(file.text()) - 100).decode()
            holder = {name: item for name, item in file.manifest.items() if name != "manifest_sha256"}
            holder[key] = "@"
            text = canonical(holder).replace('"@"', value)
            digest = hashlib.sha256(text.encode()).hexdigest()
            return file.bytes(canonical(holder | {"manifest_sha256": digest}).replace('"@"', value))

        return make

    made: dict[str, Callable[[File], bytes]] = {}
    for name, pieces in LISTS.items():
        made[f"header of {name}"] = header('{"x":[', pieces, "0]}")
    for name, pieces in OBJECTS.items():
        made[f"header of {name}"] = header("{", pieces, '"last":0}')
    for name, pieces in STRINGS.items():
        made[f"header of {name}"] = header('{"', pieces, '":0}')
    made["header of open escapes"] = header('{"', STRINGS["escapes"], "", 1 << 20)
    made["header of open strings"] = header("{", lambda: '"\\"', "")
    made["header of 100,000 keys and one twice"] = header("{", OBJECTS["unique keys"], '"1000":0}', 1_200_000)
    # canonical text, so that the whole of it is looked at
    wide = lambda: count('"\\ud83d\\ude42{0:x}",')  # noqa: E731
    made["manifest of empty lists"] = manifest("provenance", '{"x":[', LISTS["empty lists"], "[]]}", 700_000)
    made["manifest of short strings"] = manifest("provenance", '{"x":[', LISTS["short strings"], "0]}", MANIFEST)
    made["manifest of surrogate pairs"] = manifest("provenance", '{"x":[', wide, "0]}", MANIFEST)
    keys = lambda: (f'"{i:07d}":{i},' for i in range(10**6))  # noqa: E731
    pairs = lambda: (f'"{i:07d}":"first.weight",' for i in range(10**6))  # noqa: E731
    made["manifest of aliases"] = manifest("aliases", "{", pairs, '"x":"first.weight"}', MANIFEST)
    made["manifest of aliases of nothing"] = manifest("aliases", "{", keys, '"x":"first.weight"}', MANIFEST)
    shapes = lambda: (f'"{i:07d}":{{"dtype":"F32","shape":[9],"value":1.0}},' for i in range(10**6))  # noqa: E731
    made["manifest of constants"] = manifest("constants", "{", shapes, '"x":0}', MANIFEST)
    made["manifest of requires"] = manifest("requires", "[", LISTS["short strings"], '"x"]', MANIFEST)
    made["manifest of escapes"] = manifest("provenance", '{"x":"', lambda: '\\"', '"}', MANIFEST)
    made["constant of 2**40 elements"] = lambda file: apply(file, constant("first.bias", shape=[2**40]))
    made["constant more, of 2**40 elements"] = lambda file: apply(file, BY_NETWORK["constant more"])
    made["generated tensor of 2**40 elements"] = lambda file: apply(file, generated(shape=[2**40]))
    made["probe of 2**40 elements"] = lambda file: apply(
        file, lambda file: file.manifest["probe"].update(shape=[2**40])
    )
    return made


ADVERSARIES = adversaries()
QUICK = [
    "header of open escapes", "manifest of short strings", "manifest of aliases", "constant of 2**40 elements",
    "probe of 2**40 elements",
]  # fmt: skip

# Each file in a process of its own, forked after the imports and one load: its growth is the file's alone.
MEASURE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_hostile import Net
from popup_surgery import ArtifactError, inspect, load, verify

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) << 10

folder, seconds, names = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
load(f"{folder}/good", Net())
verify(f"{folder}/good", Net())
for index, name in enumerate(names):
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor, however busy the machine is
        before = peak()
        reader = {"load": load, "verify": verify, "inspect": lambda path, _: inspect(path)}[name]
        try:
            reader(f"{folder}/{index}", Net())
            outcome = "read"
        except ArtifactError as error:
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps([outcome, peak() - before]), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([f"killed by signal {status & 127}", None]), flush=True)
"""


def reader_of(name: str) -> str:
    return "verify" if name.startswith("probe") else "load"


@pytest.fixture(scope="module")
def measured(
    original: bytes, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What became of each adversary: the outcome, the growth of the peak in bytes, and its size."""
    folder = tmp_path_factory.mktemp("adversaries")
    (folder / "good").write_bytes(original)
    names = asked(request, "measured", "name")
    for index, name in enumerate(names):
        (folder / str(index)).write_bytes(ADVERSARIES[name](take_apart(original)))
    sizes = [(folder / str(index)).stat().st_size for index in range(len(names))]
    path = os.pathsep.join([str(Path(__file__).parent), str(TESTS)])
    arguments = [path, str(folder), str(SECONDS), *map(reader_of, names)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    for index in range(len(names)):
        (folder / str(index)).unlink()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: [*line, size] for name, line, size in zip(names, lines, sizes, strict=True)}


@pytest.mark.parametrize("name", slow_except(ADVERSARIES, QUICK))
def test_memory_and_time(name: str, measured: dict[str, list[Any]]) -> None:
    outcome, growth, size = measured[name]
    assert outcome in ("refused", "read"), f"{outcome} (within {SECONDS} s)"
    assert growth <= ALLOWANCE + 2 * size, f"grew by {growth >> 20} MiB for a file of {size >> 20} MiB"
