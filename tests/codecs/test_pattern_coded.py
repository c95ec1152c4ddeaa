"""The encoding `pattern_coded`: the page's bytes, its vectors, its limit, and damaged bytes."""

import json
import math
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coder import Writer
from popup_surgery.codecs import CODECS, pattern_coded
from popup_surgery.codecs.bitpack import pack
from popup_surgery.codecs.pattern_coded import choices, obeys
from popup_surgery.selection.pattern import Pattern
from support import GOLDEN

CODEC = CODECS["pattern_coded"]
VECTORS = json.loads((GOLDEN / "pattern_coded.json").read_text(encoding="utf-8"))["vectors"]

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def groups(pattern: Pattern, rows: int) -> list[list[tuple[Any, ...]]]:
    """Where the groups are in a mask [rows, channels, stride]: the whole ones, and the remainders."""
    found: list[list[tuple[Any, ...]]] = [[], []]
    for row in range(rows):
        for start in range(0, pattern.channels, pattern.of):
            stop = min(start + pattern.of, pattern.channels)
            for place in range(pattern.stride):
                found[stop - start < pattern.of].append((row, slice(start, stop), place))
    return found


def random_mask(pattern: Pattern, rows: int, seed: int) -> Mask:
    mask, random = np.zeros((rows, pattern.channels, pattern.stride), np.bool_), np.random.default_rng(seed)
    for place in chain(*groups(pattern, rows)):
        size = mask[place].size
        kept = np.zeros(size, np.bool_)
        kept[random.permutation(size)[: math.ceil(size * pattern.keep / pattern.of)]] = True
        mask[place] = kept
    return mask


def as_the_page_writes(mask: Mask, pattern: Pattern) -> bytes:
    writer, wrote = Writer(), False
    for places in groups(pattern, len(mask)):
        if not places:
            continue
        size = mask[places[0]].size
        keep = math.ceil(size * pattern.keep / pattern.of)
        numbers = sorted(sum(1 << i for i in kept) for kept in combinations(range(size), keep))
        if (count := len(numbers)) == 1:
            continue
        together = max(g for g in range(1, 9) if g == 1 or count**g <= 256)
        found = [numbers.index(sum(1 << j for j in np.flatnonzero(mask[place]))) for place in places]
        found += [0] * (-len(found) % together)
        symbols = [
            sum(index * count**i for i, index in enumerate(found[start : start + together]))
            for start in range(0, len(found), together)
        ]
        each, last = 2**24 // count**together, count**together - 1
        writer.put(symbols, [each] * last + [2**24 - each * last])
        wrote = True
    return writer.bytes() if wrote else b""


def encoded(mask: Mask, pattern: Pattern) -> np.ndarray:
    return CODEC.to_bytes(pack(mask), mask.shape, int(mask.sum()), pattern)


def decoded(data: np.ndarray, mask: Mask, pattern: Pattern) -> np.ndarray:
    return CODEC.to_bits(data, mask.shape, int(mask.sum()), pattern)


@st.composite
def cases(draw: Any) -> tuple[Mask, Pattern]:
    of = draw(st.integers(2, 9) | st.just(16))
    pattern = Pattern(draw(st.integers(1, of - 1)), of, draw(st.integers(1, 40)), draw(st.integers(1, 5)))
    return random_mask(pattern, draw(st.integers(1, 9)), draw(st.integers(0, 99))), pattern


@given(case=cases())
@example((random_mask(Pattern(8, 16, 50, 2), 4, 0), Pattern(8, 16, 50, 2)))
@example((random_mask(Pattern(2, 4, 1, 9), 4, 0), Pattern(2, 4, 1, 9)))
@settings(max_examples=150, deadline=None)
def test_the_bytes_are_those_of_the_page(case: tuple[Mask, Pattern]) -> None:
    mask, pattern = case
    data = encoded(mask, pattern)
    assert data.tobytes() == as_the_page_writes(mask, pattern)
    assert data.size in CODEC.sizes(mask.shape, int(mask.sum()), pattern)
    assert np.array_equal(decoded(data, mask, pattern), pack(mask))
    assert obeys(pack(mask), mask.shape, pattern)
    assert 8 * data.size <= 1.001 * pattern.bits(mask.size) + 64 * 8


