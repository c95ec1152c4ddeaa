"""Magnitudes of float32 numbers as integers: bit patterns without the sign have the same order as the magnitudes.

number      bit pattern    without the sign
0.5         0x3F000000     0x3F000000
−1.0        0xBF800000     0x3F800000     larger than 0.5's
1.0000001   0x3F800001     0x3F800001     the next magnitude, the next integer
∞           0x7F800000     0x7F800000
NaN         0x7FC00000     0x7FC00000     above ∞
−0.0        0x80000000     0x00000000     a tie with 0.0
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign
CHUNK = 1 << 16  # elements of one piece, which fits in cache

Bits = NDArray[np.int32]
Found = tuple[tuple[Tensor, ...], int, int]  # what a backend finds: masks, threshold and last of a `Selection`


def bits_of(score: Tensor) -> Bits:
    """Return the bit patterns of a score's elements in row-major order. A contiguous score is not copied."""
    # `numpy()` would forbid that the memory is freed, as `fully_shard` frees that of whole parameters
    array: Bits = np.from_dlpack(score.detach().contiguous().view(-1).view(torch.int32))  # type: ignore[assignment]
    return array


def in_pieces(array: NDArray) -> list[NDArray]:
    """Split `array` into pieces that fit in cache."""
    return [array[i : i + CHUNK] for i in range(0, len(array), CHUNK)]
