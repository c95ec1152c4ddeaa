"""The encoding `range_coded`: the page's coder in whole numbers, its vectors, its limit, and damaged bytes."""

import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coder import Writer
from popup_surgery.codecs import CODECS
from popup_surgery.codecs.bitpack import ones, pack
from popup_surgery.codecs.range_coded import GAPS, TOTAL, byte_frequencies, gap_frequencies
from support import GOLDEN

CODEC = CODECS["range_coded"]
RECORDED = json.loads((GOLDEN / "range_coded.json").read_text(encoding="utf-8"))

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def encoded(mask: Mask) -> np.ndarray:
    return CODEC.to_bytes(pack(mask), mask.shape, int(mask.sum()))


def decoded(data: np.ndarray, mask: Mask) -> np.ndarray:
    return CODEC.to_bits(data, mask.shape, int(mask.sum()))


def limit(mask: Mask) -> float:
    """The bits that the format promises."""
    n, kept = mask.size, int(mask.sum())
    ways = (math.lgamma(n + 1) - math.lgamma(kept + 1) - math.lgamma(n - kept + 1)) / math.log(2)
    return 1.001 * ways + 64 * 8


def arranged(n: int, kept: int, how: str) -> Mask:
    """A mask of `n` weights that keeps `kept`: these at the beginning, the end, evenly, in bytes, or at random."""
    places = {
        "beginning": lambda: np.arange(kept),
        "end": lambda: n - 1 - np.arange(kept),
        "even": lambda: (np.arange(kept) * (n / max(kept, 1))).astype(np.int64),
        "random": lambda: np.random.default_rng([n, kept]).permutation(n)[:kept],
    }[how]()
    mask = np.zeros(n, np.bool_)
    mask[places] = True
    return mask


WAYS = ("beginning", "end", "even", "random")


