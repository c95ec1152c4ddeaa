"""The decoder in C reads what this library writes, to the bit, and refuses what it must, under sanitizers."""

import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import popup_surgery as ps
from artifact.hostile import File, Net, same
from docs.test_docs import reader
from native.corpus import changed, original
from native.decoder import COMPILER, NATIVE, SANITIZERS, Unpack, build
from popup_surgery.artifact.container import DTYPES
from popup_surgery.codecs import get_codec
from popup_surgery.learners import LEARNERS
from popup_surgery.weights.fill import rounded
from support import GOLDEN, TESTS, slow_except

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler: cc, or what CC names")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), *SANITIZERS)


@pytest.fixture
def unpack(program: Path, tmp_path: Path) -> Unpack:
    return Unpack(program, tmp_path)


@pytest.fixture(scope="module")
def file() -> File:
    return original()


def written(file: File, path: Path) -> Path:
    path.write_bytes(file.bytes())
    return path


def test_it_is_as_short_as_promised() -> None:
    assert sum(len((NATIVE / name).read_text().splitlines()) for name in ("popup.c", "popup.h")) < 1200


# --- what the library writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["bitpack", "range_coded"])
@pytest.mark.parametrize(
    "learner",
    slow_except(
        (name for name, learner in LEARNERS.items() if not learner.learns_weights and not learner.planes),
        ["edge_popup", "supermask"],
    ),
)
def test_every_learner_in_every_encoding(learner: str, encoding: Any, unpack: Unpack, tmp_path: Path) -> None:
    model = ps.convert(Net(), learner=learner, exclude="kept", seed=5)
    model(torch.randn(16, 4))
    ps.save(model, tmp_path / "net", encoding=encoding)
    assert same(ps.load(tmp_path / "net", Net()), unpack.state(tmp_path / "net"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "scheme", ["signed_kaiming_constant", "unsigned_kaiming_constant", "kaiming_normal", "kaiming_uniform"]
)
def test_distributions_and_dtypes(scheme: str, dtype: torch.dtype, unpack: Unpack, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 67), nn.BatchNorm1d(67)).to(dtype)
    model = ps.convert(net, 0.3, scheme=scheme, scaled=False, seed=2**64 - 1)
    ps.save(model, tmp_path / "é")
    assert same(ps.bake(model), unpack.state(tmp_path / "é"))


EXTREMES = [("F8_E4M3", 0.004), ("F8_E4M3", 200.0), ("F8_E5M2", 2e-5), ("F8_E5M2", 3e4), ("F16", 1e-7), ("F16", 4e4),
            ("BF16", 1e-39), ("BF16", 1e38)]  # fmt: skip


