"""Piggyback: a mask on trained weights, which all take part at first (Mallya et al., 2018, section 3)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConversionError
from ..selection import OneRead, Selection
from ..weights.streams import CHUNK
from .base import Learner, StraightThrough


@dataclass(frozen=True)
class Piggyback(Learner):
    """w_eff = w · m, where m is 1 for scores above `threshold` and 0 elsewhere.

    "Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights", ECCV 2018, section 3. There is
    one score for each weight: a tensor of the weight's shape, always float32. All scores start at `init`, so that
    training begins with the whole network. Backward, straight through the threshold: ∂L/∂s = ∂L/∂w_eff · w, for kept
    and unkept weights alike. A layer may end with no weight kept. The paper trains with Adam; weight decay would pull
    scores to 0, below the threshold.

    Args:
        init: the number that all scores start at, above `threshold`.
        threshold: a weight takes part if its score is larger. Both are compared as float32.
    """

    init: float = 1e-2
    threshold: float = 5e-3

    takes_k = False
    starts_whole = True

    def __post_init__(self) -> None:
        for name in ("init", "threshold"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not abs(float(value)) <= 1000:
                raise ConversionError(f"piggyback: {name} is {value!r}; expected a number from -1000 to 1000")
        if not np.float32(self.init) > np.float32(self.threshold):
            raise ConversionError(
                f"piggyback: init is {self.init!r}; expected more than threshold, {self.threshold!r}, in float32, so "
                "that all weights take part at first"
            )

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        return (np.full(min(CHUNK, numel - start), self.init, np.float32) for start in range(0, numel, CHUNK))

    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        return OneRead(tuple(self.select_traced(scores, kept)))

    def select_traced(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        return [score > self._threshold for score in scores]

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, score, mask)

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return scores as far from the threshold as before, above it for the weights in `masks`, else below it."""
        threshold, found = self._threshold, []
        least = float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
        for score, mask in zip(scores, masks, strict=True):
            distance = (score.detach() - threshold).abs()
            found.append(torch.where(mask, (threshold + distance).clamp(min=least), threshold - distance))
        return found

    def importance(self, score: Tensor) -> Tensor:
        return score

    @property
    def _threshold(self) -> float:
        """The threshold as float32 has it: the same number, whether a backend compares in float32 or in float64."""
        return float(np.float32(self.threshold))


class _StraightThrough(StraightThrough):
    """The masked weight; the score gets its gradient as if the mask were the score."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, score, mask = ctx.saved_tensors
        for_score = grad.to(score.dtype) * weight if ctx.needs_input_grad[1] else None
        for_weight = torch.where(mask, grad, 0.0) if ctx.needs_input_grad[0] else None
        return for_weight, for_score, None
