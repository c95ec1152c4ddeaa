"""CPU backend: a bracket around the threshold, one sweep counts and collects, and only a few are partitioned.

Floyd and Rivest, "Expected time bounds for selection", 1975. For example 300,000 of 1,000,000 magnitudes:

- Every 31st magnitude goes into a sample of 32,259. In ascending order, the threshold is expected at its place
  0.7 · 32,259 = 22,581, with a standard deviation of √(32,259 · 0.3 · 0.7) = 82. The bracket runs from the sample's
  value at place 22,188 to its value at place 22,974, four deviations and a 512th of the sample to each side.
- The sweep finds, say, 287,800 magnitudes above the bracket and 24,370 within it. Those above are kept. Of those
  within, the 12,200 largest are kept too. Partitioning them is a fortieth of partitioning all.
- If more than 300,000 are above, or fewer than 300,000 above and within together, the sample was misleading. This
  happens by chance once in 15,000 times. Then all magnitudes are partitioned to find the exact threshold.

In training the scores move little from one step to the next. So the next selection from the same memory needs no
sample: its bracket lies around the last threshold, and is a few times as wide as that has moved before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bits import CHUNK, MAGNITUDE, Bits, Found, bits_of, in_pieces

SAMPLE = 1 << 15
REMEMBERED = 1 << 12  # groups whose last threshold is known
FEW = 1 << 12  # weights that are found as fast without it

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _Flat:
    """One score and its mask in the order of memory, in which nothing is copied.

    Attributes:
        bits: bit patterns.
        mask: bool, to be written.
        start: number of elements in the scores before it.
        shape: of the score.
        order: its dimensions in the order of memory.
    """

    bits: Bits
    mask: NDArray[np.bool_]
    start: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, score: Tensor, mask: Tensor, start: int) -> "_Flat | None":
        """Return None if there are gaps in memory, as in a slice."""
        order = tuple(sorted(range(score.ndim), key=score.stride, reverse=True))
        if not (score.permute(order).is_contiguous() and mask.permute(order).is_contiguous()):
            return None
        flat = mask.permute(order).view(-1).numpy()
        return cls(bits_of(score.permute(order)), flat, start, tuple(score.shape), order)

    def places(self, index: Indices) -> Indices:
        """Return the places of elements in the group, counted in row-major order."""
        if len(index) and self.order != tuple(range(len(self.shape))):
            found = dict(zip(self.order, np.unravel_index(index, [self.shape[d] for d in self.order]), strict=True))
            index = np.ravel_multi_index([found[d] for d in range(len(self.shape))], self.shape)
        return index + self.start


class _Last(NamedTuple):
    """The last threshold of a group, and how far from it the next one is expected at most; 0 if it moves too far."""

    threshold: int
    reach: int


_last: dict[tuple[int, int, int], _Last] = {}  # by address, size and kept: a wrong one costs a sweep


def select(scores: Sequence[Tensor], kept: int) -> Found:
    """Return the masks of `scores`, the threshold and the last kept tie, as in a `Selection`."""
    total = sum(score.numel() for score in scores)
    if kept in (0, total):
        threshold, last = (0, total - 1) if kept else (MAGNITUDE, -1)
        return tuple(torch.full_like(s, kept > 0, dtype=torch.bool) for s in scores), threshold, last
    masks = tuple(torch.empty_like(score, dtype=torch.bool) for score in scores)
    flats: list[_Flat] = []
    for score, mask in zip(scores, masks, strict=True):
        flat = _Flat.of(score, mask, flats[-1].start + len(flats[-1].bits) if flats else 0)
        if flat is None:
            found, threshold, last = select([score.contiguous() for score in scores], kept)
            return tuple(mask.copy_(one) for mask, one in zip(masks, found, strict=True)), threshold, last
        flats.append(flat)
    return masks, *_write(flats, kept, total, (scores[0].data_ptr(), total, kept))


def _write(flats: list[_Flat], kept: int, total: int, key: tuple[int, int, int]) -> tuple[int, int]:
    """Write the masks. Returns the threshold and the last tie."""
    known = _last.get(key)
    for low, high in _brackets(flats, kept, total, known):
        found = _sweep(flats, kept, low, high)
        if found is not None:
            break
    assert found is not None
    threshold, last, near = found
    if total > FEW:
        # the next bracket has a 512th of the weights at least, and a 16th at most
        moved = 0 if known is None else abs(threshold - known.threshold)
        least = (high - low + 1) / near * total / 1024
        reach = max(least, 4 * moved)
        if len(_last) >= REMEMBERED:
            _last.clear()
        _last[key] = _Last(threshold, int(reach) if reach < 32 * least else 0)
    return threshold, last


def _brackets(flats: list[_Flat], kept: int, total: int, known: _Last | None) -> Iterator[tuple[int, int]]:
    """Yield brackets in the order in which they are tried; the threshold is in the last one."""
    if known is not None and known.reach:
        yield max(known.threshold - known.reach, 0), min(known.threshold + known.reach, MAGNITUDE)
    yield _sampled(flats, kept, total)
    # the sample was misleading: the exact threshold
    bits = np.concatenate([flat.bits for flat in flats]) & MAGNITUDE
    exact = int(np.partition(bits, total - kept)[total - kept])
    yield exact, exact


def _sampled(flats: list[_Flat], kept: int, total: int) -> tuple[int, int]:
    """Return the bracket that a sample gives."""
    step = total // SAMPLE | 1  # odd, so that the sample does not stay in one channel
    sample = np.concatenate([flat.bits[::step] for flat in flats]) & MAGNITUDE
    place = len(sample) * (total - kept) / total
    margin = 0.0 if step == 1 else 4 * (len(sample) * (kept / total) * (1 - kept / total)) ** 0.5
    margin += len(sample) / 512 + 1  # so that it tells how close magnitudes are to one another there
    low, high = (min(max(int(place + m), 0), len(sample) - 1) for m in (-margin, margin))
    found = np.partition(sample, [low, high])
    return int(found[low]), int(found[high])


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


def _sweep(flats: list[_Flat], kept: int, low: int, high: int) -> tuple[int, int, int] | None:
    """Write the masks, and return the threshold, the last tie and how many magnitudes are in low … high.

    None if the threshold is not; the masks are then wrong.
    """
    # Example: magnitudes 5 1 3 3 9 3, three to keep, bracket 2 … 4. Above the bracket are 5 and 9. So one more is kept,
    # of the 3 3 3 within it, at the indices 2, 3 and 5. The threshold is 3, and nothing within is over it. The first
    # tie is kept: the mask is 1 0 1 0 1 0, and the last kept tie is index 2.
    pieces = [(flat, start) for flat in flats for start in range(0, len(flat.bits), CHUNK)]
    buffer, inside = np.empty(CHUNK, np.int32), np.empty(CHUNK, bool)
    seen: list[tuple[Indices, Bits]] = []
    needed = kept
    for flat, start in pieces:
        mask = flat.mask[start : start + CHUNK]
        bits, near = buffer[: len(mask)], inside[: len(mask)]
        np.bitwise_and(flat.bits[start : start + CHUNK], MAGNITUDE, out=bits)
        np.greater(bits, high, out=mask)
        np.greater_equal(bits, low, out=near)
        index = np.flatnonzero(np.not_equal(near, mask, out=near))
        seen.append((index + start, bits[index]))
        needed -= int(np.count_nonzero(mask))
    bits = np.concatenate([near for _, near in seen])
    if not 0 < needed <= len(bits):
        return None
    threshold = np.partition(bits, len(bits) - needed)[len(bits) - needed]
    places = [flat.places(index[near == threshold]) for (flat, _), (index, near) in zip(pieces, seen, strict=True)]
    ties, taken = np.concatenate(places), needed - int(np.count_nonzero(bits > threshold))
    last = np.partition(ties, taken - 1)[taken - 1]
    for (flat, _), (index, near), tied in zip(pieces, seen, places, strict=True):
        chosen = near > threshold
        chosen[near == threshold] = tied <= last
        flat.mask[index[chosen]] = True
    return int(threshold), int(last), len(bits)
