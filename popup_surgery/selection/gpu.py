"""GPU backend: a radix select in Triton, or PyTorch's top-k where Triton does not work."""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .bits import MAGNITUDE, Found

log = logging.getLogger("popup_surgery")
RADIX_LIMIT = 2**31 - 4096  # elements; the kernels count in int32


def select(scores: Sequence[Tensor], kept: int) -> Found:
    """Return the masks of `scores`. The host does not wait for the device, so threshold and last tie are −1."""
    return tuple(_masks(scores, kept)), -1, -1


def holds(found: Found, scores: Sequence[Tensor], only: int | None) -> bool:
    """Return False: a check would make the host wait for the device."""
    return False


def _masks(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Rank all scores together on the first one's device, and return a bool mask for each."""
    total = sum(score.numel() for score in scores)
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
    """Return the radix select if kernels can be built for `device`, else PyTorch's own operators."""
    if device.type == "cuda":
        try:
            from .radix_triton import largest

            largest(torch.zeros(32, dtype=torch.int32, device=device), 1)
            return largest
        except Exception as error:  # Triton, a compiler of C, or whatever else is missing
            log.warning(
                "scores on %s are ranked by PyTorch's top-k, which is slower, because Triton does not work there: %r",
                device,
                error,
            )
    return _largest_by_topk


def _largest_by_topk(bits: Tensor, kept: int) -> Tensor:
    bits = bits & MAGNITUDE
    if kept <= len(bits) // 2:
        threshold = bits.topk(kept, sorted=False).values.amin()
    else:
        threshold = bits.topk(len(bits) - kept + 1, largest=False, sorted=False).values.amax()
    above, ties = bits > threshold, bits == threshold
    return above | (ties & (ties.cumsum(0) <= kept - above.sum()))
