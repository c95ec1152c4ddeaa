"""One bit a weight: uint8 [ceil(n / 8)], least significant bit first, the last byte's unused high bits 0."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..weights.streams import BITS, CHUNK

# of each byte the eight words: 0x05 gives 0xFFFFFFFF 0 0xFFFFFFFF 0 0 0 0 0, to be and-ed with the bits of eight floats
_ALL = np.where(BITS, np.uint32(0xFFFFFFFF), np.uint32(0))


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits of a boolean mask in row-major order: uint8 [ceil(n / 8)]."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(packed: NDArray[np.uint8], n: int) -> Iterator[NDArray[np.uint32]]:
    """The `n` bits of a packed mask, all 32 bits of an element 1 or 0, in pieces of uint32 [at most CHUNK]."""
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        yield np.take(_ALL, packed[start // 8 : -(-(start + count) // 8)], axis=0).reshape(-1)[:count]


def ones(packed: NDArray[np.uint8]) -> int:
    """How many bits are 1."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def padding_is_zero(packed: NDArray[np.uint8], n: int) -> bool:
    """Whether the bits after the `n`-th are 0."""
    return n % 8 == 0 or int(packed[-1]) >> n % 8 == 0
