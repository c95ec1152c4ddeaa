"""Gem-Miner: a probability for each weight, of which the lowest freeze in rounds (Sreenivasan et al., 2022)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConversionError
from ..selection import OneRead, Selection, select, select_op
from ..weights.streams import draw_scores
from .base import Learner, StraightThrough, TrainedWeight

FROZEN = -1.0  # the score of a weight that takes no part any more; those of all others are from 0 to 1


@dataclass(frozen=True)
class GemMiner(Learner):
    """w_eff = w · [p > ½] with probabilities p, the scores, of which the lowest freeze in rounds: those weights stay 0.

    "Rare Gems: Finding Lottery Tickets at Initialization", NeurIPS 2022, algorithm 1. There is one score for each
    weight: a tensor of the weight's shape, always float32. It starts as U(0, 1), and is clamped to 0 … 1 after each
    step. Backward, straight through the rounding: ∂L/∂p = ∂L/∂w_eff · w, for kept and unkept weights alike, and 0 for
    frozen ones. The loss gains λ · Σ p² over the weights that are not frozen.

    Of E epochs, every T-th ends with a round, R = ⌊(E − 1) / T⌋ in all. Of n weights that are ranked together,
    n · k^(r/R) are not frozen after the r-th, so that each freezes the share 1 − k^(1/R) of the rest, and the last
    leaves as many as k keeps. The paper ranks all layers together, which is `scope="global"`; otherwise each layer is
    ranked by itself.

    At the end, all the rest takes part: exactly as many weights as k keeps, as in the authors' code before finetuning
    (`unflag_before_finetune`). During training, and in the paper, those of the rest with p ≤ ½ do not. Of equal scores,
    the one with the higher index freezes first; the authors' code freezes them together. Outside the training loop
    there are no rounds, and the weights with the largest p are kept.

    Args:
        every: T, the epochs from one round to the next. In a run of T epochs or fewer, one round ends the last epoch
            but one.
        penalty_weight: λ.
    """

    every: int = 5
    penalty_weight: float = 1e-4

    schedules_k = True
    takes_floor = True

    def __post_init__(self) -> None:
        every, weight = self.every, self.penalty_weight
        if type(every) is not int or not 1 <= every <= 1_000_000:
            raise ConversionError(f"gem_miner: every is {every!r}; expected an integer from 1, a number of epochs")
        if type(weight) not in (int, float) or not 0 <= weight <= 1000:
            raise ConversionError(f"gem_miner: penalty_weight is {weight!r}; expected a number from 0 to 1000")

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        return (np.abs(piece) for piece in draw_scores(numel, 1.0, seed, name))

    def kept_at(self, progress: float, kept: int) -> int:
        """Return 0 before the end: the scores alone decide, as in learners without k."""
        return kept if progress >= 1 else 0

    def select(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), floors: Sequence[int] | None = None
    ) -> Selection:
        if not kept:
            return OneRead(tuple(self.select_traced(scores, kept)))
        found = select(_ranks(scores), kept, floors)
        return _Ranked(found.masks, found.threshold, found.last, found)

    def select_traced(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), floors: Sequence[int] | None = None
    ) -> Sequence[Tensor]:
        return select_op(_ranks(scores), kept, floors) if kept else [score > 0.5 for score in scores]

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, score, mask)

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return ½ + p/2 for the weights in `masks`, and p/2 for all others."""
        least = float(np.nextafter(np.float32(0.5), np.float32(1)))
        halves = [score.detach().clamp(0, 1) / 2 for score in scores]
        return [
            torch.where(mask, (half + 0.5).clamp(min=least), half) for half, mask in zip(halves, masks, strict=True)
        ]

    def importance(self, score: Tensor) -> Tensor:
        return score.masked_fill(score == FROZEN, -torch.inf)

    def penalty(self, score: Tensor) -> Tensor | None:
        return score.clamp(min=0).square().sum() * self.penalty_weight if self.penalty_weight else None

    @contextmanager
    @torch.no_grad()
    def around_step(self, weights: Sequence[TrainedWeight]) -> Iterator[None]:
        """Clamp the scores after the step. What is frozen stays, whatever an optimiser's momentum does to it."""
        frozen = [one.score == FROZEN for one in weights]
        yield
        for one, still in zip(weights, frozen, strict=True):
            one.score.clamp_(0, 1).masked_fill_(still, FROZEN)

    def after_epoch(self, weights: Sequence[TrainedWeight], epoch: int, epochs: int) -> None:
        """Freeze the lowest of the rest, if the epoch ends with a round."""
        every = min(self.every, epochs - 1)
        if not every or epoch % every or epoch >= epochs:
            return
        groups: dict[int, list[TrainedWeight]] = {}
        for one in weights:
            groups.setdefault(one.group, []).append(one)
        for group in groups.values():
            scores = [one.score for one in group]
            rest = left(sum(score.numel() for score in scores), group[0].kept, epoch // every, (epochs - 1) // every)
            floors = [one.floor for one in group]
            for score, mask in zip(scores, select(_ranks(scores), rest, floors).masks, strict=True):
                score.masked_fill_(~mask, FROZEN)


def left(n: int, kept: int, done: int, rounds: int) -> int:
    """Return how many of `n` weights are not frozen after `done` of all `rounds`, the last of which leaves `kept`."""
    return kept if done >= rounds else max(kept, round(n * (kept / n) ** (done / rounds)))


def _ranks(scores: Sequence[Tensor]) -> list[Tensor]:
    """Return numbers whose magnitudes are in the order of the scores, with frozen ones below all others."""
    least = torch.finfo(torch.float32).tiny
    return [torch.where(score == FROZEN, 0.0, score.detach().clamp(min=least)) for score in scores]


@dataclass(frozen=True)
class _Ranked(Selection):
    """Masks of the largest scores: those of their `ranks`."""

    ranks: Selection

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        looked_at = scores if only is None else [scores[only]]
        ranks = iter(_ranks(looked_at))
        return self.ranks.holds([next(ranks) if only in (None, i) else s for i, s in enumerate(scores)], only)


class _StraightThrough(StraightThrough):
    """The masked weight; the score gets its gradient as if the mask were the score, unless it is frozen."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, score, mask = ctx.saved_tensors
        for_score = (
            torch.where(score == FROZEN, 0.0, grad.to(score.dtype) * weight) if ctx.needs_input_grad[1] else None
        )
        for_weight = torch.where(mask, grad, 0.0) if ctx.needs_input_grad[0] else None
        return for_weight, for_score, None
