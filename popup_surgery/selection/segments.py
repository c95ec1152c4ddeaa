"""All layers in one pass: masked weights of many groups, and their scores' gradients, in a dozen kernels in all.

`select` ranks one group, and a layer then writes its masked weight: on a GPU ten small kernels for each layer, and the
GPU waits for the host to start them. Here a radix select ranks any number of groups side by side, each by its own
number of weights to keep, with one more kernel that writes all masked weights (`segments_triton.py`). The masks are
those of `select` to the bit.
"""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .gpu import RADIX_LIMIT

log = logging.getLogger("popup_surgery")

DEVICES = {"cuda"}  # the tests add "cpu", where Triton's interpreter runs the kernels
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BUCKETS = 5  # at most, each with a kernel for its gradients
BUCKET = (
    25 * 2**20 // 4
)  # elements of a bucket, as of DistributedDataParallel's, unless there would be too many buckets
MOST = 256  # members of a bucket, whose gradients' addresses are arguments of a kernel
ALIGNED = 64  # elements to which places in buffers are rounded up


class Member(NamedTuple):
    """One weight of the pass.

    Attributes:
        score: float32.
        weight: of one of `KINDS`, of the score's shape and strides.
        group: which members are ranked together, from 0 and in ascending order.
        kept: how many weights its group keeps, from 1 to all.
        dtype: of the masked weight.
    """

    score: Tensor
    weight: Tensor
    group: int
    kept: int
    dtype: torch.dtype