@st.composite
def masks(draw: Any, largest: int = 20_000) -> Mask:
    n = draw(st.integers(1, 2 ** draw(st.integers(1, largest.bit_length()))))
    rare = draw(st.integers(0, n // draw(st.sampled_from([2, 30, 64, 65, 1000]))))
    mask = arranged(n, rare, draw(st.sampled_from(WAYS)))
    return ~mask if draw(st.booleans()) else mask


# --- the page's coder, which needs no library ------------------------------------------------------------------------


def as_the_page_writes(mask: Mask) -> bytes:
    n, kept = mask.size, int(mask.sum())
    rare, writer = min(kept, n - kept), Writer()
    if not rare:
        return b""
    if 64 * rare >= n:
        writer.put(pack(mask).tolist(), byte_frequencies(n, kept))
        return writer.bytes()
    places = np.flatnonzero(mask if kept == rare else ~mask)
    gaps = (np.diff(places, prepend=-1) - 1).tolist()
    for start in range(0, rare, 65_536):
        for digit, frequencies in enumerate(gap_frequencies(n, rare)):
            writer.put((gap >> 8 * digit & 255 for gap in gaps[start : start + 65_536]), frequencies)
    return writer.bytes()


@given(mask=masks())
@example(mask=arranged(2**15, 1, "end"))
@example(mask=~arranged(2**15, 1, "beginning"))
@example(mask=arranged(640, 10, "random"))  # the last that is written in bytes
@example(mask=arranged(641, 10, "random"))  # the first that is written in gaps
@settings(max_examples=150, deadline=None)
def test_the_bytes_are_those_of_the_page(mask: Mask) -> None:
    data = encoded(mask)
    assert data.tobytes() == as_the_page_writes(mask)
    assert data.size in CODEC.sizes(mask.shape, int(mask.sum()))
    assert np.array_equal(decoded(data, mask), pack(mask))


@pytest.mark.slow
def test_more_gaps_than_one_block_has() -> None:
    mask = arranged(65 * (GAPS + 1000), GAPS + 1000, "random")
    data = encoded(mask)
    assert data.tobytes() == as_the_page_writes(mask)
    assert np.array_equal(decoded(data, mask), pack(mask))


@pytest.mark.parametrize("n", [1 << 33, 1 << 27, 1000, 2])
def test_frequencies_are_whole_numbers_that_fill_the_scale(n: int) -> None:
    for kept in {1, n // 3, n // 2, n - 1} - {0}:
        tables = [byte_frequencies(n, kept), *gap_frequencies(n, min(kept, n - kept))]
        for table in tables:
            assert len(table) == 256
            assert sum(table) == TOTAL
            assert min(table) >= 1
    assert len(gap_frequencies(1 << 33, 1)) == 5


@pytest.mark.parametrize("vector", RECORDED["vectors"], ids=lambda v: f"{v['kept']} of {v['n']}")
def test_vectors(vector: dict[str, Any]) -> None:
    n, rule = vector["n"], vector["mask"]
    mask = np.zeros(n, np.bool_)
    if "packed" in rule:
        mask = np.unpackbits(np.frombuffer(bytes.fromhex(rule["packed"]), np.uint8), count=n, bitorder="little") > 0
    else:
        mask[rule["first"] :: rule["step"]] = True
        mask ^= rule["inverted"]
    assert hashlib.sha256(pack(mask).tobytes()).hexdigest() == vector["mask_sha256"]
    assert mask.sum() == vector["kept"]
    data = encoded(mask)
    if "bytes" in vector:
        assert data.tobytes().hex() == vector["bytes"]
    else:
        assert hashlib.sha256(data.tobytes()).hexdigest() == vector["bytes_sha256"]
    assert np.array_equal(decoded(data, mask), pack(mask))


# --- the limit -------------------------------------------------------------------------------------------------------


@given(mask=masks(largest=300_000))
@settings(max_examples=150, deadline=None)
def test_no_mask_takes_more_than_the_limit(mask: Mask) -> None:
    assert 8 * encoded(mask).size <= limit(mask)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "how"), [(2**22 + 3, "random"), (2**24, "beginning"), (2**24, "end"), (2**27, "even")])
def test_no_mask_of_a_large_layer_takes_more_than_the_limit(n: int, how: str) -> None:
    for kept in (1, 2, 10, 1000, n // 4000, n // 65, n // 64 + 1, n // 33):
        for mask in (found := arranged(n, kept, how), ~found):
            data = encoded(mask)
            assert 8 * data.size <= limit(mask), (kept, how)
            assert np.array_equal(decoded(data, mask), pack(mask))


# --- damaged bytes ---------------------------------------------------------------------------------------------------


def refused(data: np.ndarray, mask: Mask) -> bool:
    try:
        bits = decoded(data, mask)
    except ValueError:
        return True
    return ones(bits) != mask.sum()  # which the reader of artifacts refuses


@given(mask=masks(), more=st.binary(min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_what_follows_a_mask_is_refused(mask: Mask, more: bytes) -> None:
    assert refused(np.append(encoded(mask), np.frombuffer(more, np.uint8)), mask)


@given(mask=masks(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_words_are_a_mask_of_these_bytes_or_refused(mask: Mask, data: Any) -> None:
    words = data.draw(st.lists(st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1), max_size=8))
    given = np.array(words, "<u4").view(np.uint8)
    try:
        bits = decoded(given, mask)
    except ValueError:
        return
    assert bits.size == -(-mask.size // 8)
    if ones(bits) == mask.sum():
        assert np.array_equal(CODEC.to_bytes(bits, mask.shape, int(mask.sum())), given)


def test_bytes_that_no_mask_has_say_so() -> None:
    mask = arranged(6400, 3000, "random")
    full = np.full(encoded(mask).size, 255, np.uint8)
    with pytest.raises(ValueError, match="has bytes that are no mask"):
        decoded(full, mask)
    few = arranged(6400, 3, "random")
    with pytest.raises(ValueError, match=r"has (a gap that ends after the 6,400 weights|bytes that are no mask)"):
        decoded(np.full(8, 250, np.uint8), few)
    with pytest.raises(ValueError, match="has other bytes than range_coded writes for its mask"):
        decoded(np.append(encoded(few), np.zeros(4, np.uint8)), few)
