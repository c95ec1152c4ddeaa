"""Exact top-k by magnitude: selects the weights that take part (paper, section 3). Ties go to the lower index.

This folder's README.md explains the method and the backends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from .backend import backend_of
from .bits import MAGNITUDE
from .fixed import FreeWeights


def kept_count(n: int, k: float) -> int:
    """Return how many of `n` weights a share `k` keeps: n − int((1 − k)·n), in float64."""
    return n - int((1 - k) * n)


@dataclass(frozen=True)
class Selection:
    """Masks of a group of scores, and on the CPU what is needed to check that they are still right.

    Attributes:
        masks: bool, one for each score, of its shape and strides.
        threshold: bit pattern of the smallest kept magnitude.
        last: index, over the group's flattened scores in row-major order, of the last kept weight at the threshold.
    """

    masks: tuple[Tensor, ...]
    threshold: int
    last: int

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        """Return True only if `select(scores)` would give these masks again. Costs about a quarter of a selection.

        The scores are compared with the known threshold. So the answer may be False for masks that are still right, if
        all magnitudes have moved together. Off the CPU it is always False: a check would make the host wait for the
        device.

        Args:
            scores: the group, as for `select`.
            only: index of the one member to check; all members if None.
        """
        if len(scores) != len(self.masks):
            return False
        looked_at = [*scores, *self.masks] if only is None else [scores[only], self.masks[only]]
        return backend_of(looked_at).holds((self.masks, self.threshold, self.last), scores, only)


@dataclass(frozen=True)
class OneRead(Selection):
    """Masks of one read: they cost no more than a check of the last ones would, or the next read gives others."""

    threshold: int = -1
    last: int = -1

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        return False


class Limits(TypedDict, total=False):
    """What beside the scores decides in `select`, which explains it."""

    floors: Sequence[int] | None
    fixed: FreeWeights | None


def select(
    scores: Sequence[Tensor], kept: int, floors: Sequence[int] | None = None, fixed: FreeWeights | None = None
) -> Selection:
    """Keep exactly `kept` of the group's weights: those with the largest |score|. Ties go to the lower index.

    Never sorts. A NaN ranks above infinity.

    Args:
        scores: float32 tensors of any shape and strides, ranked together in this order.
        kept: from 0 to the number of all elements.
        floors: how many weights each of the scores keeps at least: its own largest. All others are ranked together.
        fixed: which weights are kept or dropped whatever their scores are. They count in `kept` and in `floors`, and
            the others alone are ranked.

    Raises:
        ValueError: a score is not float32, or `kept` or a floor is out of range.
    """
    if fixed is not None:
        return _among_free(scores, kept, floors, fixed)
    total = sum(score.numel() for score in scores)
    if any(score.dtype != torch.float32 for score in scores):
        raise ValueError(f"scores are ranked in float32, not {[str(score.dtype) for score in scores]}")
    if not 0 <= kept <= total:
        raise ValueError(f"kept is {kept}; expected 0 to {total}, the number of scores")
    if floors:
        return _with_floors(scores, kept, floors)
    return Selection(*backend_of(scores).select(scores, kept))


@dataclass(frozen=True)
class _Floored(Selection):
    """Masks of scores with floors: those of `_raised` scores, and of each score's own largest, `lowest`."""

    lowest: tuple[Selection, ...]

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        looked_at = range(len(scores)) if only is None else [only]
        if len(scores) != len(self.masks) or not all(self.lowest[i].holds([scores[i]]) for i in looked_at):
            return False
        raised = list(scores)
        for i in looked_at:
            raised[i] = _raised(scores[i], self.lowest[i])
        return super().holds(raised, only)


def _with_floors(scores: Sequence[Tensor], kept: int, floors: Sequence[int]) -> Selection:
    """Return what `select` promises for floors. They decide nothing if the ranking together already fulfils them."""
    if len(floors) != len(scores) or sum(floors) > kept:
        raise ValueError(f"the floors are {list(floors)}; expected one for each of {len(scores)} scores, {kept} in all")
    if all(score.device.type == "cpu" for score in scores):  # elsewhere the host would wait for the counts
        plain = select(scores, kept)
        if all(int(mask.count_nonzero()) >= floor for mask, floor in zip(plain.masks, floors, strict=True)):
            return plain
    lowest = tuple(select([score], floor) for score, floor in zip(scores, floors, strict=True))
    together = select([_raised(score, own) for score, own in zip(scores, lowest, strict=True)], kept)
    return _Floored(together.masks, together.threshold, together.last, lowest)


def _raised(score: Tensor, lowest: Selection) -> Tensor:
    """Return the score with the weights of its floor above all numbers."""
    bits = score.detach().view(torch.int32)
    return torch.where(lowest.masks[0], MAGNITUDE, bits).view(torch.float32)


@dataclass(frozen=True)
class _AmongFree(Selection):
    """Masks of the largest among the scores of free weights: `chosen` has those of these weights alone."""

    chosen: Selection
    fixed: FreeWeights

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        if len(scores) != len(self.masks):
            return False
        free = [self.fixed.scores(i, s) if only in (None, i) else s for i, s in enumerate(scores)]
        return self.chosen.holds(free, only)


def _among_free(scores: Sequence[Tensor], kept: int, floors: Sequence[int] | None, fixed: FreeWeights) -> Selection:
    """Return what `select` promises for fixed weights."""
    free = [fixed.scores(i, score) for i, score in enumerate(scores)]
    left = None if not floors else [floor - one.kept for floor, one in zip(floors, fixed.members, strict=True)]
    chosen = select(free, kept - fixed.kept, left)
    masks = (fixed.mask(i, mask, score) for i, (mask, score) in enumerate(zip(chosen.masks, scores, strict=True)))
    return _AmongFree(tuple(masks), -1, -1, chosen, fixed)


def select_traced(
    scores: Sequence[Tensor], kept: int, floors: Sequence[int] | None = None, fixed: FreeWeights | None = None
) -> list[Tensor]:
    """Return `select(…).masks`, by one operator that compilers and tracers do not look into."""
    return select_op(list(scores), kept, floors, None if fixed is None else fixed.text)


@torch.library.custom_op("popup_surgery::select", mutates_args=())
def select_op(
    scores: Sequence[Tensor], kept: int, floors: Sequence[int] | None = None, fixed: str | None = None
) -> list[Tensor]:
    """The operator behind `select_traced`, which takes the `text` of the weights that are not fixed."""
    return list(select(scores, kept, floors, None if fixed is None else FreeWeights.read(fixed)).masks)


@select_op.register_fake
def _(
    scores: Sequence[Tensor], kept: int, floors: Sequence[int] | None = None, fixed: str | None = None
) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]


@select_op.register_vmap
def _(
    info: Any,
    in_dims: Any,
    scores: Sequence[Tensor],
    kept: int,
    floors: Sequence[int] | None = None,
    fixed: str | None = None,
) -> tuple[list[Tensor], list[int]]:
    """Rank each member of a stack of scores, such as an ensemble's, by itself."""
    dims = in_dims[0]
    rows = [score if dim is None else score.movedim(dim, 0) for score, dim in zip(scores, dims, strict=True)]
    each = [
        select_op([row if dim is None else row[i] for row, dim in zip(rows, dims, strict=True)], kept, floors, fixed)
        for i in range(info.batch_size)
    ]
    return [torch.stack(masks) for masks in zip(*each, strict=True)], [0] * len(scores)
