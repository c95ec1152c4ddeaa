"""Scores in shards, as `fully_shard` leaves them: each process has some rows, and no process sees all of them.

A radix select over all processes: the histogram of eight bits of the magnitudes is summed over the processes, and the
place of the threshold in it says which digit comes next. So four exchanges of 256 numbers find the threshold for all
scores of a group together, however many processes there are. Where not all of the scores at the threshold are kept, the
same select over their indices finds the last of these.

For example 3 of the magnitudes 5 1 3 | 3 9 3 in two shards: the threshold is 3, and above it are 5 and 9. So one of the
ties at the indices 2, 3 and 5 is kept, and the last kept tie is index 2. All processes know these two numbers, and each
finds the masks of its own shards with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .bits import MAGNITUDE


def is_shard(tensor: Tensor) -> bool:
    """Return whether `tensor` is spread over processes: a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all values of a tensor, without its gradient, gathered from all processes if it is spread over them.

    All processes must call this.
    """
    return tensor.detach().full_tensor() if is_shard(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor's values."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that all processes have, spread over them as `like` is."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Cut:
    """What decides about all masks of a group, as two numbers that all processes know.

    Attributes:
        threshold: bit pattern of the smallest kept magnitude.
        last: index, over the group's flattened scores in row-major order, of the last kept weight at the threshold.
        starts: the index of each score's first element.
    """

    threshold: int
    last: int
    starts: tuple[int, ...]

    def mask(self, index: int, score: Tensor) -> Tensor:
        """Return the whole mask of a member: bool, of its score's shape. If the score is spread, all must call this."""
        shard = _shard_of(score)
        local = self._mask(score.detach() if shard is None else shard.rows, self.starts[index] + _first(shard))
        if shard is None:
            return local
        from torch.distributed.tensor import DTensor

        spread = DTensor.from_local(
            local.byte(), score.device_mesh, score.placements,  # type: ignore[attr-defined]
            run_check=False, shape=score.shape, stride=score.stride(),
        )  # fmt: skip
        return spread.full_tensor().bool()

    def _mask(self, score: Tensor, start: int) -> Tensor:
        """Return the mask of scores that stand together in the group, from the index `start`."""
        bits = _magnitudes(score)
        ties = min(max(self.last + 1 - start, 0), len(bits))  # ties before this place are kept, those after it dropped
        return torch.cat([bits[:ties] >= self.threshold, bits[ties:] > self.threshold]).view(score.shape)


def find_cut(scores: Sequence[Tensor], kept: int) -> Cut | None:
    """Return what decides which `kept` of a group's weights have the largest |score|. Ties go to the lower index.

    All processes must call this, and get the same. No scores are gathered.

    Args:
        scores: float32 tensors, ranked together in this order. Some are spread over processes, and all processes have
            the same of the others.
        kept: from 0 to the number of all elements.

    Returns:
        The cut; None if the scores are spread in another way than by rows, or over several groups of processes.
    """
    shards = [_shard_of(score) for score in scores]
    groups = {id(shard.group): shard.group for shard in shards if shard is not None}
    if len(groups) != 1 or any(is_shard(score) and shard is None for score, shard in zip(scores, shards, strict=True)):
        return None
    (group,) = groups.values()
    starts = tuple(accumulate((score.numel() for score in scores), initial=0))
    total = starts[-1]
    if kept in (0, total):
        return Cut(*((0, total - 1) if kept else (MAGNITUDE, -1)), starts[:-1])
    first = torch.distributed.get_rank(group) == 0  # which counts what all processes have
    mine = [
        (_magnitudes(score.detach() if shard is None else shard.rows), start + _first(shard))
        for score, shard, start in zip(scores, shards, starts, strict=False)
        if shard is not None or first
    ]
    threshold, dropped, tied = _place([bits for bits, _ in mine], total - kept, 31, group, scores[0])
    if not dropped:
        return Cut(threshold, total - 1, starts[:-1])
    ties = [(bits == threshold).nonzero().view(-1) + start for bits, start in mine]
    last, _, _ = _place(ties, tied - dropped - 1, total.bit_length(), group, scores[0])
    return Cut(threshold, last, starts[:-1])


def _place(values: list[Tensor], place: int, bits: int, group: ProcessGroup, like: Tensor) -> tuple[int, int, int]:
    """Return the value at a place of all processes' values in ascending order, its place among its equals, and theirs.

    Args:
        values: this process's, integers from 0 and below 2 to the power of `bits`.
        like: a tensor on the device of the exchange.
    """
    found = equal = 0
    for shift in reversed(range(0, bits, 8)):
        digits = [value >> shift & 255 for value in values]
        counts = torch.zeros(256, dtype=torch.int64, device=like.device)
        for digit in digits:
            counts += torch.bincount(digit, minlength=256)
        torch.distributed.all_reduce(counts, group=group)
        upto = counts.cumsum(0).tolist()
        digit_found = next(digit for digit, count in enumerate(upto) if count > place)
        place -= upto[digit_found - 1] if digit_found else 0
        equal = int(counts[digit_found])
        found |= digit_found << shift
        values = [value[digit == digit_found] for value, digit in zip(values, digits, strict=True)]
    return found, place, equal


@dataclass(frozen=True)
class _Shard:
    """The rows of a tensor that this process has, the index of their first element, and who has the others."""

    rows: Tensor
    first: int
    group: ProcessGroup


def _shard_of(tensor: Tensor) -> _Shard | None:
    """Return this process's rows of a tensor; None if it is spread otherwise or not at all."""
    if not is_shard(tensor):
        return None
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    spread = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(spread) != 1 or placements[spread[0]] != Shard(0):
        return None
    (dim,) = spread
    rows = -(-tensor.shape[0] // mesh.size(dim))  # of each process but the last ones, as torch.chunk divides
    first = min(rows * mesh.get_local_rank(dim), tensor.shape[0]) * (tensor.numel() // tensor.shape[0])
    return _Shard(tensor.detach().to_local(), first, mesh.get_group(dim))  # type: ignore[attr-defined]


def _first(shard: _Shard | None) -> int:
    return 0 if shard is None else shard.first


def _magnitudes(score: Tensor) -> Tensor:
    """Return the magnitudes of scores as integers, in row-major order: int32 with one dimension."""
    return score.contiguous().view(-1).view(torch.int32) & MAGNITUDE
