"""Edge-popup with several nested masks of one score: multicoated supermasks (Okoshi et al., 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ConversionError
from ..selection import kept_count, select_op
from .base import masked
from .edge_popup import EdgePopup

MOST = 8


@dataclass(frozen=True)
class Coats(EdgePopup):
    """w_eff = w · Σᵢ hᵢ(|s|), where hᵢ is 1 for the share `coats[i]` of a layer's largest |s| and 0 elsewhere.

    "Multicoated Supermasks Enhance Hidden Networks", ICML 2022, with one score. The masks are nested: a weight in the
    first two counts twice. Backward, straight through each: ∂L/∂s = N · ∂L/∂w_eff · w · sign(s) for N coats. Without
    `coats` it is edge-popup. A file stores one bit more for each weight of coat i, whether it is in coat i + 1 too.
    Deviations from the authors' code: shares are kept exactly, and ties go to the lower index.

    Args:
        coats: the shares kept, from 2 to 8 of them in falling order, such as [0.3, 0.08, 0.03]. The first is k, to
            which `scaled` refers. None: k alone.
    """

    coats: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.coats is None:
            return
        shares = list(self.coats) if isinstance(self.coats, list | tuple) else []
        numbers = all(type(share) in (int, float) and 0 < share <= 1 for share in shares)
        falling = numbers and all(one > other for one, other in pairwise(shares))
        if not 2 <= len(shares) <= MOST or not falling:
            raise ConversionError(
                f"edge_popup: coats is {self.coats!r}; expected 2 to {MOST} shares kept, above 0 and up to 1, each "
                "smaller than the one before"
            )

    @property
    def planes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"coat{i}" for i in range(2, len(self.coats or ()) + 1))

    @property
    def ranks_globally(self) -> bool:  # type: ignore[override]
        return self.coats is None

    @property
    def takes_pattern(self) -> bool:  # type: ignore[override]
        return self.coats is None

    @property
    def takes_fixed(self) -> bool:  # type: ignore[override]
        return self.coats is None

    @property
    def one_pass(self) -> bool:  # type: ignore[override]
        return self.coats is None

    def k_error(self, k: Any) -> str:
        if self.coats is None or k == self.coats[0]:
            return ""
        return f"expected {self.coats[0]:g}, the first of learner_options.coats"

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        if self.coats is None:
            return super().effective(weight, score, mask)
        count = mask.float()
        for coat in self._further(score):
            count = count + coat
        return _StraightThrough.apply(weight, score, mask, count, len(self.coats))

    def plane(self, kind: str, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        coats = [mask]
        for coat in self._further(score):
            coats.append(coat & coats[-1])
        index = self.planes.index(kind)
        return coats[index + 1][coats[index]]

    def _further(self, score: Tensor) -> list[Tensor]:
        """Return the masks of all coats but the first, from the outside in."""
        n, scores = score.numel(), [score.detach()]
        return [select_op(scores, kept_count(n, share))[0] for share in (self.coats or ())[1:]]


class _StraightThrough(torch.autograd.Function):
    """The weight times the number of its coats; the score gets its gradient as if each coat were its magnitude."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, score: Tensor, mask: Tensor, count: Tensor, coats: int) -> Tensor:
        return masked((weight.float() * count).to(weight.dtype), mask)  # in float32, as a file does

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        weight, score, mask, count, ctx.coats = inputs
        trained = ctx.needs_input_grad[0]
        ctx.save_for_backward(weight, score, mask if trained else None, count if trained else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, score, mask, count = ctx.saved_tensors
        for_score = for_weight = None
        if ctx.needs_input_grad[1]:
            for_score = (grad.to(score.dtype) * weight).mul_(score.sign()) * ctx.coats
        if ctx.needs_input_grad[0]:
            for_weight = torch.where(mask, grad * count.to(grad.dtype), 0.0)
        return for_weight, for_score, None, None, None
