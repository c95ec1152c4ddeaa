"""One bit a weight: uint8 [ceil(n / 8)], least significant bit first, the last byte's unused high bits 0."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..streams import PIECE


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits of a boolean mask in row-major order: uint8 [ceil(n / 8)]."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(packed: NDArray[np.uint8], n: int) -> Iterator[NDArray[np.uint8]]:
    """The `n` bits of a packed mask as 0 and 1, in pieces of uint8 [at most PIECE]."""
    for start in range(0, n, PIECE):
        count = min(PIECE, n - start)
        yield np.unpackbits(packed[start // 8 : -(-(start + count) // 8)], count=count, bitorder="little")


def ones(packed: NDArray[np.uint8]) -> int:
    """How many bits are 1."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def padding_is_zero(packed: NDArray[np.uint8], n: int) -> bool:
    """Whether the bits after the `n`-th are 0."""
    return n % 8 == 0 or int(packed[-1]) >> n % 8 == 0
