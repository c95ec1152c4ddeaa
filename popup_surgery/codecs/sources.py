"""Which of some weights have the values of others, and whose: the mask at the entropy limit, the indices in whole bits.

The format is in docs/artifact-format.md, section 14.
"""

import numpy as np
from numpy.typing import NDArray

from ..weights.streams import CHUNK, Sources
from .base import Bytes, get_codec
from .bitpack import bits_at, ones, pack, padding_is_zero
from .generations import digits


def bound(kept: int, numel: int) -> range:
    """Return the possible numbers of bytes for `kept` weights of a tensor of `numel`."""
    return range(2, digits(kept) + _size(kept, numel) + get_codec("range_coded").sizes((kept,), kept // 2).stop)


def encode(own: Sources, sources: Sources, numel: int) -> Bytes:
    """Return the bytes for some weights of a tensor, at least one of which is copied: uint8 [size].

    Args:
        own, sources: int64 [kept]: their places in the flattened tensor, and the places that their values are from.
    """
    copied = sources != own
    count, indices = int(copied.sum()), sources[copied]
    front = count.to_bytes(digits(len(own)), "little")
    packed = [_pack(indices[start : start + CHUNK], numel) for start in range(0, count, CHUNK)]
    mask = get_codec("range_coded").to_bytes(pack(copied), (len(own),), count)
    return np.concatenate([np.frombuffer(front, np.uint8), *packed, mask])


def check(data: Bytes, kept: int, numel: int) -> None:
    """Raise ValueError unless `encode` could write these bytes for `kept` weights of a tensor of `numel`."""
    Reader(data, kept, numel).check()


class Reader:
    """Reads whose values `kept` weights of a tensor of `numel` have, some at a time. ValueError for damaged bytes."""

    def __init__(self, data: Bytes, kept: int, numel: int) -> None:
        front = digits(kept)
        self._count, self._numel = int.from_bytes(data[:front].tobytes(), "little"), numel
        if not 0 < self._count <= kept:
            raise ValueError(f"has {self._count:,} copied weights; expected from 1 to {kept:,}")
        self._indices, coded = np.split(data[front:], [_size(self._count, numel)])
        codec = get_codec("range_coded")
        if len(self._indices) != _size(self._count, numel) or len(coded) not in codec.sizes((kept,), self._count):
            raise ValueError(f"has {len(data):,} bytes, which are not as many as {self._count:,} copied weights take")
        self._copied = codec.to_bits(coded, (kept,), self._count)
        if ones(self._copied) != self._count:
            raise ValueError(f"has {ones(self._copied):,} copied weights; expected {self._count:,}, as it says")
        self._place = self._read = 0

    def take(self, own: Sources) -> Sources:
        """Return whose values the next weights have, which lie at the places `own`: int64, of the same length."""
        copied = bits_at(self._copied, self._place, len(own))
        found = own.copy()
        found[copied] = self._next(int(copied.sum()))
        self._place += len(own)
        return found

    def check(self) -> None:
        """Raise ValueError if an index is too large, or a bit after the last one is 1."""
        if not padding_is_zero(self._indices, self._count * _bits(self._numel)):
            raise ValueError("has padding bits that are not 0")
        while self._read < self._count:
            largest = int(self._next(min(CHUNK, self._count - self._read)).max())
            if largest >= self._numel:
                raise ValueError(
                    f"has the index {largest:,}; expected less than {self._numel:,}, the weights there are"
                )

    def _next(self, count: int) -> Sources:
        bits = _bits(self._numel)
        wide: NDArray[np.bool_] = np.zeros((count, 64), np.bool_)
        wide[:, :bits] = bits_at(self._indices, self._read * bits, count * bits).reshape(count, bits)
        self._read += count
        return np.packbits(wide, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.int64)


def _pack(indices: Sources, numel: int) -> Bytes:
    every = np.unpackbits(indices.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(every[:, : _bits(numel)], bitorder="little")


def _bits(numel: int) -> int:
    """Return how many bits an index of a weight takes."""
    return (numel - 1).bit_length()


def _size(count: int, numel: int) -> int:
    return -(-count * _bits(numel) // 8)
