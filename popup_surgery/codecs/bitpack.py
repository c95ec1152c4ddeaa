"""One bit per weight: uint8 [ceil(n / 8)], least significant bit first; the unused high bits of the last byte are 0.

Packed masks have this form in memory and in checkpoints too, so this codec is the identity.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..weights.streams import BITS, CHUNK
from .base import Bytes, Codec, Shape, register_codec

# eight words for each byte: 0x05 gives 0xFFFFFFFF 0 0xFFFFFFFF 0 0 0 0 0, to be ANDed with the bits of eight floats
_ALL = np.where(BITS, np.uint32(0xFFFFFFFF), np.uint32(0))


def pack(mask: NDArray[np.bool_]) -> Bytes:
    """Pack a boolean mask in row-major order into bits: uint8 [ceil(n / 8)]."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(packed: Bytes, n: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the `n` bits of a packed mask as words of 32 ones or 32 zeros, in pieces of uint32 [at most CHUNK]."""
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        yield np.take(_ALL, packed[start // 8 : -(-(start + count) // 8)], axis=0).reshape(-1)[:count]


def unpack_mask(packed: Bytes, shape: Shape) -> NDArray[np.bool_]:
    """Return the boolean mask of shape `shape` that `pack` packed."""
    return np.unpackbits(packed, count=math.prod(shape), bitorder="little").view(np.bool_).reshape(shape)


def bits_at(packed: Bytes, start: int, count: int) -> NDArray[np.bool_]:
    """Return `count` bits of a packed mask, from the one with the index `start`."""
    part = packed[start // 8 : -(-(start + count) // 8)]
    return np.unpackbits(part, bitorder="little")[start % 8 :][:count].view(np.bool_)


def ones(packed: Bytes) -> int:
    """Return how many bits are 1."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def padding_is_zero(packed: Bytes, n: int) -> bool:
    """Return whether all bits after the `n`-th are 0."""
    return n % 8 == 0 or int(packed[-1]) >> n % 8 == 0


def _encode(packed: Bytes, shape: Shape) -> Bytes:
    return packed


def _decode(data: Bytes, shape: Shape) -> Bytes:
    if not padding_is_zero(data, math.prod(shape)):
        raise ValueError("has padding bits that are not 0")
    return data


def _bound(shape: Shape) -> range:
    size = -(-math.prod(shape) // 8)
    return range(size, size + 1)


register_codec(Codec("bitpack", _encode, _decode, _bound))
