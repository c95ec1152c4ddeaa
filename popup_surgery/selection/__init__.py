"""The one exact top-k by magnitude: which weights take part (paper, section 3; ties by the lower index).

Magnitudes of float32 numbers order like their bit patterns without the sign, so everything here compares integers.
On the CPU a sample brackets the threshold, one sweep over cache-sized pieces counts what lies above the bracket and
collects what lies within, and only those few are partitioned (Floyd and Rivest, "Expected time bounds for selection",
1975). On a GPU a radix select finds the threshold without the host knowing it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

log = logging.getLogger("popup_surgery")

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign
PIECE = 1 << 16  # elements a sweep holds in cache
SAMPLE = 1 << 15
RADIX_LIMIT = 2**31 - 4096  # elements; the kernels count in int32

Bits = NDArray[np.int32]


def kept_count(n: int, k: float) -> int:
    """How many of `n` weights a share `k` keeps: n − int((1 − k)·n), in float64."""
    return n - int((1 - k) * n)


@dataclass(frozen=True)
class Selection:
    """The masks of a group of scores, and on the CPU what it takes to tell that they still hold.

    Attributes:
        masks: bool, one for each score, of its shape and strides.
        threshold: bit pattern of the smallest kept magnitude.
        last: index, over the group's flattened scores in row-major order, of the last kept weight at the threshold.
    """

    masks: tuple[Tensor, ...]
    threshold: int
    last: int

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        """True only where `select(scores)` would give these masks again; about a quarter of a selection's work.

        It compares with the known threshold, and so may say no where all magnitudes have moved together. A group off
        the CPU is never said to hold: the answer would make the host wait for the device.

        Args:
            scores: the group, as for `select`.
            only: look at this member alone.
        """
        if len(scores) != len(self.masks):
            return False
        start = 0
        for i, (score, mask) in enumerate(zip(scores, self.masks, strict=True)):
            if only not in (None, i):
                start += mask.numel()
                continue
            if score.device.type != "cpu" or mask.device.type != "cpu" or score.shape != mask.shape:
                return False
            bits, kept = _bits(score), mask.contiguous().view(-1).numpy()
            ties = min(max(self.last + 1 - start, 0), len(bits))  # up to here a tie is kept, after it dropped
            for part, threshold in ((slice(0, ties), self.threshold), (slice(ties, None), self.threshold + 1)):
                for piece, known in zip(_pieces(bits[part]), _pieces(kept[part]), strict=True):
                    if not np.array_equal((piece & MAGNITUDE) >= threshold, known):
                        return False
            start += len(bits)
        return True


def select(scores: Sequence[Tensor], kept: int) -> Selection:
    """Keep exactly `kept` of the group's weights: those with the largest |score|, of equal ones the lower index.

    Args:
        scores: float32 tensors of any shape and strides, ranked together in this order.
        kept: 0 … the number of all elements.

    Never sorts. A NaN ranks above infinity.

    Raises:
        ValueError: a score is not float32, or `kept` is out of range.
    """
    total = sum(score.numel() for score in scores)
    if any(score.dtype != torch.float32 for score in scores):
        raise ValueError(f"scores are ranked in float32, not {[str(score.dtype) for score in scores]}")
    if not 0 <= kept <= total:
        raise ValueError(f"kept is {kept}; expected 0 to {total}, the number of scores")
    if all(score.device.type == "cpu" for score in scores):
        return _select_on_host(scores, kept, total)
    return Selection(tuple(_select_on_device(scores, kept, total)), threshold=-1, last=-1)


@torch.library.custom_op("popup_surgery::select", mutates_args=())
def select_op(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """`select(scores, kept).masks` as one operator that compilers and tracers take whole."""
    return list(select(scores, kept).masks)


@select_op.register_fake
def _(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]


@select_op.register_vmap
def _(info: Any, in_dims: Any, scores: Sequence[Tensor], kept: int) -> tuple[list[Tensor], list[int]]:
    """Scores stacked along a dimension, as of an ensemble, are ranked each for itself."""
    dims = in_dims[0]
    rows = [score if dim is None else score.movedim(dim, 0) for score, dim in zip(scores, dims, strict=True)]
    each = [
        select_op([row if dim is None else row[i] for row, dim in zip(rows, dims, strict=True)], kept)
        for i in range(info.batch_size)
    ]
    return [torch.stack(masks) for masks in zip(*each, strict=True)], [0] * len(scores)


def _bits(score: Tensor) -> Bits:
    return score.detach().contiguous().view(-1).view(torch.int32).numpy()


def _pieces(array: NDArray) -> list[NDArray]:
    return [array[i : i + PIECE] for i in range(0, len(array), PIECE)]


def _select_on_host(scores: Sequence[Tensor], kept: int, total: int) -> Selection:
    arrays = [_bits(score) for score in scores]
    if kept in (0, total):
        threshold, last = (0, total - 1) if kept else (MAGNITUDE, -1)
        return Selection(tuple(torch.full_like(s, kept > 0, dtype=torch.bool) for s in scores), threshold, last)
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
    return Selection(tuple(masks), threshold, last)


def _sweep(arrays: list[Bits], kept: int, low: np.int32, high: np.int32) -> tuple[NDArray[np.bool_], int, int] | None:
    """The mask over all arrays, given that the threshold lies in low … high; None where it does not."""
    flat = np.empty(sum(map(len, arrays)), bool)
    start, above = 0, 0
    near_bits, near_index = [], []
    for piece in (piece for array in arrays for piece in _pieces(array)):
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


def _select_on_device(scores: Sequence[Tensor], kept: int, total: int) -> list[Tensor]:
    if kept in (0, total):
        return [torch.full_like(score, kept > 0, dtype=torch.bool) for score in scores]
    device = scores[0].device
    flat = [s.detach().contiguous().view(-1).view(torch.int32).to(device) for s in scores]
    bits = flat[0] if len(flat) == 1 else torch.cat(flat)
    largest = _largest_on(device) if total < RADIX_LIMIT else _largest_by_topk
    parts = largest(bits, kept).split([score.numel() for score in scores])
    masks = [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
    if len(scores) == 1 and masks[0].stride() == scores[0].stride():
        return masks
    # an operator's results share no memory
    return [torch.empty_like(s, dtype=torch.bool).copy_(mask) for s, mask in zip(scores, masks, strict=True)]


@cache
def _largest_on(device: torch.device) -> Callable[[Tensor, int], Tensor]:
    """The radix select where kernels can be built for `device`, else PyTorch's own operators."""
    if device.type == "cuda":
        try:
            from .radix_triton import largest

            largest(torch.zeros(32, dtype=torch.int32, device=device), 1)
            return largest
        except Exception as error:  # Triton, a compiler of C, or whatever else is missing
            log.info("ranking on %s by PyTorch's top-k, because Triton does not work there: %r", device, error)
    return _largest_by_topk


def _largest_by_topk(bits: Tensor, kept: int) -> Tensor:
    bits = bits & MAGNITUDE
    if kept <= len(bits) // 2:
        threshold = bits.topk(kept, sorted=False).values.amin()
    else:
        threshold = bits.topk(len(bits) - kept + 1, largest=False, sorted=False).values.amax()
    above, ties = bits > threshold, bits == threshold
    return above | (ties & (ties.cumsum(0) <= kept - above.sum()))
