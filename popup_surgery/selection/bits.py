"""Magnitudes of float32 numbers as integers: their bit patterns without the sign order like they do."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign
CHUNK = 1 << 16  # elements a sweep holds in cache

Bits = NDArray[np.int32]


def bits_of(score: Tensor) -> Bits:
    """The bit patterns of a score's elements in row-major order, without a copy where it is contiguous."""
    return score.detach().contiguous().view(-1).view(torch.int32).numpy()


def in_pieces(array: NDArray) -> list[NDArray]:
    """`array` in pieces that stay in cache."""
    return [array[i : i + CHUNK] for i in range(0, len(array), CHUNK)]
