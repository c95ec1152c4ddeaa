"""Whose values weights have, as bytes: the page's bytes, its vectors, its limit, and damaged bytes."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from docs.test_docs import reader
from popup_surgery.codecs import get_codec
from popup_surgery.codecs.bitpack import pack
from popup_surgery.codecs.sources import Reader, bound, check, encode
from popup_surgery.weights.streams import CHUNK
from support import GOLDEN, ROOT

GOLDEN_VECTORS = json.loads((GOLDEN / "source.json").read_text(encoding="utf-8"))["vectors"]

Places = np.ndarray[Any, np.dtype[np.int64]]


def as_the_page_writes(own: list[int], sources: list[int], n: int) -> bytes:
    copies = [one != other for one, other in zip(own, sources, strict=True)]
    width, front = (n - 1).bit_length(), (len(own).bit_length() + 7) // 8
    bits = "".join(f"{source:0{width}b}"[::-1] for source, copy in zip(sources, copies, strict=True) if copy)
    mask = get_codec("range_coded").to_bytes(pack(np.array(copies)), (len(own),), sum(copies))
    indices = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    return sum(copies).to_bytes(front, "little") + indices + mask.tobytes()


def read(data: bytes, own: Places, n: int) -> Places:
    """All sources, after the check, some at a time."""
    packed = np.frombuffer(data, np.uint8)
    assert len(data) in bound(len(own), n)
    check(packed, len(own), n)
    coded = Reader(packed, len(own), n)
    return np.concatenate([coded.take(own[start : start + 7]) for start in range(0, len(own), 7)])


@st.composite
def copied(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Places that take part, their sources, and the number of weights."""
    n = draw(st.integers(2, 300))
    own = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    sources = [draw(st.one_of(st.just(i), st.integers(0, n - 1))) for i in own]
    sources[0] = (own[0] + 1) % n
    return own, sources, n


@given(copied())
@settings(max_examples=40)
@example(([0], [1], 2))
@example(([*range(256)], [*range(1, 256), 0], 256))
@example(([*range(300)], [5, *range(1, 300)], 300))
def test_the_bytes_are_the_pages_and_give_the_sources(case: tuple[list[int], list[int], int]) -> None:
    own, sources, n = case
    data = encode(np.array(own), np.array(sources), n).tobytes()
    assert data == as_the_page_writes(own, sources, n)
    assert read(data, np.array(own), n).tolist() == sources


@pytest.mark.parametrize("vector", GOLDEN_VECTORS, ids=lambda vector: f"{len(vector['own'])} of {vector['n']}")
def test_vectors(vector: dict[str, Any]) -> None:
    own, data = np.array(vector["own"]), bytes.fromhex(vector["bytes"])
    assert read(data, own, vector["n"]).tolist() == vector["sources"]
    assert encode(own, np.array(vector["sources"]), vector["n"]).tobytes() == data


def test_the_example_of_the_page() -> None:
    page = (ROOT / "docs/artifact-format.md").read_text(encoding="utf-8")
    assert f"`{encode(np.array([1, 3, 4, 7, 9]), np.array([1, 8, 4, 7, 0]), 10).tobytes().hex(' ')}`" in page


@pytest.mark.parametrize("vector", GOLDEN_VECTORS, ids=lambda vector: f"{len(vector['own'])} of {vector['n']}")
def test_the_page_reads_the_vectors(vector: dict[str, Any]) -> None:
    own, sources = np.array(vector["own"]), vector["sources"]
    values = np.arange(vector["n"], dtype=np.float32)
    reader(7)["UNPACK"]["source"](np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8), own, values, {}, "5")
    expected = np.arange(vector["n"])
    expected[own] = sources
    assert values.tolist() == expected.tolist()


def test_many_copies_of_a_large_tensor() -> None:
    n, rng = 2**33 + 5, np.random.default_rng(0)
    own = np.arange(2 * CHUNK + 9) * 30_000
    sources = np.where(rng.random(len(own)) < 0.7, rng.integers(0, n, len(own)), own)
    data = encode(own, sources, n)
    check(data, len(own), n)
    coded = Reader(data, len(own), n)
    assert np.array_equal(np.concatenate([coded.take(own[:100]), coded.take(own[100:])]), sources)
    count = int((sources != own).sum())
    limit = sum(math.lgamma(len(own) + 1) - math.lgamma(m + 1) for m in (count, len(own) - count))
    limit = (limit - math.lgamma(len(own) + 1)) / math.log(2)
    assert len(data) <= 1.001 * limit / 8 + 64 + 34 * count / 8 + 5


OWN = np.arange(0, 280, 2)
GOOD = encode(OWN, np.where(OWN % 8 == 0, OWN + 1, OWN), 280).tobytes()  # 35 copies, 9 bits each: 1 + 40 bytes, a mask
WRONG = {
    "none was copied": (b"\0" + GOOD[1:], 140, "has 0 copied weights; expected from 1 to 140"),
    "no weights": (b"\0", 0, "has 0 copied weights; expected from 1 to 0"),
    "nothing": (b"", 5, "has 0 copied weights; expected from 1 to 5"),
    "too many": (bytes([6]) + bytes(20), 5, "has 6 copied weights; expected from 1 to 5"),
    "no indices": (bytes([4]), 5, "has 1 bytes, which are not as many as 4 copied weights take"),
    "a word more": (GOOD + bytes(4), 140, "has other bytes than range_coded writes for its mask"),
    "a byte more": (GOOD + bytes(1), 140, "has 58 bytes, which are not as many as 35 copied weights take"),
    "another count": (bytes([36]) + GOOD[1:], 140, "has 57 bytes, which are not as many as 36 copied weights take"),
    "other copies": (
        GOOD[:-6] + bytes([GOOD[-6] ^ 255]) + GOOD[-5:],
        140,
        "has other bytes|has .* copied weights; exp|has padding bits",
    ),
    "an index too large": (GOOD[:1] + b"\xff\xff" + GOOD[3:], 140, "has the index 511; expected less than 280"),
    "padding": (GOOD[:40] + bytes([GOOD[40] | 128]) + GOOD[41:], 140, "has padding bits that are not 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_bytes_are_refused(name: str) -> None:
    data, kept, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        check(np.frombuffer(data, np.uint8), kept, 280)


@given(st.binary(max_size=40), st.integers(0, 200))
@settings(max_examples=60)
@example(GOOD, 140)
def test_whatever_is_read_is_written_so(data: bytes, kept: int) -> None:
    own = np.arange(kept) + 300  # of no source, so that all copies are told
    try:
        check(np.frombuffer(data, np.uint8), kept, 280)
    except ValueError:
        return
    assert encode(own, Reader(np.frombuffer(data, np.uint8), kept, 280).take(own), 280).tobytes() == data
