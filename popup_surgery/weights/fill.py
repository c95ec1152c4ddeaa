"""Move values into a tensor, or out of it, piece by piece, without a second tensor of its size."""

import hashlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .streams import CHUNK

ROUNDING = 2.0**-8  # relative, of bfloat16
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 2.0**-24  # the smallest subnormal number of float16


def rounded(values: NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    """Return values in another dtype, rounded to nearest.

    What is beyond its largest number becomes an infinity, or that number in a dtype without infinities.
    """
    tensor = torch.from_numpy(values)
    if dtype == torch.float8_e4m3fn:  # has no infinity, and torch 2.11 would give NaN
        tensor = tensor.clamp(-_LARGEST, _LARGEST)
    return tensor.to(dtype)


def fill(tensor: Tensor, pieces: Iterable[NDArray[np.float32]]) -> Tensor:
    """Fill `tensor` in place, in row-major order, and return it. Values are `rounded`.

    Args:
        tensor: any dtype, device and strides. On the meta device nothing is filled.
        pieces: float32 values, as many as `tensor` has elements.
    """
    if tensor.is_meta:
        return tensor
    with torch.no_grad():
        target = tensor.detach()
        flat = target.view(-1) if target.is_contiguous() else torch.empty_like(target.reshape(-1))
        start = 0
        for piece in pieces:
            flat[start : start + len(piece)] = rounded(piece, flat.dtype)
            start += len(piece)
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))
    return tensor


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of `tensor` in row-major order, as CPU tensors of at most CHUNK elements."""
    flat = tensor.detach().reshape(-1)
    return (flat[start : start + CHUNK].cpu() for start in range(0, flat.numel(), CHUNK))


def equals(tensor: Tensor, pieces: Iterable[NDArray[np.float32]]) -> bool:
    """Return whether `fill` with these pieces would leave `tensor` unchanged."""
    return all(
        torch.equal(mine, rounded(piece, mine.dtype)) for mine, piece in zip(pieces_of(tensor), pieces, strict=True)
    )


def deviation(tensor: Tensor, pieces: Iterable[NDArray[np.float32]]) -> tuple[float, bool]:
    """Compare `tensor` with what `fill` with these pieces would leave in it.

    Returns:
        The largest difference, infinite if there is a NaN; and whether all differences lie within rounding. An average
        over equal weights or a cast to half precision and back causes such differences.
    """
    largest, rounding = 0.0, True
    for mine, piece in zip(pieces_of(tensor), pieces, strict=True):
        theirs = rounded(piece, mine.dtype)
        if not torch.equal(mine, theirs):
            off = (mine.double() - theirs.double()).abs().nan_to_num(nan=math.inf)
            largest = max(largest, float(off.max()))
            rounding &= bool((off <= (theirs.double().abs() * ROUNDING).clamp(min=SMALLEST)).all())
    return largest, rounding


def values_digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 over the values of floating tensors, widened to float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for piece in pieces_of(tensor):
            digest.update(piece.float().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
