"""CPU backend: a sample brackets the threshold, one sweep counts and collects, and only a few are partitioned.

Floyd and Rivest, "Expected time bounds for selection", 1975. For example 300,000 of 1,000,000 magnitudes:

- Every 31st magnitude goes into a sample of 32,259. In ascending order, the threshold is expected at its place
  0.7 · 32,259 = 22,581, with a standard deviation of √(32,259 · 0.3 · 0.7) = 82. The bracket runs from the sample's
  value at place 22,251 to its value at place 22,911, four deviations to each side.
- The sweep finds, say, 289,700 magnitudes above the bracket and 20,460 within it. Those above are kept. Of those
  within, the 10,300 largest are kept too. Partitioning them is a fiftieth of partitioning all.
- If more than 300,000 are above, or fewer than 300,000 above and within together, the sample was misleading. This
  happens by chance once in 15,000 times. Then all magnitudes are partitioned to find the exact threshold.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bits import MAGNITUDE, Bits, Found, bits_of, in_pieces

SAMPLE = 1 << 15


def select(scores: Sequence[Tensor], kept: int) -> Found:
    """Return the masks of `scores`, the threshold and the last kept tie, as in a `Selection`."""
    arrays = [bits_of(score) for score in scores]
    total = sum(map(len, arrays))
    if kept in (0, total):
        threshold, last = (0, total - 1) if kept else (MAGNITUDE, -1)
        return tuple(torch.full_like(s, kept > 0, dtype=torch.bool) for s in scores), threshold, last
    step = total // SAMPLE | 1  # odd, so that the sample does not stay in one channel
    sample = np.concatenate([a[::step] for a in arrays]) & MAGNITUDE
    place = len(sample) * (total - kept) / total
    margin = 0 if step == 1 else 4 * (len(sample) * (kept / total) * (1 - kept / total)) ** 0.5 + 1
    low, high = (min(max(int(place + m), 0), len(sample) - 1) for m in (-margin, margin))
    bracket = np.partition(sample, [low, high])[[low, high]]
    found = _sweep(arrays, kept, *bracket)
    if found is None:  # the sample was misleading, or there was none: use the exact threshold as the bracket
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


def holds(found: Found, scores: Sequence[Tensor], only: int | None) -> bool:
    """Return whether the masks are still right. Each score is compared with the threshold once."""
    masks, threshold, last = found
    start = 0
    for i, (score, mask) in enumerate(zip(scores, masks, strict=True)):
        if only not in (None, i):
            start += mask.numel()
            continue
        if score.shape != mask.shape:
            return False
        bits, kept = bits_of(score), mask.contiguous().view(-1).numpy()
        ties = min(max(last + 1 - start, 0), len(bits))  # ties before this index are kept, those after it dropped
        for part, least in ((slice(0, ties), threshold), (slice(ties, None), threshold + 1)):
            for piece, known in zip(in_pieces(bits[part]), in_pieces(kept[part]), strict=True):
                if not np.array_equal((piece & MAGNITUDE) >= least, known):
                    return False
        start += len(bits)
    return True


def _sweep(arrays: list[Bits], kept: int, low: np.int32, high: np.int32) -> tuple[NDArray[np.bool_], int, int] | None:
    """Return the mask over all arrays, the threshold and the last tie; None if low … high misses the threshold."""
    # Example: magnitudes 5 1 3 3 9 3, three to keep, bracket 2 … 4. Above the bracket are 5 and 9. So one more is kept,
    # of the 3 3 3 within it, at the indices 2, 3 and 5. The threshold is 3, and nothing within is over it. The first
    # tie is kept: the mask is 1 0 1 0 1 0, and the last kept tie is index 2.
    flat = np.empty(sum(map(len, arrays)), bool)
    start, above = 0, 0
    near_bits, near_index = [], []
    for piece in (piece for array in arrays for piece in in_pieces(array)):
        bits, mask = piece & MAGNITUDE, flat[start : start + len(piece)]
        np.greater(bits, high, out=mask)
        above += int(np.count_nonzero(mask))
        # one comparison instead of two: unsigned, a value below `low` wraps round to more than any high − low
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
