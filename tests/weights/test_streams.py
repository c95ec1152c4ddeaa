"""From a seed to weights: every vector of the specification, and what holds for any seed, name and size."""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from popup_surgery import ConversionError
from popup_surgery.codecs.bitpack import ones, pack, padding_is_zero, unpack
from popup_surgery.models.layer_types import layer_type_of
from popup_surgery.selection import kept_count, select
from popup_surgery.weights import SCHEMES, streams
from popup_surgery.weights.streams import CHUNK, DISTRIBUTIONS, check_seed, draw, draw_scores, quantiles, words
from support import GOLDEN, numpy_state

VECTORS = json.loads((GOLDEN / "vectors.json").read_text(encoding="utf-8"))

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.integers(1, 400)


def values(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """All pieces as one array."""
    return np.concatenate([np.empty(0, np.float32), *pieces])


# --- the specification's vectors -------------------------------------------------------------------------------------


def test_quantile_table_digest() -> None:
    table = quantiles()
    assert table.dtype == np.dtype("<f4")
    assert table.shape == (65536,)
    assert hashlib.sha256(table.tobytes()).hexdigest() == VECTORS["quantile_table_sha256"]


def test_a_platform_with_another_quantile_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "QUANTILES_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="quantile"):
        quantiles.__wrapped__()


@pytest.mark.parametrize("vector", VECTORS["streams"], ids=lambda v: f"{v['seed']}/{v['purpose']}/{v['name']}")
def test_stream_bytes(vector: dict[str, Any]) -> None:
    expected = bytes.fromhex(vector["bytes_hex"])
    generator = words(int(vector["seed"]), vector["purpose"], vector["name"])
    assert generator.random_raw(len(expected) // 8).astype("<u8").tobytes() == expected


@pytest.mark.parametrize("vector", VECTORS["tensors"], ids=lambda v: f"{v['purpose']}-{v['name']}-{v['distribution']}")
def test_tensor_values(vector: dict[str, Any]) -> None:
    seed, numel = int(vector["seed"]), math.prod(vector["shape"])
    if vector["purpose"] == "score":
        fan_in = math.prod(vector["shape"][1:])
        assert 1.0 / math.sqrt(fan_in) == vector["bound"]
        found = values(draw_scores(numel, float(fan_in), seed, vector["name"]))
    else:
        found = values(draw(vector["distribution"], numel, vector["std"], seed, vector["purpose"], vector["name"]))
    assert found.dtype == np.float32
    assert found.shape == (numel,)
    assert found[:8].astype(float).tolist() == vector["first"]
    assert float(found[-1]) == vector["last"]
    assert hashlib.sha256(found.astype("<f4").tobytes()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("vector", VECTORS["packing"], ids=lambda v: v["packed_hex"])
def test_packing(vector: dict[str, Any]) -> None:
    mask = np.array(vector["mask"], bool)
    packed = pack(mask)
    assert packed.tobytes().hex() == vector["packed_hex"]
    assert (np.concatenate(list(unpack(packed, len(mask)))) & 1).tolist() == vector["mask"]


@pytest.mark.parametrize("vector", VECTORS["kept"], ids=lambda v: f"{v['k']} of {v['n']}")
def test_kept(vector: dict[str, Any]) -> None:
    assert kept_count(vector["n"], vector["k"]) == vector["kept"]


@pytest.mark.parametrize("vector", VECTORS["ranking"], ids=lambda v: str(v["scores"]))
def test_ranking(vector: dict[str, Any]) -> None:
    scores = torch.tensor(vector["scores"])
    (mask,) = select([scores], kept_count(len(vector["scores"]), vector["k"])).masks
    assert mask.int().tolist() == vector["mask"]


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(nf=12, nx=5)


LAYERS = {
    "Linear(101, 57)": (lambda: nn.Linear(101, 57), "weight"),
    "Conv2d(24, 24, 7, groups=24)": (lambda: nn.Conv2d(24, 24, 7, groups=24), "weight"),
    "Conv1d(6, 12, 3, groups=3)": (lambda: nn.Conv1d(6, 12, 3, groups=3), "weight"),
    "ConvTranspose2d(8, 6, 4, stride=2, groups=2)": (
        lambda: nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2),
        "weight",
    ),
    "MultiheadAttention(32, 4) in_proj_weight": (lambda: nn.MultiheadAttention(32, 4), "in_proj_weight"),
    "LSTM(10, 20) weight_ih_l0": (lambda: nn.LSTM(10, 20), "weight_ih_l0"),
    "LSTM(10, 20) weight_hh_l0": (lambda: nn.LSTM(10, 20), "weight_hh_l0"),
    "timm CondConv2d(16, 32, 3, num_experts=4)": (lambda: timm.layers.CondConv2d(16, 32, 3, num_experts=4), "weight"),
    "transformers Conv1D(nf=12, nx=5)": (transformers_conv1d, "weight"),
}


@pytest.mark.parametrize("vector", VECTORS["fans"], ids=lambda v: v["layer"])
def test_fans(vector: dict[str, Any]) -> None:
    make, name = LAYERS[vector["layer"]]
    layer = make()
    assert list(layer.get_parameter(name).shape) == vector["shape"]
    kind = layer_type_of(layer)
    assert kind is not None
    fans = kind.weights(layer)[name]
    assert (fans.fan_in, fans.fan_out) == (vector["fan_in"], vector["fan_out"])


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Conv3d(4, 6, (2, 3, 4), groups=2), 2 * 24, 6 * 24),
        (nn.ConvTranspose1d(6, 4, 5, stride=3), 6 * 5 / 3, 4 * 5 / 3),
        (nn.ConvTranspose3d(4, 2, (1, 2, 3), stride=(1, 2, 1)), 4 * 6 / 2, 2 * 6 / 2),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_fans_of_the_other_dimensions(layer: nn.Module, fan_in: float, fan_out: float) -> None:
    kind = layer_type_of(layer)
    assert kind
    fans = kind.weights(layer)["weight"]
    assert (fans.fan_in, fans.fan_out) == (fan_in, fan_out)


SQRT = math.sqrt
STDS = {  # the specification's table, in its order of operations, and LeCun's; for fan_in 49 and fan_out 1176
    "signed_kaiming_constant": ("signed_constant", SQRT(2.0 / 49)),
    "unsigned_kaiming_constant": ("unsigned_constant", SQRT(2.0 / 49)),
    "kaiming_normal": ("normal", SQRT(2.0 / 49)),
    "kaiming_uniform": ("uniform", SQRT(2.0 / 49)),
    "lecun_normal": ("normal", SQRT(1.0 / 49)),
    "lecun_uniform": ("uniform", SQRT(1.0 / 49)),
    "xavier_normal": ("normal", SQRT(2.0 / (49 + 1176))),
    "xavier_uniform": ("uniform", SQRT(2.0 / (49 + 1176))),
    "signed_xavier_constant": ("signed_constant", SQRT(2.0 / (49 + 1176))),
}


@pytest.mark.parametrize("name", STDS)
@pytest.mark.parametrize("k", [0.3, 0.5, 1.0, 1])
def test_std_of_a_scheme(name: str, k: float) -> None:
    scheme, (distribution, std) = SCHEMES[name], STDS[name]
    assert scheme.distribution == distribution
    assert scheme.std(49.0, 1176.0, k, scaled=False) == std
    assert scheme.std(49.0, 1176.0, k, scaled=True) == std * SQRT(1.0 / k)


def test_every_scheme_has_its_formula_here() -> None:
    assert SCHEMES.keys() == STDS.keys()


def test_the_resnet_vector_is_the_scaled_scheme_of_its_layer() -> None:
    vector = VECTORS["tensors"][0]
    fan_in = math.prod(vector["shape"][1:])
    assert SCHEMES["signed_kaiming_constant"].std(fan_in, 0.0, 1.0, scaled=False) == vector["std"]


# --- any seed, name and size -----------------------------------------------------------------------------------------


def reference(distribution: str, numel: int, std: float, seed: int, purpose: str, name: str) -> list[float]:
    """The specification's table, element by element, from its words."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16, person=b"popup-surgery/v1").digest()
    key = np.array([int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")], np.uint64)
    stream = b"".join(int(w).to_bytes(8, "little") for w in np.random.Philox(key=key).random_raw(numel // 2 + 1))
    s, result = np.float32(std), []
    for i in range(numel):
        if distribution == "signed_constant":
            result.append(s if stream[i // 8] >> i % 8 & 1 else -s)
        elif distribution == "unsigned_constant":
            result.append(s)
        elif distribution.endswith("_sign"):  # of the value that the distribution itself gives
            value = reference(distribution.removesuffix("_sign"), numel, std, seed, purpose, name)[i]
            result.append(s if value > 0 else -s)
        elif distribution == "normal":
            result.append(s * quantiles()[int.from_bytes(stream[2 * i : 2 * i + 2], "little")])
        else:
            u = int.from_bytes(stream[4 * i : 4 * i + 4], "little") >> 8
            step = np.float32((2 * u + 1 - 2**24) * 2.0**-24)
            assert float(step) == (2 * u + 1 - 2**24) * 2.0**-24  # the second factor is exact
            result.append(np.float32(std * math.sqrt(3.0)) * step)
    return [float(value) for value in result]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(numel=st.integers(1, 70), std=st.floats(1e-6, 1e6), seed=SEEDS, name=NAMES)
@example(numel=65, std=1.0, seed=2**64 - 1, name="")
@settings(max_examples=25, deadline=None)
def test_each_element_is_the_tables(distribution: str, numel: int, std: float, seed: int, name: str) -> None:
    found = values(draw(distribution, numel, std, seed, "weight", name))
    assert found.astype(float).tolist() == reference(distribution, numel, std, seed, "weight", name)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(short=SIZES, more=SIZES, seed=SEEDS, name=NAMES)
@settings(max_examples=25, deadline=None)
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(
    distribution: str, short: int, more: int, seed: int, name: str
) -> None:
    first = values(draw(distribution, short, 0.5, seed, "weight", name))
    longer = values(draw(distribution, short + more, 0.5, seed, "weight", name))
    assert np.array_equal(first, longer[:short])
    scores, longer = (values(draw_scores(n, 9.0, seed, name)) for n in (short, short + more))
    assert np.array_equal(scores, longer[:short])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(numel=SIZES, words_=st.integers(1, 4), seed=SEEDS)
@example(numel=64, words_=1, seed=0)
@example(numel=65, words_=1, seed=0)
@example(numel=63, words_=1, seed=0)
@settings(max_examples=25, deadline=None)
def test_the_size_of_the_pieces_changes_no_value(distribution: str, numel: int, words_: int, seed: int) -> None:
    whole = values(draw(distribution, numel, 0.5, seed, "other", "x"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", 64 * words_)
        pieces = list(draw(distribution, numel, 0.5, seed, "other", "x"))
    assert all(len(piece) <= 64 * words_ for piece in pieces)
    assert len(pieces) == -(-numel // (64 * words_))
    assert np.array_equal(values(pieces), whole)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_pieces_meet_without_a_seam(distribution: str) -> None:
    assert CHUNK % 64 == 0
    *_, last = draw(distribution, CHUNK + 100, 0.5, 7, "weight", "seam")
    assert len(last) == 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", 4 * CHUNK)
        (whole,) = draw(distribution, CHUNK + 100, 0.5, 7, "weight", "seam")
    assert np.array_equal(last, whole[CHUNK:])


@given(seed=SEEDS, name=NAMES, other=NAMES)
@settings(max_examples=50, deadline=None)
def test_streams_differ_by_seed_purpose_and_name(seed: int, name: str, other: str) -> None:
    def first(*key: Any) -> list[int]:
        return words(*key).random_raw(2).tolist()

    here = first(seed, "weight", name)
    assert here == first(seed, "weight", name)
    assert here != first(seed, "score", name)
    assert here != first(seed ^ 1, "weight", name)
    assert (here == first(seed, "weight", other)) == (name == other)


def test_names_are_not_normalised() -> None:
    composed, decomposed = (words(0, "weight", n).random_raw(1)[0] for n in ("\u00e9", "e\u0301"))
    assert composed != decomposed


def test_no_ambient_generator_is_used_or_moved() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    first = values(draw("normal", 100, 1.0, 5, "weight", "w"))
    before = numpy_state(), torch.get_rng_state()
    np.random.seed(2)
    assert np.array_equal(values(draw("normal", 100, 1.0, 5, "weight", "w")), first)
    np.random.seed(1)
    values(draw_scores(100, 3.0, 5, "w"))
    assert numpy_state() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "0", None])
def test_a_seed_that_is_none_is_refused(seed: bool | float | str | None) -> None:
    with pytest.raises(ConversionError, match="seed is"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(3), np.uint64(2**64 - 1)])
def test_a_seed_becomes_a_plain_integer(seed: Any) -> None:
    assert type(check_seed(seed)) is int
    assert check_seed(seed) == int(seed)


# --- packing ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_packing_round_trip(bits: list[bool]) -> None:
    packed = pack(np.array(bits))
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-len(bits) // 8),)
    assert np.concatenate(list(unpack(packed, len(bits)))).astype(bool).tolist() == bits
    assert ones(packed) == sum(bits)
    assert padding_is_zero(packed, len(bits))
    assert [int(packed[i // 8]) >> i % 8 & 1 for i in range(len(bits))] == [int(bit) for bit in bits]


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(lambda bits: len(bits) % 8), st.data())
@settings(max_examples=100, deadline=None)
def test_each_padding_bit_is_noticed(bits: list[bool], data: st.DataObject) -> None:
    packed = pack(np.array(bits))
    bit = data.draw(st.integers(len(bits) % 8, 7))
    packed[-1] |= 1 << bit
    assert not padding_is_zero(packed, len(bits))


def test_packing_follows_row_major_order_whatever_the_strides() -> None:
    mask = np.arange(12).reshape(3, 4) % 3 == 0
    assert pack(np.asfortranarray(mask)).tolist() == pack(mask).tolist() == [0b01001001, 0b0010]


def test_unpacking_in_pieces_has_no_seam() -> None:
    n = CHUNK + 13
    mask = np.random.default_rng(0).random(n) < 0.5
    pieces = list(unpack(pack(mask), n))
    assert [len(piece) for piece in pieces] == [CHUNK, 13]
    assert np.array_equal(np.concatenate(pieces).astype(bool), mask)