def suits(score: Tensor, weight: Tensor) -> bool:
    """Return whether the pass takes a weight: by device, dtype, layout and address."""
    return (
        score.device == weight.device
        and score.dtype == torch.float32
        and weight.dtype in KINDS
        and score.numel() > 0
        and _is_aligned(score)
        and _channels_and_points(score) is not None
        and same_layout(score, weight)
    )


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have their elements in the same order in memory, without gaps."""
    return one.shape == other.shape and all(
        size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True)
    )


def _channels_and_points(tensor: Tensor) -> tuple[int, int] | None:
    """Return what the table says of a layout; None unless it is contiguous or channels-last."""
    if tensor.is_contiguous():
        return 1, 1
    if tensor.ndim > 2 and tensor.movedim(1, -1).is_contiguous():
        return tensor.shape[1], prod(tensor.shape[2:])
    return None


@cache
def works_on(device: torch.device) -> bool:
    """Return whether kernels can be built for `device`."""
    if device.type not in DEVICES:
        return False
    try:
        score = torch.ones(2, device=device)
        layers = OnePass([Member(score, score, 0, 1, torch.float32)])
        layers.gradients(0, layers.masked_weights())
        return True
    except Exception as error:  # Triton, a compiler of C, or whatever else is missing
        log.info("each layer on %s is ranked by itself, because Triton does not work there: %r", device, error)
        return False


def buckets_of(sizes: Sequence[int]) -> list[range]:
    """Return the members whose gradients are found together: neighbours, in at most `BUCKETS` buckets."""
    share = max(BUCKET, -(-sum(sizes) // BUCKETS))
    bucket = np.cumsum([0, *sizes[:-1]]) // share
    edges = [*np.flatnonzero(np.diff(bucket, prepend=-1)).tolist(), len(sizes)]
    return [range(first, last) for first, last in pairwise(edges)]


def takes(members: Sequence[Member]) -> bool:
    """Return whether there are not too many of them, or of their elements."""
    sizes = [member.score.numel() for member in members]
    return sum(sizes) < RADIX_LIMIT and all(len(bucket) <= MOST for bucket in buckets_of(sizes))


class OnePass:
    """A pass over tensors that stay where they are in memory. It keeps none of them alive.

    Args:
        members: what `takes` returns True for, all on one device; one at least.

    Attributes:
        buckets: the indices of the members whose gradients are found together, in turn.
        captured: whether a CUDA graph reads its table.
    """

    captured = False

    def __init__(self, members: Sequence[Member]) -> None:
        from .segments_triton import BLOCK, COLUMNS

        sizes = [member.score.numel() for member in members]
        blocks = [-(-size // BLOCK) for size in sizes]
        firsts: list[int] = [0, *np.cumsum(blocks).tolist()]
        starts = {member.group: first for member, first in reversed([*zip(members, firsts, strict=False)])}
        self.buckets = buckets_of(sizes)
        self._bytes, self._elements = [0] * len(self.buckets), [0] * len(self.buckets)
        self._rows: list[list[int]] = []
        for bucket, indices in enumerate(self.buckets):
            for i in indices:
                score, weight, group, kept, dtype = members[i]
                self._rows.append([
                    score.data_ptr(), weight.data_ptr(), KINDS[weight.dtype], sizes[i], firsts[i],
                    *(_channels_and_points(score) or (1, 1)), 1024 * group, starts[group], kept, bucket,
                    self._bytes[bucket], KINDS[dtype], i - indices.start, self._elements[bucket],
                ])  # fmt: skip
                room = -(-sizes[i] // ALIGNED) * ALIGNED
                self._bytes[bucket] += room * dtype.itemsize
                self._elements[bucket] += room
        self._like = [torch.empty_like(member.score, device="meta") for member in members]
        self._dtypes = [member.dtype for member in members]
        self._firsts, self._groups = firsts, members[-1].group + 1
        row_of = firsts[-1] + COLUMNS * np.repeat(np.arange(len(members)), blocks)
        table = np.concatenate([row_of, np.array(self._rows, np.int64).reshape(-1)])
        self._table = torch.from_numpy(table).to(members[0].score.device)

    @torch.no_grad()
    def masked_weights(self) -> list[Tensor]:
        """Return each member's weight where it is kept and +0.0 elsewhere, of its `dtype` and its score's layout.

        Those of a bucket share memory, but no counter of writes.
        """
        from . import segments_triton as kernels

        table, blocks = self._table, self._firsts[-1]
        counts = torch.zeros(1024 * self._groups, dtype=torch.int32, device=table.device)
        ties = torch.empty(blocks, dtype=torch.int32, device=table.device)
        buffers = [torch.empty(size, dtype=torch.uint8, device=table.device) for size in self._bytes]
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        options: dict[str, Any] = {"BLOCK": kernels.BLOCK, "num_warps": kernels.WARPS}
        with torch.cuda.device_of(table):
            for digits in range(4):
                kernels.count[blocks,](table, counts, digits, **options)
            kernels.count_ties[blocks,](table, counts, ties, **options)
            kernels.write[blocks,](table, counts, ties, addresses, len(addresses), **options)
        places = (row[kernels.MADE.value] for row in self._rows)
        return [
            _part(buffers[bucket], next(places), self._dtypes[i], self._like[i])
            for bucket, indices in enumerate(self.buckets)
            for i in indices
        ]

    @torch.no_grad()
    def gradients(self, bucket: int, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the scores' gradients, straight through the masks: that of the masked weight · weight · sign(score).

        The members must be as they were for `masked_weights`.

        Args:
            bucket: index of the bucket.
            given: the gradients of its masked weights, of their shapes and dtypes; None for those that have none.

        Returns:
            float32, of the scores' layouts. Those of a bucket share memory.
        """
        from . import segments_triton as kernels

        indices = self.buckets[bucket]
        laid = [None if g is None else _laid_as(g, self._like[i]) for i, g in zip(indices, given, strict=True)]
        # where there is none, the kernel reads the scores, and what it writes is not used
        rows = [self._rows[i] for i in indices]
        addresses = tuple(row[0] if g is None else g.data_ptr() for g, row in zip(laid, rows, strict=True))
        found = torch.empty(self._elements[bucket], dtype=torch.float32, device=self._table.device)
        first, last = self._firsts[indices.start], self._firsts[indices.stop]
        with torch.cuda.device_of(found):
            kernels.differentiate[last - first,](
                self._table, first, addresses, found, len(addresses), BLOCK=kernels.BLOCK, num_warps=kernels.WARPS
            )
        return [
            None if g is None else _part(found, 4 * row[kernels.GRADIENT.value], torch.float32, self._like[i])
            for i, g, row in zip(indices, laid, rows, strict=True)
        ]


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether the address is one that Triton builds no other kernel for."""
    return tensor.data_ptr() % 16 == 0


def _laid_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with its elements in the order in memory that those of `like` have, at an aligned address."""
    if same_layout(tensor, like) and _is_aligned(tensor):
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _part(buffer: Tensor, start: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return a tensor of the shape and strides of `like` in the memory of `buffer`, from a byte on."""
    part = torch.empty(0, dtype=dtype, device=buffer.device)
    return part.set_(buffer.untyped_storage(), start // dtype.itemsize, like.shape, like.stride())
