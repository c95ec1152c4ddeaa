"""How often weights were drawn again, as bytes: the page's bytes, its vectors, its limit, and damaged bytes."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coder import Writer
from docs.test_docs import reader
from popup_surgery.codecs.generations import Reader, bound, check, encode
from popup_surgery.weights.streams import MOST, values_at
from support import GOLDEN, ROOT

GOLDEN_VECTORS = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))

Numbers = np.ndarray[Any, np.dtype[np.uint16]]


def as_the_page_writes(numbers: list[int]) -> bytes:
    counts = [numbers.count(g) for g in range(max(numbers) + 1)]
    front, left = b"", len(numbers)
    for count in counts:
        front += count.to_bytes((left.bit_length() + 7) // 8, "little")
        left -= count
    frequencies = [1 + count * (2**24 - len(counts)) // len(numbers) for count in counts]
    frequencies[counts.index(max(counts))] += 2**24 - sum(frequencies)
    writer = Writer()
    writer.put(numbers, frequencies)
    return front + writer.bytes()


def read(data: bytes, n: int) -> Numbers:
    """All generations, after the check, some at a time."""
    packed = np.frombuffer(data, np.uint8)
    assert len(data) in bound(n)
    check(packed, n)
    coded = Reader(packed, n)
    return np.concatenate([coded.take(min(7, n - start)) for start in range(0, n, 7)])


SOME = st.lists(st.one_of(st.integers(0, 3), st.integers(0, MOST)), min_size=1, max_size=80).filter(any)


@given(SOME)
@settings(max_examples=30)
@example([1])
@example([MOST])
@example([0, MOST] * 40)
@example([1] * 300)
def test_the_bytes_are_the_pages_and_give_the_numbers(numbers: list[int]) -> None:
    data = encode(np.array(numbers, np.uint16)).tobytes()
    assert data == as_the_page_writes(numbers)
    assert read(data, len(numbers)).tolist() == numbers


@pytest.mark.parametrize("vector", GOLDEN_VECTORS["vectors"], ids=lambda vector: vector["kept"])
def test_vectors(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["bytes"])
    found = read(data, vector["kept"])
    assert hashlib.sha256(found.astype("<u2").tobytes()).hexdigest() == vector["sha256"]
    assert found.tolist() == vector.get("generations", found.tolist())
    assert encode(found).tobytes() == data


def test_the_example_of_the_page() -> None:
    page = (ROOT / "docs/artifact-format.md").read_text(encoding="utf-8")
    assert f"`{encode(np.array([0, 2, 0, 1, 0], np.uint16)).tobytes().hex(' ')}`" in page


@pytest.mark.parametrize("vector", GOLDEN_VECTORS["values"], ids=lambda vector: vector["distribution"])
def test_vectors_of_values(vector: dict[str, Any]) -> None:
    places, generations = np.array(vector["places"]), np.array(vector["generations"])
    what = vector["distribution"], vector["std"], int(vector["seed"]), vector["stream"]
    assert values_at(places, generations, *what).astype("<f4").tobytes().hex() == vector["values"]


def test_the_page_reads_the_vectors() -> None:
    space = reader(3)
    entry = {"distribution": "normal", "std": 1.0, "stream": "a"}
    for vector in GOLDEN_VECTORS["vectors"]:
        if len(numbers := vector.get("generations", [])) not in range(2, 201):
            continue
        values, shaped = np.zeros(len(numbers), np.float32), entry | {"shape": [len(numbers)]}
        data = np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8)
        space["UNPACK"]["generation"](data, np.arange(len(numbers)), values, shaped, "5")
        expected = values_at(np.arange(len(numbers)), np.array(numbers), "normal", 1.0, 5, "a")
        again = np.array(numbers) > 0
        assert values[again].tobytes() == expected[again].tobytes()
        assert not values[~again].any()


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_as_few_bytes_as_the_shares_allow(rate: float) -> None:
    numbers = np.random.default_rng(1).geometric(1 - rate, 40_000) - 1
    counts = np.bincount(numbers)
    shares = counts[counts > 0] / len(numbers)
    limit = -(shares * np.log2(shares)).sum() * len(numbers) / 8
    assert len(encode(numbers.astype(np.uint16))) <= 1.001 * limit + 64 + 3 * len(counts)


GOOD = encode(np.array([0, 2, 0, 1, 0, 0, 3] * 20, np.uint16)).tobytes()
WRONG = {
    "none was drawn again": (bytes([140]), 140, "has no weight that was drawn again"),
    "no weights": (b"\0", 0, "has no weight that was drawn again"),
    "nothing": (b"", 5, "does not say how many of its 5 weights there are of each generation"),
    "too many": (bytes([2, 9]), 5, "does not say how many of its 5 weights"),
    "too often": (bytes(5000), 5, "has weights that were drawn again more than 4,095 times"),
    "no words": (GOOD[:-1], 140, "has bytes that are no whole words"),
    "a word more": (GOOD + bytes(4), 140, "has other bytes than those of its generations"),
    "a word less": (GOOD[:-4], 140, "has other"),
    "other weights": (GOOD[:6] + bytes([GOOD[6] ^ 255]) + GOOD[7:], 140, "has other"),
    "no symbols": (bytes([1, 1]) + b"\xff" * 8, 2, "has bytes that are no generations|has other"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_bytes_are_refused(name: str) -> None:
    data, n, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        check(np.frombuffer(data, np.uint8), n)


@given(st.binary(max_size=40), st.integers(0, 300))
@settings(max_examples=60)
@example(GOOD, 139)
def test_whatever_is_read_is_written_so(data: bytes, n: int) -> None:
    try:
        check(np.frombuffer(data, np.uint8), n)
    except ValueError:
        return
    assert encode(Reader(np.frombuffer(data, np.uint8), n).take(n)).tobytes() == data
