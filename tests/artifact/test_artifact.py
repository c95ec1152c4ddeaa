"""The artifact: what is saved is what is loaded, to the bit, and a save that fails leaves no trace."""

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popup_surgery import ArtifactError, PopupError, bake, build, convert, inspect, load, masks, save, verify
from popup_surgery.atomic import write_atomically
from support import GOLDEN


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """The golden file's rule: sorted by name, name, NUL, bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + b"\0" + state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def learn(model: nn.Module, seed: int = 5) -> None:
    """Move the scores, as training would, so that no mask is the first one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_score"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def manifest_of(path: Path) -> tuple[dict, str]:
    """The manifest of a file and its text, by the safetensors library."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["popup_surgery"]
    return json.loads(metadata["popup_surgery"]), metadata["popup_surgery"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the manifest of a file and write it again, canonical and with its own digest."""
    manifest, _ = manifest_of(path)
    change(manifest)
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest).encode()).hexdigest()
    save_file(load_file(path), path, metadata={"popup_surgery": canonical(manifest)})


def canonical(manifest: dict) -> str:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@pytest.fixture
def other_surroundings() -> Iterator[Callable[[], None]]:
    """Change every global seed and the number of threads; whoever loads must not notice."""
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()
    generator = torch.get_rng_state()

    def change() -> None:
        torch.manual_seed(987_654_321)
        np.random.seed(987_654)
        random.seed(b"another")
        torch.set_num_threads(1 if threads > 1 else 2)

    yield change
    torch.set_num_threads(threads)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(generator)


def assert_same_state(loaded: nn.Module, expected: nn.Module) -> None:
    found, wanted = loaded.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        same = found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name


# --- round trip ------------------------------------------------------------------------------------------------------


def small(*, norm: bool = True) -> nn.Sequential:
    middle = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


