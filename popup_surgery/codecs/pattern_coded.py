"""Masks of N of each M neighbours at the entropy limit: for each group, which of the C(M, N) choices it is.

The format is in docs/artifact-format.md, section 9, in integers alone. The coder is that of `range_coded`, and all
choices of a group are as frequent as each other, which is constriction's model `Uniform`.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..selection.pattern import Pattern
from .base import Bytes, Codec, Shape, register_codec
from .range_coded import bytes_of, words_of

PIECE = 1 << 20  # weights that are coded at a time


def choices(size: int, keep: int) -> NDArray[np.int32]:
    """Return all ways to keep `keep` of `size` neighbours, in ascending order: bit j is 1 if neighbour j is kept."""
    numbers = np.arange(1 << size, dtype=np.int32)
    return numbers[np.bitwise_count(numbers) == keep]


def obeys(packed: Bytes, shape: Shape, pattern: Pattern) -> bool:
    """Return whether a packed mask keeps N of each M neighbours."""
    for bits, channels in _pieces(packed, math.prod(shape), pattern):
        for group, keep in pattern.in_groups(bits, channels):
            kept = group[:, :, 0].copy()  # a sum over an axis is several times as slow
            for j in range(1, group.shape[2]):
                kept += group[:, :, j]
            if not (kept == keep).all():
                return False
    return True


def _pieces(packed: Bytes, n: int, pattern: Pattern) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Yield the bits of whole groups in pieces, and how many channels the rows of each piece have."""
    for piece, channels in pattern.pieces(n, PIECE):
        first = piece.start // 8
        bits = np.unpackbits(packed[first : -(-piece.stop // 8)], bitorder="little")
        yield bits[piece.start - 8 * first :][: piece.stop - piece.start], channels


def together(count: int) -> int:
    """Return how many groups with `count` choices each are one symbol: as many as give at most 256, at least one."""
    many = 1
    while count ** (many + 1) <= 256:
        many += 1
    return many


class _Coder:
    """A range coder of choices, and the groups that do not fill a symbol yet.

    Args:
        coder: of constriction, for writing or for reading.
        count: choices of a group.
    """

    def __init__(self, coder: Any, count: int) -> None:
        import constriction

        self.coder, self.many = coder, together(count)
        self.model = constriction.stream.model.Uniform(count**self.many)  # ⌊2²⁴ / size⌋ each, and the last the rest
        self.powers = count ** np.arange(self.many, dtype=np.int32)
        self.digits = np.arange(count**self.many, dtype=np.int32)[:, None] // self.powers % count
        self.left = np.empty(0, np.int32)

    def put(self, found: NDArray[np.int32]) -> None:
        """Write the choices of some groups."""
        self.left = np.concatenate([self.left, found])
        whole = self.left.size // self.many * self.many
        self.coder.encode(self.left[:whole].reshape(-1, self.many) @ self.powers, self.model)
        self.left = self.left[whole:]

    def finish(self) -> None:
        """Write what fills no symbol, with first choices behind it."""
        self.put(np.zeros(-self.left.size % self.many, np.int32))

    def take(self, size: int) -> NDArray[np.int32]:
        """Read the choices of the next `size` groups."""
        symbols = self.coder.decode(self.model, max(0, -(-(size - self.left.size) // self.many)))
        found = np.concatenate([self.left, self.digits[symbols].reshape(-1)])
        self.left = found[size:]
        return found[:size]


def _encode(packed: Bytes, shape: Shape, pattern: Pattern) -> Bytes:
    import constriction

    n, coder = math.prod(shape), constriction.stream.queue.RangeEncoder()
    for _, _, size, keep in pattern.sections:
        found = choices(size, keep)
        if len(found) == 1:
            continue
        places = np.full(1 << size, -1, np.int32)
        places[found] = np.arange(len(found))
        writer = _Coder(coder, len(found))
        for bits, channels in _pieces(packed, n, pattern):
            for group, _ in pattern.in_groups(bits, channels):
                if group.shape[2] != size:
                    continue
                numbers = np.zeros(group[:, :, 0].shape, np.int32)
                for j in range(size):
                    numbers |= group[:, :, j].astype(np.int32) << j
                symbols = places[numbers].reshape(-1)
                if symbols.min(initial=0) < 0:
                    raise ValueError(f"does not keep {pattern.keep} of each {pattern.of} neighbours")
                writer.put(symbols)
        writer.finish()
    return bytes_of(coder)


def _decode(data: Bytes, shape: Shape, pattern: Pattern) -> Bytes:
    packed = np.zeros(-(-math.prod(shape) // 8), np.uint8)
    try:
        _read(words_of(data), packed, math.prod(shape), pattern)
    except AssertionError as error:  # constriction's, for words that no symbols give
        raise ValueError("has bytes that are no mask") from error
    if not np.array_equal(_encode(packed, shape, pattern), data):
        raise ValueError("has other bytes than pattern_coded writes for its mask")
    return packed


def _read(words: NDArray[np.uint32], packed: Bytes, n: int, pattern: Pattern) -> None:
    """Set the bits of `packed`, which are 0."""
    import constriction

    coder = constriction.stream.queue.RangeDecoder(words)
    for _, _, size, keep in pattern.sections:
        found = choices(size, keep)
        reader = _Coder(coder, len(found)) if len(found) > 1 else None
        for piece, channels in pattern.pieces(n, PIECE):
            bits = np.zeros(piece.stop - piece.start, np.uint8)
            for group, _ in pattern.in_groups(bits, channels):
                if group.shape[2] != size:
                    continue
                shape = group[:, :, 0].shape
                symbols = 0 if reader is None else reader.take(math.prod(shape))
                numbers = np.broadcast_to(found[symbols], math.prod(shape)).reshape(shape)
                for j in range(size):
                    group[:, :, j] = numbers >> j & 1
            first = piece.start // 8
            packed[first : -(-piece.stop // 8)] |= np.packbits(
                np.concatenate([np.zeros(piece.start - 8 * first, np.uint8), bits]), bitorder="little"
            )


def _bound(shape: Shape, pattern: Pattern) -> range:
    """Return the multiples of 4 from three quarters of the limit to a thousandth and 64 bytes above it."""
    least = pattern.bits(math.prod(shape)) / 8
    if not least:
        return range(1)
    return range(max(4, int(0.75 * least) // 4 * 4 - 8), int(1.001 * least) // 4 * 4 + 69, 4)


register_codec(Codec("pattern_coded", _encode, _decode, _bound, needs_pattern=True))
