"""Signed supermasks: keep, hide or invert each weight (Koster et al., 2022)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConversionError
from ..selection import Limits, OneRead, Selection
from ..weights.streams import draw_scores
from .base import StraightThrough, masked
from .edge_popup import EdgePopup


@dataclass(frozen=True)
class Signed(EdgePopup):
    """w_eff = w · m, where m is sign(s) for the k share of a layer's largest |s|, or for |s| > `threshold`, else 0.

    "Signing the Supermask: Keep, Hide, Invert", ICLR 2022, section 3. There is one score for each weight: a tensor of
    the weight's shape, always float32. Backward, straight through m: ∂L/∂s = ∂L/∂w_eff · w, for kept and dropped
    weights alike. A file stores one bit more for each kept weight, its sign. The paper uses a threshold, `signed`
    constants, ELU in place of ReLU, and SGD with Nesterov momentum and weight decay, which pulls scores below the
    threshold. Deviation from the paper: by default exactly `kept` weights take part, as in edge-popup.

    Args:
        threshold: a weight takes part if its |s| is larger; then the learner takes no k. None: k decides.
        init: `uniform` for scores from U(−1/√fan_in, 1/√fan_in); or a number b > 0 for U(−b, b). A threshold must be
            below that bound in every layer, so that weights take part at first.
    """

    threshold: float | None = None
    init: float | str = "uniform"

    planes = ("sign",)

    def __post_init__(self) -> None:
        for name, least, other in (("threshold", 0.0, None), ("init", 1e-30, "uniform")):
            value = getattr(self, name)
            if value != other and not (type(value) in (int, float) and least <= float(value) <= 1000):
                raise ConversionError(
                    f"signed: {name} is {value!r}; expected {other!r}, or a number "
                    f"{'from 0' if least == 0 else 'above 0'} to 1000"
                )

    @property
    def takes_k(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    @property
    def takes_pattern(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    @property
    def takes_fixed(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    @property
    def takes_floor(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        bound = 1 / math.sqrt(fan_in) if isinstance(self.init, str) else self.init
        if self.threshold is not None and self._threshold >= np.float32(bound):
            raise ConversionError(
                f"signed: threshold is {self.threshold!r}; expected less than {bound:.3g}, up to which the scores of "
                f"{name!r} are drawn, so that weights take part at first; learner_options.init sets a larger bound"
            )
        return draw_scores(numel, 1 / bound**2 if self.init != "uniform" else fan_in, seed, name)

    def select(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), **limits: Unpack[Limits]
    ) -> Selection:
        if self.threshold is None:
            return super().select(scores, kept, names, **limits)
        return OneRead(tuple(self.select_traced(scores, kept)))

    def select_traced(
        self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = (), **limits: Unpack[Limits]
    ) -> Sequence[Tensor]:
        if self.threshold is None:
            return super().select_traced(scores, kept, names, **limits)
        return [score.abs() > self._threshold for score in scores]

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, score, mask)

    def kept_weights(self, score: Tensor, mask: Tensor) -> Tensor:
        """Return Σ|m|, with the gradient sign(s) for kept and dropped weights alike, which pulls all scores to 0."""
        ones = torch.ones_like(score)
        return (self.effective(ones, score, mask) * _sign(score.detach(), ones)).sum()

    def plane(self, kind: str, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return ~self.effective(weight, score, mask)[mask].signbit()

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return scores with the same signs, above the threshold for the weights in `masks`, and not elsewhere."""
        if self.threshold is None:
            return super().seed_from_mask(scores, masks)
        least = float(np.nextafter(np.float32(self._threshold), np.float32(np.inf)))
        sizes = [score.detach().abs() for score in scores]
        moved = [
            torch.where(m, s.clamp(min=least), s.clamp(max=self._threshold)) for s, m in zip(sizes, masks, strict=True)
        ]
        return [size.copysign(score.detach()) for size, score in zip(moved, scores, strict=True)]

    @property
    def _threshold(self) -> float:
        """The threshold as float32 has it: the same number, whether a backend compares in float32 or in float64."""
        return float(np.float32(self.threshold or 0.0))


class _StraightThrough(StraightThrough):
    """The weight, kept, hidden or inverted; the score gets its gradient as if it were the factor itself."""

    @staticmethod
    def forward(weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return masked(weight * _sign(score, weight), mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, score, mask = ctx.saved_tensors
        for_score = grad.to(score.dtype) * weight if ctx.needs_input_grad[1] else None
        for_weight = torch.where(mask, grad * _sign(score, weight), 0.0) if ctx.needs_input_grad[0] else None
        return for_weight, for_score, None


def _sign(score: Tensor, like: Tensor) -> Tensor:
    """Return 1 or −1 in the dtype of `like`; also of a zero, which has a sign."""
    return torch.ones_like(score).copysign(score).to(like.dtype)
