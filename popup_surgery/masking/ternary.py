"""Weights of the values −c, 0 and +c at two bits each: a byte for four of them, and a table of all bytes."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..weights.streams import BITS

_OF_ITS_OWN = 1 << 20  # bytes from which a weight gets memory of its own
_PIECE = 1 << 16  # bytes made into weights at a time, so that NumPy's wide indices of them stay in cache


@cache
def _signs_of_bytes() -> Tensor:
    """Return −1, 0 or 1 for each of the four weights in a byte, int8 [256, 4]: the low half is signs, the high half
    says which are kept; lowest bit first."""
    signs, kept = np.tile(BITS[:16, :4], (16, 1)), np.repeat(BITS[:16, :4], 16, axis=0)
    return torch.from_numpy(np.where(kept, np.where(signs, 1, -1), 0).astype(np.int8))


def unpack(codes: Tensor, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weights that `codes` stand for: a new contiguous tensor with the dtype and device of `value`.

    For tracers it is the operator `popup_surgery::unpack`, so that a graph of `torch.compile` or `torch.export` has it
    as one node. The first call of such an operator imports the whole compiler, some 160 MB; so others do without.

    Args:
        codes: uint8 [ceil(n / 4)], as `artifact.rebuild.codes` makes them.
        value: the constant c > 0, [1], of any float dtype.
        shape: of the weights, n in all.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(codes) is not Tensor
    return unpack_op(codes, value, shape) if traced else _unpack(codes, value, shape)


def _unpack(codes: Tensor, value: Tensor, shape: Sequence[int]) -> Tensor:
    wide = value.dtype if value.dtype.itemsize > 2 else torch.float32  # which the CPU multiplies, unlike 8 bits
    table = _signs_of_bytes().to(value.device).to(wide) * value.detach().to(wide)  # exact, and +0.0 where dropped
    table = table.to(value.dtype)
    if codes.device.type != "cpu":
        four = table.index_select(0, codes.int())
    else:
        four = _scratch(4 * codes.shape[0], value.dtype).view(-1, 4)
        # NumPy has no bfloat16
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[table.itemsize]
        rows, out, bytes_ = table.view(words).numpy(), four.view(words).numpy(), codes.numpy()
        for start in range(0, len(bytes_), _PIECE):
            piece = slice(start, start + _PIECE)
            np.take(rows, bytes_[piece], axis=0, out=out[piece], mode="clip")
    return four.view(-1)[: prod(shape)].view(shape)


def _scratch(n: int, dtype: torch.dtype) -> Tensor:
    """Return memory for `n` values, which goes back to the system with the tensor if it is large.

    The C library keeps what is freed for later, and with every layer's weight the process would grow to the size of the
    network that is not packed.
    """
    nbytes = n * dtype.itemsize
    if nbytes < _OF_ITS_OWN or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(n, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


@torch.library.custom_op("popup_surgery::unpack", mutates_args=())
def unpack_op(codes: Tensor, value: Tensor, shape: list[int]) -> Tensor:
    """The operator behind `unpack`."""
    return _unpack(codes, value, shape)


@unpack_op.register_fake
def _unpack_fake(codes: Tensor, value: Tensor, shape: list[int]) -> Tensor:
    return value.new_empty(shape)