@pytest.mark.parametrize("piece", [1, 50, 333])
def test_pieces_change_no_byte(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in (Pattern(2, 4, 11, 3), Pattern(1, 3, 60, 1), Pattern(2, 4, 9, 20)):
        mask = random_mask(pattern, 7, piece)
        whole = encoded(mask, pattern)
        with monkeypatch.context() as patch:
            patch.setattr(pattern_coded, "PIECE", piece)
            assert np.array_equal(encoded(mask, pattern), whole)
            assert np.array_equal(decoded(whole, mask, pattern), pack(mask))
            assert obeys(pack(mask), mask.shape, pattern)


@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (4, 8), (1, 4), (1, 8), (3, 7), (8, 16), (5, 16)])
@pytest.mark.parametrize("which", ["random", "first", "last"])
def test_the_limit_holds_for_a_large_layer(keep: int, of: int, which: str) -> None:
    pattern = Pattern(keep, of, 16 * 7 * 9, 1)
    count = math.comb(of, keep)
    indices = {
        "random": np.random.default_rng(of).integers(0, count, (200, pattern.channels // of)),
        "first": np.zeros((200, pattern.channels // of), np.int64),
        "last": np.full((200, pattern.channels // of), count - 1),
    }[which]
    if pattern.channels % of:
        pattern = Pattern(keep, of, pattern.channels // of * of, 1)
    mask = (choices(of, keep)[indices][..., None] >> np.arange(of) & 1).astype(np.bool_).reshape(200, -1)
    data = encoded(mask, pattern)
    assert 8 * data.size <= 1.001 * pattern.bits(mask.size) + 64 * 8
    assert data.size in CODEC.sizes(mask.shape, 0, pattern)
    assert np.array_equal(decoded(data, mask, pattern), pack(mask))


def test_two_of_four_takes_less_than_two_thirds_of_a_bit() -> None:
    pattern = Pattern(2, 4, 576, 1)
    mask = random_mask(pattern, 64, 0)
    assert 8 * encoded(mask, pattern).size / mask.size < 0.648


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: "{keep}:{of} of {channels} × {stride}".format(**v["pattern"]))
def test_vectors(vector: dict[str, Any]) -> None:
    pattern, shape = Pattern(**vector["pattern"]), (vector["n"],)
    packed = np.frombuffer(bytes.fromhex(vector["packed"]), np.uint8)
    assert CODEC.to_bytes(packed, shape, 0, pattern).tobytes().hex() == vector["bytes"]
    data = np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8)
    assert np.array_equal(CODEC.to_bits(data, shape, 0, pattern), packed)


# --- damaged bytes ---------------------------------------------------------------------------------------------------


@given(case=cases(), more=st.binary(min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_follows_a_mask_is_refused(case: tuple[Mask, Pattern], more: bytes) -> None:
    mask, pattern = case
    with pytest.raises(ValueError, match=r"^(has|buffer)"):
        decoded(np.append(encoded(mask, pattern), np.frombuffer(more, np.uint8)), mask, pattern)


@given(case=cases(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_words_are_a_mask_of_these_bytes_or_refused(case: tuple[Mask, Pattern], data: Any) -> None:
    mask, pattern = case
    words = data.draw(st.lists(st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1), max_size=8))
    given = np.array(words, "<u4").view(np.uint8)
    try:
        bits = decoded(given, mask, pattern)
    except ValueError:
        return
    assert obeys(bits, mask.shape, pattern)
    assert np.array_equal(CODEC.to_bytes(bits, mask.shape, 0, pattern), given)


def test_bytes_that_no_mask_has_say_so() -> None:
    pattern = Pattern(2, 4, 64, 1)
    mask = random_mask(pattern, 100, 0)
    with pytest.raises(ValueError, match="has bytes that are no mask"):
        decoded(np.full(encoded(mask, pattern).size, 255, np.uint8), mask, pattern)
    with pytest.raises(ValueError, match="has other bytes than pattern_coded writes for its mask"):
        decoded(np.append(encoded(mask, pattern), np.zeros(4, np.uint8)), mask, pattern)
    with pytest.raises(ValueError, match="does not keep 2 of each 4 neighbours"):
        encoded(~np.zeros_like(mask), pattern)
    assert not obeys(pack(~np.zeros_like(mask)), mask.shape, pattern)