class Sentence(nn.Module):
    """Embeddings, a position embedding, a norm and tied input and output weights."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 8))
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.words(x) + self.pos_embed[:, : x.shape[1]])))


LIBRARY = [
    ("popup_surgery/conv2", {"width": 0.1}, {}),
    ("popup_surgery/conv4", {"width": 0.1, "in_chans": 1, "img_size": [28, 20]}, {"scheme": "xavier_normal"}),
    ("popup_surgery/fc", {"width": 0.2}, {"k": 1.0, "scheme": "unsigned_kaiming_constant", "scaled": False}),
    ("timm/resnet10t", {"num_classes": 7, "in_chans": 1}, {"scheme": "kaiming_uniform", "seed": 2**64 - 1}),
    ("timm/vit_tiny_patch16_224", {"img_size": 32, "num_classes": 3}, {"k": 0.5, "scheme": "kaiming_normal"}),
    ("torchvision/squeezenet1_1", {"num_classes": 3}, {"scope": "global"}),
]


@pytest.mark.parametrize(("name", "kwargs", "how"), LIBRARY, ids=[case[0] for case in LIBRARY])
def test_library_network(
    name: str, kwargs: dict[str, Any], how: dict[str, Any], tmp_path: Path, other_surroundings: Callable[[], None]
) -> None:
    model = convert(build(name, **kwargs), **{"seed": 11, **how})
    learn(model)
    path = tmp_path / "net.safetensors"
    manifest = save(model, path)
    other_surroundings()
    loaded = load(path)
    assert_same_state(loaded, bake(model))
    assert not loaded.training
    assert f"{manifest.architecture.library}/{manifest.architecture.name}" == name
    assert inspect(path) == manifest
    assert verify(path)
    assert path.stat().st_size < 0.1 * sum(t.numel() * t.element_size() for t in bake(model).state_dict().values())


DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(
    ("name", "dtype"), [*(("popup_surgery/conv2", d) for d in DTYPES), *(("timm/resnet10t", d) for d in DTYPES[:2])]
)
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    kwargs = {"width": 0.1} if "conv2" in name else {"num_classes": 3}
    model = convert(build(name, **kwargs), scheme="kaiming_normal", seed=3).to(dtype)
    learn(model)
    save(model, tmp_path / "net")
    other_surroundings()
    loaded = load(tmp_path / "net")
    assert_same_state(loaded, bake(model))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert verify(tmp_path / "net")


def test_cast_before_and_after_conversion_is_the_same(tmp_path: Path) -> None:
    after = convert(small(), scheme="kaiming_uniform", seed=3).bfloat16()
    before = convert(small().bfloat16(), scheme="kaiming_uniform", seed=3)
    assert bytes_of(after, tmp_path) == bytes_of(before, tmp_path)


def test_batchnorm_statistics_are_stored(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    model = convert(small(), seed=1)
    learn(model)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    manifest = save(model, tmp_path / "net")
    assert manifest.constants["1.num_batches_tracked"].value == 3
    assert sorted(load_file(tmp_path / "net")) == ["0.weight.mask", "1.running_mean", "1.running_var", "4.weight.mask"]
    other_surroundings()
    loaded = load(tmp_path / "net", small())
    assert_same_state(loaded, bake(model))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), bake(model).eval()(x))


def test_tied_weight_is_an_alias(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    model = convert(Sentence(tie=True), seed=2)
    learn(model)
    manifest = save(model, tmp_path / "net")
    assert manifest.aliases == {"head.weight": "words.weight"}
    assert [entry.name for entry in manifest.masked] == ["words.weight", "mix.weight"]
    other_surroundings()
    loaded: Any = load(tmp_path / "net", Sentence(tie=True))
    assert loaded.head.weight is loaded.words.weight
    assert_same_state(loaded, bake(model))
    assert verify(tmp_path / "net", Sentence(tie=True))


def test_a_network_that_ties_what_the_file_does_not_is_refused(tmp_path: Path) -> None:
    save(convert(Sentence(), seed=2), tmp_path / "net")
    with pytest.raises(ArtifactError, match="ties it to"):
        load(tmp_path / "net", Sentence(tie=True))


def test_embeddings_and_positions_are_generated(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    model = convert(Sentence(), seed=2)
    learn(model)
    manifest = save(model, tmp_path / "net")
    assert {(entry.name, entry.std) for entry in manifest.generated} == {("words.weight", 1.0), ("pos_embed", 0.02)}
    assert all(name.endswith(".mask") for name in load_file(tmp_path / "net"))
    other_surroundings()
    assert_same_state(load(tmp_path / "net", Sentence()), bake(model))


def test_a_generated_tensor_that_was_changed_is_stored(tmp_path: Path) -> None:
    model: Any = convert(Sentence(), seed=2)
    with torch.no_grad():
        model.words.weight[3, 4] += 1
    manifest = save(model, tmp_path / "net")
    assert [entry.name for entry in manifest.generated] == ["pos_embed"]
    assert "words.weight" in load_file(tmp_path / "net")
    assert_same_state(load(tmp_path / "net", Sentence()), bake(model))


def test_an_excluded_layer_is_stored(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model = convert(small(), exclude="4", seed=2)
    learn(model)
    manifest = save(model, tmp_path / "net")
    assert [entry.name for entry in manifest.masked] == ["0.weight"]
    assert {"4.weight", "4.bias"} <= load_file(tmp_path / "net").keys()
    other_surroundings()
    assert_same_state(load(tmp_path / "net", small()), bake(model))


class Odd(nn.Module):
    """Buffers of every dtype and shape, constant, empty, not finite and negative zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
        for dtype in [*integers, torch.uint16, torch.uint32, torch.uint64]:
            short = str(dtype).removeprefix("torch.")
            top = torch.iinfo(dtype).max
            self.register_buffer(f"{short}_top", torch.full((2,), top, dtype=dtype))
            self.register_buffer(f"{short}_range", torch.tensor([0, 1, 2, top], dtype=dtype))
        for dtype in [torch.float16, torch.bfloat16, torch.float32, torch.float64]:
            short = str(dtype).removeprefix("torch.")
            for name, values in {
                "constant": [0.1, 0.1],
                "zero": [0.0, 0.0],
                "negative_zero": [-0.0, -0.0],
                "mixed_zeros": [0.0, -0.0],
                "nan": [float("nan")] * 2,
                "infinite": [float("inf")] * 2,
                "denormal": [torch.finfo(dtype).tiny / 2] * 2,
                "top": [torch.finfo(dtype).max] * 2,
                "some": [0.5, 1.5],
            }.items():
                self.register_buffer(f"{short}_{name}", torch.tensor(values, dtype=dtype))
        self.register_buffer("yes", torch.tensor([True, True]))
        self.register_buffer("perhaps", torch.tensor([[True], [False]]))
        self.register_buffer("scalar", torch.tensor(2.5))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("complex", torch.tensor([1 + 2j, 1 + 2j]))
        self.register_buffer("strided", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("passing", torch.ones(2), persistent=False)


def test_every_dtype_and_value_of_a_buffer(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    model = convert(Odd(), seed=2)
    manifest = save(model, tmp_path / "net")
    other_surroundings()
    blank = Odd()
    for buffer in blank.buffers():
        buffer.zero_()
    assert_same_state(load(tmp_path / "net", blank), bake(model))
    assert verify(tmp_path / "net", Odd())
    stored = load_file(tmp_path / "net").keys()
    assert {"empty", "perhaps", "complex", "float32_nan", "float32_infinite", "float16_negative_zero"} <= stored
    assert {"float64_mixed_zeros", "uint64_range", "int64_range", "strided"} <= stored
    assert "passing" not in stored | manifest.constants.keys()
    kinds = {name: (c.dtype, c.shape, c.value) for name, c in manifest.constants.items()}
    assert kinds["yes"] == ("BOOL", (2,), True)
    assert kinds["scalar"] == ("F32", (), 2.5)
    assert kinds["uint64_top"] == ("U64", (2,), 2**64 - 1)
    assert kinds["float64_constant"] == ("F64", (2,), 0.1)
    assert {f"{d}_{v}" for d in ("float16", "bfloat16", "float32") for v in ("zero", "denormal", "top")} <= kinds.keys()


def test_root_layer_and_wrappers(tmp_path: Path) -> None:
    layer = convert(nn.Linear(6, 5), seed=4)
    manifest = save(layer, tmp_path / "net")
    assert [entry.stream for entry in manifest.masked] == ["weight"]
    assert_same_state(load(tmp_path / "net", nn.Linear(6, 5)), bake(layer))
    wrapped = nn.DataParallel(convert(small(), seed=4))
    inside = save(wrapped, tmp_path / "wrapped")
    assert inside.masked[0].stream == "0.weight"
    assert (tmp_path / "wrapped").read_bytes() == bytes_of(wrapped.module, tmp_path)


def bytes_of(model: nn.Module, folder: Path, **how: Any) -> bytes:
    save(model, folder / "again", **how)
    return (folder / "again").read_bytes()


def test_effective_weights_have_no_negative_zero(tmp_path: Path) -> None:
    model = convert(nn.Sequential(nn.Linear(40, 40)), k=0.3, seed=2)
    save(model, tmp_path / "net")
    weight = load(tmp_path / "net", nn.Sequential(nn.Linear(40, 40))).get_parameter("0.weight")
    assert int((weight == 0).sum()) == 1600 - int(masks(model)["0.weight"].sum())
    assert not bool((weight.signbit() & (weight == 0)).any())


def test_the_network_handed_over_is_filled_in_place(tmp_path: Path) -> None:
    model = convert(small(), seed=1)
    save(model, tmp_path / "net")
    mine = small().train()
    weight = mine.get_parameter("0.weight")
    assert load(tmp_path / "net", mine) is mine
    assert mine.get_parameter("0.weight") is weight
    assert torch.equal(weight, bake(model).get_parameter("0.weight"))


# --- the bytes -------------------------------------------------------------------------------------------------------


def test_golden_file() -> None:
    golden = json.loads((GOLDEN / "vectors.json").read_text(encoding="utf-8"))["golden"]
    path = GOLDEN / golden["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == golden["file_sha256"]
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    assert state_digest(load(path, network).state_dict()) == golden["state_dict_sha256"]
    checks = verify(path)
    assert checks
    assert [holds for _, holds, _ in checks.checks] == [True, True, None]
    assert inspect(path).seed == 20200622


def test_manifest_is_canonical_and_complete(tmp_path: Path) -> None:
    provenance = {"recipe": "digits", "accuracy": float("nan"), "curve": (1.0, float("inf")), "é": {"x": 1e-7}}
    model = convert(small(), seed=1, k={"0": 0.4})
    save(model, tmp_path / "net", provenance=provenance, probe=(2, 3, 8, 8))
    manifest, text = manifest_of(tmp_path / "net")
    assert text == canonical(manifest)
    assert text.isascii()
    keys = "format format_version requires architecture seed masked generated constants aliases masks_sha256"
    assert manifest.keys() == set(f"{keys} weights_sha256 tensors_sha256 probe provenance manifest_sha256".split())
    assert manifest["seed"] == "1"
    assert manifest["provenance"] == {"recipe": "digits", "accuracy": None, "curve": [1.0, None], "é": {"x": 1e-7}}
    assert manifest["architecture"] == {"library": "custom", "version": "", "name": "Sequential", "kwargs": {}}
    digest = manifest.pop("manifest_sha256")
    assert digest == hashlib.sha256(canonical(manifest).encode()).hexdigest()
    first = manifest["masked"][0]
    keys = "name stream shape dtype distribution std kept encoding scheme scaled k fan_in"
    assert first.keys() == set(keys.split())
    assert (first["name"], first["shape"], first["kept"], first["k"]) == ("0.weight", [4, 3, 3, 3], 44, 0.4)
    assert type(first["fan_in"]) is float
    packed = load_file(tmp_path / "net")
    joined = b"".join(packed[f"{entry['name']}.mask"].numpy().tobytes() for entry in manifest["masked"])
    assert manifest["masks_sha256"] == hashlib.sha256(joined).hexdigest()
    plain = bake(model).state_dict()
    joined = b"".join(plain[entry["name"]].numpy().tobytes() for entry in manifest["masked"])
    assert manifest["weights_sha256"] == hashlib.sha256(joined).hexdigest()


def test_tensors_digest_and_order_of_the_safetensors_library(tmp_path: Path) -> None:
    model = convert(Odd(), seed=2)
    manifest = save(model, tmp_path / "net")
    save_file(
        load_file(tmp_path / "net"), tmp_path / "again", metadata={"popup_surgery": manifest_of(tmp_path / "net")[1]}
    )
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    data = (tmp_path / "net").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    digest = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__", "layer.weight.mask"}):
        entry = header[name]
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        shape = ",".join(map(str, entry["shape"]))
        digest.update(f"{name}\0{entry['dtype']}\0{shape}\0".encode() + data[start:stop])
    assert manifest.tensors_sha256 == digest.hexdigest()


def test_the_same_subnetwork_gives_the_same_bytes(tmp_path: Path, other_surroundings: Callable[[], None]) -> None:
    def trained() -> nn.Module:
        model = convert(build("timm/resnet10t", num_classes=3), seed=8)
        learn(model)
        return model

    first = bytes_of(trained(), tmp_path, provenance={"b": 1, "a": 2})
    assert first == bytes_of(trained(), tmp_path, provenance={"a": 2, "b": 1})
    other_surroundings()
    assert first == bytes_of(trained(), tmp_path, provenance={"a": 2, "b": 1})
    assert first == bytes_of(trained().to(memory_format=torch.channels_last), tmp_path, provenance={"a": 2, "b": 1})
    assert first != bytes_of(trained(), tmp_path)


# --- what cannot be saved or loaded ----------------------------------------------------------------------------------


def test_unconverted_network(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no masked layer"):
        save(small(), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["sign of one", "loaded"])
def test_weights_that_are_not_the_seeds_any_more(how: str, tmp_path: Path) -> None:
    model: Any = convert(small(), seed=1)
    if how == "loaded":
        model.load_state_dict(convert(small(), seed=2).state_dict())
    else:
        model[4]._parameters["weight"].data.view(-1)[17] *= -1
    with pytest.raises(ArtifactError, match=r"weights of '(0|4)\.weight' are not those of seed 1"):
        save(model, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_two_seeds(tmp_path: Path) -> None:
    model = nn.Sequential(convert(nn.Linear(4, 4), seed=1), convert(nn.Linear(4, 4), seed=2))
    with pytest.raises(ArtifactError, match=r"seeds \[1, 2\]; a file holds one"):
        save(model, tmp_path / "net")


def test_submodules_that_were_converted_alone_share_a_stream(tmp_path: Path) -> None:
    model = nn.Sequential(convert(nn.Linear(4, 4), seed=1), convert(nn.Linear(4, 4), seed=1))
    manifest = save(model, tmp_path / "net")
    assert [(entry.name, entry.stream) for entry in manifest.masked] == [("0.weight", "weight"), ("1.weight", "weight")]
    assert_same_state(load(tmp_path / "net", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), bake(model))


def test_a_state_dict_key_where_a_mask_must_stand(tmp_path: Path) -> None:
    model = nn.Module()
    model.layer = nn.Linear(4, 4)
    model.layer._buffers["weight.mask"] = torch.ones(2)
    with pytest.raises(ArtifactError, match=r"layer\.weight\.mask"):
        save(convert(model), tmp_path / "net")


def test_meta_network(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = convert(small())
    with pytest.raises(ArtifactError, match="meta device"):
        save(model, tmp_path / "net")
    save(convert(small()), tmp_path / "net")
    with torch.device("meta"):
        bare = small()
    with pytest.raises(ArtifactError, match="meta device"):
        load(tmp_path / "net", bare)


def test_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            raise AssertionError("nothing of a file may get here")

    with pytest.raises(ArtifactError, match="_extra_state"):
        save(convert(nn.Sequential(Extra(3, 3))), tmp_path / "net")


def test_custom_network_without_a_module(tmp_path: Path) -> None:
    save(convert(small()), tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"custom \(Sequential\), which no library builds; pass the network"):
        load(tmp_path / "net")


def test_network_of_another_shape(tmp_path: Path) -> None:
    save(convert(small()), tmp_path / "net")
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "net", other)
    for word in (str(tmp_path / "net"), "'0.weight'", "(4, 3, 3, 3)", "(6, 3, 3, 3)"):
        assert word in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert not verify(tmp_path / "net", other)


def test_network_of_another_dtype_or_with_other_names(tmp_path: Path) -> None:
    save(convert(small()), tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"'0\.weight': the file's tensor is F32, the network's torch\.float16"):
        load(tmp_path / "net", small().half())
    with pytest.raises(ArtifactError, match=r"'3\.weight' \(and 1 more\) that the file does not hold"):
        load(tmp_path / "net", small(norm=False))
    with pytest.raises(ArtifactError, match=r"'4\.weight' \(and 6 more\) that the network does not have"):
        load(tmp_path / "net", nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ArtifactError, match=r"'5\.weight' .*does not hold"):
        load(tmp_path / "net", small().append(nn.Linear(5, 2)))


def test_filling_a_converted_network(tmp_path: Path) -> None:
    model = convert(small(), seed=1)
    save(model, tmp_path / "net")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="converted; expected a plain one"):
        load(tmp_path / "net", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("reader", [load, inspect, verify])
def test_no_file(reader: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing: the file does not exist"):
        reader(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="this is a folder; expected a file"):
        reader(tmp_path)


def test_manifest_that_would_be_too_long(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="manifest would have"):
        save(convert(small()), tmp_path / "net", provenance={"story": "x" * (8 << 20)})
    assert not list(tmp_path.iterdir())


def test_provenance_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    deep: dict = {}
    for _ in range(40):
        deep = {"a": deep}
    for provenance in ({"n": 10**40}, deep, {"half": "\ud800"}):
        with pytest.raises(ArtifactError):
            save(convert(small()), tmp_path / "net", provenance=provenance)
    assert not list(tmp_path.iterdir())


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_a_failure_half_way_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    save(convert(small(), seed=1), path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(PopupError, match=r"net cannot be written: No space left on device; the file .* unchanged"):
        save(convert(small(), seed=2), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    path.write_bytes(b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


SAVES = """
import resource, sys
from pathlib import Path
from torch import nn
from popup_surgery import PopupError, convert, save
path = Path(sys.argv[1])
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    save(convert(nn.Sequential(nn.Linear(1024, 1024)), k=0.5), path)
except PopupError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", SAVES, str(path), "65536"], capture_output=True, text=True, check=True)
    message = f"{path} cannot be written: File too large; 66,608 of 132,144 bytes did not fit; the file that was there"
    assert message in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    # a mount of its own, in a namespace that is gone with the process
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("no small disk can be mounted here")
    script = f'{mount} && cd {tmp_path} && printf old > net && "$0" -c "$1" {tmp_path}/net && ls -A && cat net'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, SAVES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, listing, content = done.stdout.splitlines()
    assert (
        "cannot be written: No space left on device; 70,704 of 132,144 bytes did not fit; the file that was" in message
    )
    assert (listing, content) == ("net", "old")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PopupError, match="No such file or directory"):
        save(convert(small()), tmp_path / "missing" / "net")


def test_a_saved_file_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(convert(small()), tmp_path / "net")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o640


def test_each_save_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(Odd(), seed=1), path)
    model = convert(nn.Linear(3, 3), seed=2)
    save(model, path)
    assert_same_state(load(path, nn.Linear(3, 3)), bake(model))
    assert list(tmp_path.iterdir()) == [path]


# --- verify ----------------------------------------------------------------------------------------------------------


def failed(path: Path, model: nn.Module | None = None) -> list[str]:
    return [name for name, holds, _ in verify(path, model).checks if not holds]


def test_verify_tells_which_check_fails(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(build("popup_surgery/fc", width=0.1), seed=1), path, probe=(2, 1, 28, 28))
    good = verify(path)
    assert bool(good) is True
    assert len(good.checks) == 4
    assert all(holds for _, holds, _ in good.checks)
    assert str(good).count("ok  ") == 4

    rewrite(path, lambda m: m.update(weights_sha256="0" * 64))
    bad = verify(path)
    assert bool(bad) is False
    assert failed(path) == ["masked weights"]
    assert "FAIL  masked weights" in str(bad)
    load(path)  # weights_sha256 is for verify


def test_verify_notices_another_seed(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(build("popup_surgery/fc", width=0.1), seed=1), path)
    rewrite(path, lambda m: m.update(seed="2"))
    assert failed(path) == ["masked weights"]


def test_probe_is_the_output_for_the_drawn_input(tmp_path: Path) -> None:
    path, shape = tmp_path / "net", (2, 3, 8, 8)
    model = convert(small(), seed=6)
    model.train()
    model(torch.randn(8, 3, 8, 8))
    manifest = save(model, path, probe=shape)
    from popup_surgery.weights.streams import draw

    (drawn,) = draw("normal", 2 * 3 * 64, 1.0, 6, "other", "probe")
    with torch.no_grad():
        expected = bake(model).eval()(torch.from_numpy(drawn).view(shape)).reshape(-1)
    assert manifest.probe is not None
    assert manifest.probe.shape == shape
    assert torch.allclose(torch.tensor(manifest.probe.output), expected[: len(manifest.probe.output)], rtol=1e-5)
    assert len(manifest.probe.output) == 10
    assert model.training
    assert verify(path, small())


@pytest.mark.parametrize(
    "change",
    [
        lambda probe: probe["output"].__setitem__(0, probe["output"][0] + 1.0),
        lambda probe: probe["output"].append(0.0),
        lambda probe: probe.update(shape=[1, 1, 28, 27]),
        lambda probe: probe.update(shape=[2**22]),
        lambda probe: probe.update(output=[-value for value in probe["output"]]),
    ],
)
def test_verify_notices_a_wrong_probe(change: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(build("popup_surgery/fc", width=0.1), seed=1), path, probe=(1, 1, 28, 28))
    assert verify(path)
    rewrite(path, lambda manifest: change(manifest["probe"]))
    assert failed(path) == ["probe"]


def test_another_writer_may_record_fewer_outputs(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(build("popup_surgery/fc", width=0.1), seed=1), path, probe=(1, 1, 28, 28))
    rewrite(path, lambda manifest: manifest["probe"].update(output=manifest["probe"]["output"][:3]))
    assert verify(path)


def test_no_probe_unless_asked_for_or_where_the_output_is_not_finite(tmp_path: Path) -> None:
    model: Any = convert(small(), seed=6)
    assert save(model, tmp_path / "net").probe is None
    assert "probe" not in manifest_of(tmp_path / "net")[0]
    with torch.no_grad():
        model[1].running_var.fill_(float("nan"))
    assert save(model, tmp_path / "net", probe=(1, 3, 8, 8)).probe is None


def test_verify_of_a_custom_network_without_a_module(tmp_path: Path) -> None:
    save(convert(small()), tmp_path / "net")
    checks = verify(tmp_path / "net")
    assert checks
    assert "not checked" in str(checks)


def test_verify_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(small()), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"net: "):
        verify(path)
