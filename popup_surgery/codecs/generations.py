"""How often each of some weights was drawn again, at the entropy limit.

The format is in docs/artifact-format.md, section 10, in integers alone: first how many weights there are of each
generation, then the generations, by the coder of `range_coded` with the frequencies that these numbers give.
"""

import numpy as np
from numpy.typing import NDArray

from ..weights.streams import MOST
from .base import Bytes
from .range_coded import bytes_of, frequencies, model_of, words_of

PIECE = 1 << 20  # weights that are coded at a time

Numbers = NDArray[np.uint16]


def bound(n: int) -> range:
    """Return the possible numbers of bytes for `n` weights: 12 bits each, and the header, at most."""
    return range(2, 2 * n + (MOST + 1) * digits(n) + 64)


def digits(left: int) -> int:
    """Return how many bytes a number of at most `left` takes."""
    return -(-left.bit_length() // 8)


def encode(generations: Numbers) -> Bytes:
    """Return the bytes for the generations of some weights, 0 … MOST, not all 0: uint8 [size]."""
    writer = _Writer(np.bincount(generations).tolist())
    for start in range(0, len(generations), PIECE):
        writer.put(generations[start : start + PIECE])
    return writer.bytes()


def check(data: Bytes, n: int) -> None:
    """Raise ValueError unless these are the bytes that `encode` writes for some `n` weights."""
    reader = Reader(data, n)
    writer, found = _Writer(reader.counts), np.zeros(len(reader.counts), np.int64)
    try:
        for start in range(0, n, PIECE):
            piece = reader.take(min(PIECE, n - start))
            found += np.bincount(piece, minlength=len(found))
            writer.put(piece)
    except AssertionError as error:  # constriction's, for words that no symbols give
        raise ValueError("has bytes that are no generations") from error
    if found.tolist() != reader.counts:
        raise ValueError("has other numbers of weights of each generation than it says")
    if not np.array_equal(writer.bytes(), data):
        raise ValueError("has other bytes than those of its generations")


class Reader:
    """Reads the generations of `n` weights, some at a time. ValueError if the numbers before them are impossible."""

    def __init__(self, data: Bytes, n: int) -> None:
        import constriction

        self.counts: list[int] = []
        left, place = n, 0
        while left:
            if len(self.counts) > MOST:
                raise ValueError(f"has weights that were drawn again more than {MOST:,} times")
            size = digits(left)
            self.counts.append(int.from_bytes(data[place : place + size].tobytes(), "little"))
            left, place = left - self.counts[-1], place + size
            if left < 0 or place > len(data):
                raise ValueError(f"does not say how many of its {n:,} weights there are of each generation")
        if len(self.counts) < 2:
            raise ValueError("has no weight that was drawn again")
        if (len(data) - place) % 4:
            raise ValueError("has bytes that are no whole words")
        self._model = model_of(frequencies(self.counts))
        self._coder = constriction.stream.queue.RangeDecoder(words_of(data[place:]))

    def take(self, count: int) -> Numbers:
        """Return the generations of the next `count` weights."""
        return self._coder.decode(self._model, count).astype(np.uint16)


class _Writer:
    def __init__(self, counts: list[int]) -> None:
        import constriction

        self._model, self._coder = model_of(frequencies(counts)), constriction.stream.queue.RangeEncoder()
        self._front, left = b"", sum(counts)
        for count in counts:
            self._front += count.to_bytes(digits(left), "little")
            left -= count

    def put(self, piece: Numbers) -> None:
        self._coder.encode(piece.astype(np.int32), self._model)

    def bytes(self) -> Bytes:
        return np.concatenate([np.frombuffer(self._front, np.uint8), bytes_of(self._coder)])