def lone(file: File, n: int, **entry: Any) -> File:
    """A file of nothing but one masked tensor `x`, all of whose n weights are kept."""
    one = file.copy()
    one.manifest |= {"generated": [], "constants": {}, "aliases": {}, "requires": []}
    one.manifest["masked"] = [{**one.manifest["masked"][0], "name": "x", "shape": [n], "kept": n, **entry}]
    one.tensors = {"x.mask": ("U8", [-(-n // 8)], np.packbits(np.ones(n, np.uint8), bitorder="little").tobytes())}
    one.digest()
    return one


@pytest.mark.parametrize(("dtype", "std"), EXTREMES)
def test_rounding_is_that_of_torch(dtype: str, std: float, file: File, unpack: Unpack) -> None:
    """Subnormal results, ties, and values above the largest."""
    drawn = {"distribution": "normal", "std": std}
    exact = unpack.state(written(lone(file, 4096, dtype="F32", **drawn), unpack.folder / "f"))["x"]
    found = unpack.state(written(lone(file, 4096, dtype=dtype, **drawn), unpack.folder / "f"))["x"]
    expected = rounded(exact.numpy(), DTYPES[dtype])
    assert len(expected.float().unique()) > 6
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


VECTORS = json.loads((GOLDEN / "vectors.json").read_text())
PURPOSES = [vector for vector in VECTORS["tensors"] if vector["purpose"] != "score"]  # no file has scores


@pytest.mark.parametrize("vector", PURPOSES, ids=lambda v: f"{v['name']}-{v['distribution']}")
def test_vectors_of_the_format(vector: dict[str, Any], file: File, unpack: Unpack) -> None:
    entry = {key: vector[key] for key in ("shape", "distribution", "std")} | {"stream": vector["name"], "dtype": "F32"}
    one = lone(file, math.prod(vector["shape"]), **entry)
    one.manifest["seed"] = vector["seed"]
    if vector["purpose"] == "other":
        one.manifest |= {"masked": [], "generated": [{"name": "x", **entry}]}
        one.tensors = {}
        one.digest()
    state = unpack.state(written(one, unpack.folder / "f"))
    assert hashlib.sha256(state["x"].numpy().tobytes()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize(
    "stream", ["", *("x" * n for n in (118, 119, 120, 246, 247, 248)), 'a"\\\u007f\t\0é\U0001f642']
)
def test_streams_of_any_length_and_characters(stream: str, file: File, unpack: Unpack) -> None:
    """ "3/weight/" has 9 bytes, a block of BLAKE2b has 128."""
    path = written(lone(file, 77, dtype="F32", distribution="uniform", std=1.0, stream=stream), unpack.folder / "f")
    assert unpack.state(path)["x"].tolist() == reader()["read"](path)["x"].tolist()


CODED = json.loads((GOLDEN / "range_coded.json").read_text())["vectors"]


def encode(n: int, kept: int, first: int, step: int, inverted: bool) -> bytes:
    mask = np.zeros(n, np.bool_)
    mask[first::step] = True
    packed = np.packbits(mask ^ inverted, bitorder="little")
    return get_codec("range_coded").to_bytes(packed, (n,), kept).tobytes()


def coded(file: File, vector: dict[str, Any]) -> File:
    """A file with the mask of a vector."""
    n = vector["n"]
    data = bytes.fromhex(vector["bytes"]) if "bytes" in vector else encode(n, vector["kept"], **vector["mask"])
    one = lone(file, n, kept=vector["kept"], encoding="range_coded", distribution="unsigned_constant", std=0.5)
    one.manifest |= {"requires": ["range_coded"], "masks_sha256": vector["mask_sha256"]}
    one.tensors = {"x.mask": ("U8", [len(data)], data)}
    return one


@pytest.mark.parametrize("vector", CODED, ids=lambda v: f"{v['n']}-{v['kept']}")
def test_vectors_of_range_coded_masks(vector: dict[str, Any], file: File, unpack: Unpack) -> None:
    path = written(coded(file, vector), unpack.folder / "f")
    mask = unpack.state(path, "mask")["x"].numpy().tobytes()
    assert hashlib.sha256(mask).hexdigest() == vector["mask_sha256"]


def test_a_mask_has_one_encoding(file: File, unpack: Unpack) -> None:
    """Words more, words less and words changed are refused, though a lenient reader would decode some to the mask."""
    rng = np.random.default_rng(0)
    for vector in [v for v in CODED if (v["n"], v["kept"]) in {(65, 64), (500, 150), (4000, 62), (3000, 2955)}]:
        data = bytes.fromhex(vector["bytes"])
        changes = [data + bytes(4), data + bytes(8), data[:-4], data[:-4] + bytes(4), bytes(4) + data]
        for _ in range(6):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            changes.append(bytes(damaged))
        for change in {*changes} - {data}:
            said = unpack.refusal(coded(file, {**vector, "bytes": change.hex()}).bytes())
            assert said.startswith("'x' has a mask") or "masks_sha256 does not match" in said or "keeps" in said, said
        assert unpack.refusal(coded(file, vector).bytes()).startswith("weights_sha256")


OTHERS = (
    "pretrained.popup",
    "signed.popup",
    "coats.popup",
    "coded_planes.popup",
    "generation.popup",
    "pattern_coded.popup",
    "fixed.popup",
    "binary.popup",
    "source.popup",
)  # which need a base or a newer reader
FILES = [path for path in sorted(GOLDEN.rglob("*.popup.safetensors")) if path.stem not in OTHERS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_earlier_versions(path: Path, unpack: Unpack) -> None:
    assert "tensors of" in unpack.run(path).stdout  # all digests match, the weights' too
    if path.stem.startswith("range_coded"):
        return
    expected = reader()["read"](path)
    state = unpack.state(path)
    assert state.keys() == expected.keys()
    assert all(state[name].numpy().tobytes() == np.asarray(expected[name]).tobytes() for name in state)


def test_the_ternary_formats(unpack: Unpack) -> None:
    path = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"
    state = unpack.state(path)
    signs = {name: np.sign(tensor.numpy()).astype(np.int8).reshape(-1) for name, tensor in state.items()}
    int8, two, bits, float32 = (unpack.state(path, form) for form in ("int8", "2bit", "mask", "f32"))
    masked = {entry.name for entry in ps.inspect(path).masked}
    assert int8.keys() == two.keys() == bits.keys() == masked
    for name in masked:
        count = signs[name].size
        assert int8[name].numpy().view(np.int8).tolist() == signs[name].tolist()
        pairs = (two[name].numpy()[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1)
        assert pairs[:count].tolist() == (signs[name] + 1).tolist()
        assert not pairs[count:].any()
        assert np.unpackbits(bits[name].numpy(), bitorder="little")[:count].tolist() == (signs[name] != 0).tolist()
        assert float32[name].numpy().tobytes() == state[name].numpy().tobytes()


def test_a_mask_on_pretrained_weights_asks_for_them(unpack: Unpack, tmp_path: Path) -> None:
    path = GOLDEN / "artifacts" / "pretrained.popup.safetensors"
    done = unpack.run(path, tmp_path / "out")
    assert "masks weights of" in done.stderr
    assert "POPUP_MASK alone reads it" in done.stderr
    assert not (tmp_path / "out").exists()
    masks = unpack.state(path, "mask")
    expected = ps.masks(path)
    assert masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert masks[name].numpy().tobytes() == np.packbits(mask.numpy().reshape(-1), bitorder="little").tobytes()


@pytest.mark.parametrize(("name", "feature"), [
    ("signed", '["sign"]'), ("pattern_coded", '["pattern_coded"]'), ("fixed", '["range_coded","fixed"]'),
    ("binary", '["normal_sign"]'), ("coded_planes", '["range_coded","coded_planes","coat2","coat3"]'),
])  # fmt: skip
def test_a_file_with_planes_or_of_a_newer_encoding_is_refused_by_name(
    name: str, feature: str, unpack: Unpack, tmp_path: Path
) -> None:
    for form in ((), ("mask",)):
        done = unpack.run(GOLDEN / f"{name}.popup.safetensors", tmp_path / "out", *form)
        assert done.stderr.endswith(f"the file needs a newer reader: version 1, requires {feature}\n")
        assert not (tmp_path / "out").exists()


def test_a_pattern_in_bits_is_read(unpack: Unpack, tmp_path: Path) -> None:
    ps.repack(GOLDEN / "pattern_coded.popup.safetensors", tmp_path / "bits", encoding="bitpack")
    state, expected = unpack.state(tmp_path / "bits"), ps.load(tmp_path / "bits").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


# --- what it must refuse ----------------------------------------------------------------------------------------------

# the page wants a canonical text; this reader checks only what two readers could understand differently
OTHER_FORMS = {"a float in another form", "an exponent", "minus zero as an integer", "an escape that need not be",
               "an escape in capitals", "a solidus escaped"}  # fmt: skip


@pytest.mark.parametrize("chunk", slow_except(range(8), [0]))
@pytest.mark.parametrize("encoding", ["bitpack", "range_coded"])
def test_hostile_files(encoding: str, chunk: int, unpack: Unpack) -> None:
    said = {key: unpack.refusal(data) for key, data in [*changed(original(encoding)).items()][chunk::8]}
    read = {key for key, message in said.items() if not message}
    assert not [key for key in read if key[0] in ("at_once", "with_data", "unmatched", "header")]
    assert {name for table, name in read if table == "text"} == {n for t, n in said if t == "text"} & OTHER_FORMS
    assert not [key for key in said if key[0] == "harmless" and key not in read]
    assert all(len(message) > 15 for message in said.values() if message)


def test_more_weights_than_a_caller_without_a_network_expects(file: File, unpack: Unpack) -> None:
    large = coded(file, {"n": 8, "kept": 0, "bytes": "", "mask_sha256": "0" * 64})
    large.manifest["masked"][0]["shape"] = [2**34]
    assert "more weights than are left of the limit" in unpack.refusal(large.bytes())


# --- its own tests ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_its_own_tests_need_no_python(tmp_path: Path) -> None:
    shutil.copytree(NATIVE, tmp_path / "native", ignore=shutil.ignore_patterns("build"))
    (tmp_path / "tests").mkdir()
    shutil.copytree(TESTS / "golden", tmp_path / "tests" / "golden")
    done = subprocess.run(["make", "check"], cwd=tmp_path / "native", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\nall passed\n" in done.stdout
