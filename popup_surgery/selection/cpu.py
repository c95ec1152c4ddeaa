"""The threshold on the CPU: a sample brackets it, one sweep counts and collects, and only a few are partitioned."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bits import MAGNITUDE, Bits, bits_of, in_pieces

SAMPLE = 1 << 15


def select_on_host(scores: Sequence[Tensor], kept: int, total: int) -> tuple[tuple[Tensor, ...], int, int]:
    """The masks of `scores`, and the threshold and the last kept tie as in a `Selection`."""
    arrays = [bits_of(score) for score in scores]
    if kept in (0, total):
        threshold, last = (0, total - 1) if kept else (MAGNITUDE, -1)
        return tuple(torch.full_like(s, kept > 0, dtype=torch.bool) for s in scores), threshold, last
    step = total // SAMPLE | 1  # odd, so that it does not walk along one channel
    sample = np.concatenate([a[::step] for a in arrays]) & MAGNITUDE
    place = len(sample) * (total - kept) / total
    margin = 0 if step == 1 else 4 * (len(sample) * (kept / total) * (1 - kept / total)) ** 0.5 + 1
    low, high = (min(max(int(place + m), 0), len(sample) - 1) for m in (-margin, margin))
    bracket = np.partition(sample, [low, high])[[low, high]]
    found = _sweep(arrays, kept, *bracket)
    if found is None:  # the sample misled, or there was none: take the exact threshold as the bracket
        exact = np.partition(np.concatenate(arrays) & MAGNITUDE, total - kept)[total - kept]
        found = _sweep(arrays, kept, exact, exact)
        assert found is not None
    flat, threshold, last = found
    masks, start = [], 0
    for score in scores:
        mask = torch.from_numpy(flat[start : start + score.numel()]).view(score.shape)
        masks.append(torch.empty_like(score, dtype=torch.bool).copy_(mask))
        start += score.numel()
    return tuple(masks), threshold, last


def _sweep(arrays: list[Bits], kept: int, low: np.int32, high: np.int32) -> tuple[NDArray[np.bool_], int, int] | None:
    """The mask over all arrays, given that the threshold lies in low … high; None where it does not."""
    flat = np.empty(sum(map(len, arrays)), bool)
    start, above = 0, 0
    near_bits, near_index = [], []
    for piece in (piece for array in arrays for piece in in_pieces(array)):
        bits, mask = piece & MAGNITUDE, flat[start : start + len(piece)]
        np.greater(bits, high, out=mask)
        above += int(np.count_nonzero(mask))
        index = np.flatnonzero((bits - low).view(np.uint32) <= np.uint32(high - low))
        near_bits.append(bits[index])
        near_index.append(index + start)
        start += len(piece)
    bits, index, needed = np.concatenate(near_bits), np.concatenate(near_index), kept - above
    if not 0 < needed <= len(bits):
        return None
    threshold = np.partition(bits, len(bits) - needed)[len(bits) - needed]
    over = index[bits > threshold]
    ties = index[bits == threshold][: needed - len(over)]
    flat[over] = True
    flat[ties] = True
    return flat, int(threshold), int(ties[-1])
