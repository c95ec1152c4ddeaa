"""Masks at the entropy limit, by a range coder. The format is in docs/artifact-format.md, section 6, in integers alone.

A mask is written as bytes of the packed mask, or, where its ones or its zeros are rare, as the gaps between those. The
coder and its fixed-point models are constriction's (Bamler, "Understanding Entropy Coding With Asymmetric Numeral
Systems", 2022); `frequencies` gives it numbers that it does not round.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Bytes, Codec, Shape, register_codec
from .bitpack import padding_is_zero

TOTAL = 1 << 24  # what the frequencies of a model's symbols add up to
RARE = 64  # fewer than one in so many weights are written as gaps
GAPS = 1 << 16  # gaps whose digits stand together
PIECE = 1 << 20  # bytes that are coded at a time


def frequencies(weights: list[int]) -> list[int]:
    """Return integers of at least 1 that add up to `TOTAL`, nearly in proportion to some weights, not all 0."""
    total = sum(weights)
    found = [1 + weight * (TOTAL - len(weights)) // total for weight in weights]
    found[weights.index(max(weights))] += TOTAL - sum(found)
    return found


def byte_frequencies(n: int, kept: int) -> list[int]:
    """Return the frequency of each byte of a packed mask of `n` weights that keeps `kept`."""
    by_count = [kept**count * (n - kept) ** (8 - count) for count in range(9)]
    return frequencies([by_count[byte.bit_count()] for byte in range(256)])


def gap_frequencies(n: int, rare: int) -> list[list[int]]:
    """Return the frequencies of each digit of a gap in base 256, the lowest digit first.

    Gaps between rare bits are geometric, so that their digits are independent. Fixed-point numbers with 64 bits.
    """
    tables: list[list[int]] = []
    base, weight = ((n - rare) << 64) // n, 1 << 64
    while not tables or 256 ** len(tables) <= n - rare:
        weights = []
        for _ in range(256):
            weights.append(weight)
            weight = weight * base >> 64
        tables.append(frequencies(weights))
        base, weight = weight, 1 << 64
    return tables


def model_of(table: list[int]) -> Any:
    """Return constriction's model of symbols with these frequencies."""
    import constriction

    # constriction adds 1 to each, and scales the rest to what is left of TOTAL, which it is already: every float here
    # is exact
    return constriction.stream.model.Categorical(np.array(table, np.float64) - 1, perfect=False)


def _encode(packed: Bytes, shape: Shape, kept: int) -> Bytes:
    n = math.prod(shape)
    if kept in (0, n):
        return np.empty(0, np.uint8)
    import constriction

    coder, rare = constriction.stream.queue.RangeEncoder(), min(kept, n - kept)
    if rare * RARE < n:
        models = [model_of(table) for table in gap_frequencies(n, rare)]
        for gaps in _gaps(packed, n, kept > rare):
            for digit, model in enumerate(models):
                coder.encode((gaps >> 8 * digit & 255).astype(np.int32), model)
    else:
        model = model_of(byte_frequencies(n, kept))
        for start in range(0, packed.size, PIECE):
            coder.encode(packed[start : start + PIECE].astype(np.int32), model)
    return bytes_of(coder)


def bytes_of(coder: Any) -> Bytes:
    """Return what a range encoder of constriction has written."""
    return coder.get_compressed().astype("<u4", copy=False).view(np.uint8)


def words_of(data: Bytes) -> NDArray[np.uint32]:
    """Return the words that `bytes_of` wrote, for a range decoder."""
    return np.frombuffer(data.tobytes(), "<u4").astype(np.uint32)


def _gaps(packed: Bytes, n: int, zeros: bool) -> Iterator[NDArray[np.int64]]:
    """Yield how many other bits lie before each 1, or 0, since the last one: int64 [at most GAPS]."""
    left, last = np.empty(0, np.int64), -1
    for start in range(0, packed.size, PIECE):
        piece = packed[start : start + PIECE]
        bits = np.unpackbits(~piece if zeros else piece, count=min(8 * PIECE, n - 8 * start), bitorder="little")
        places = np.flatnonzero(bits) + 8 * start
        left = np.concatenate([left, np.diff(places, prepend=last) - 1])
        last = places[-1] if places.size else last
        whole = left.size // GAPS * GAPS
        yield from left[:whole].reshape(-1, GAPS)
        left = left[whole:]
    if left.size:
        yield left


def _decode(data: Bytes, shape: Shape, kept: int) -> Bytes:
    n = math.prod(shape)
    packed, rare = np.zeros(-(-n // 8), np.uint8), min(kept, n - kept)
    if rare:
        try:
            _read(words_of(data), packed, n, kept)
        except AssertionError as error:  # constriction's, for words that no symbols give
            raise ValueError("has bytes that are no mask") from error
    if rare * RARE < n and kept > rare:
        np.invert(packed, out=packed)
        packed[-1] &= 0xFF >> -n % 8
    if not np.array_equal(_encode(packed, shape, kept), data):
        raise ValueError("has other bytes than range_coded writes for its mask")
    return packed


def _read(words: NDArray[np.uint32], packed: Bytes, n: int, kept: int) -> None:
    """Set the bits of `packed`, which are 0: those that are 1, or if these are not rare but zeros are, the zeros'."""
    import constriction

    coder, rare = constriction.stream.queue.RangeDecoder(words), min(kept, n - kept)
    if rare * RARE >= n:
        model = model_of(byte_frequencies(n, kept))
        for start in range(0, packed.size, PIECE):
            packed[start : start + PIECE] = coder.decode(model, min(PIECE, packed.size - start))
        if not padding_is_zero(packed, n):
            raise ValueError("has padding bits that are not 0")
        return
    models, last = [model_of(table) for table in gap_frequencies(n, rare)], -1
    for start in range(0, rare, GAPS):
        gaps = np.zeros(min(GAPS, rare - start), np.int64)
        for digit, model in enumerate(models):
            gaps += coder.decode(model, gaps.size).astype(np.int64) << 8 * digit
        places = last + np.cumsum(gaps + 1)
        if max(gaps.max(), places[-1]) >= n:
            raise ValueError(f"has a gap that ends after the {n:,} weights")
        np.bitwise_or.at(packed, places >> 3, (1 << (places & 7)).astype(np.uint8))
        last = places[-1]


def _bound(shape: Shape, kept: int) -> range:
    """Return the multiples of 4 from less than half of the limit to a thousandth and 64 bytes above it."""
    n = math.prod(shape)
    rare = min(kept, n - kept)
    if not rare:
        return range(1)
    rare = min(rare, 1 << 60)  # more than a file can hold, and still a float
    least = rare * (math.log2(n) - math.log2(rare)) / 8  # bytes; log2 C(n, rare) is at most 1.45 bits a one more
    low = max(4, int(0.45 * least) // 4 * 4 - 16)
    return range(low, int(1.001 * (least + 1.45 / 8 * rare)) // 4 * 4 + 69, 4)


register_codec(Codec("range_coded", _encode, _decode, _bound, needs_kept=True))
