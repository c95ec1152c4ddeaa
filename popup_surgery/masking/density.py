"""The share of weights that take part, as a number that can be differentiated, and a penalty on it."""

from numbers import Real

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from ..learners import Learner, name_of
from .ranking import score_of
from .walk import masked_weights, unwrap


def density_penalty(model: nn.Module, weight: float = 1.0, target: float = 0.0) -> Tensor:
    """Return a penalty on the share of weights that take part: `weight` · max(0, density − `target`).

    Add it to the loss of each batch. It acts until no more than the share `target` of all masked weights take part. The
    gradient reaches each score as that of its mask does in the learner, straight through. So `piggyback` pays
    `weight` / n for each of n weights, and `supermask` the gradient of the expected number of weights, the L0 penalty
    of Louizos et al. (ICLR 2018), while the density is that of the network that a file would contain. A penalty on the
    number of kept weights with straight-through masks is that of R-AMT (Zheng et al., ICCV 2023), which has no target.

    Args:
        model: a converted network, whose learner takes no k.
        weight: what the loss gains for all weights together.
        target: the density at which the penalty ends, from 0 and below 1.

    Returns:
        A float32 scalar, differentiable in the scores.

    Raises:
        ConversionError: nothing is masked, the learner takes a k, or an argument has a bad value.
    """
    for name, value, holds, expected in (
        ("weight", weight, lambda x: 0 < x < float("inf"), "a number above 0"),
        ("target", target, lambda x: 0 <= x < 1, "a share from 0 and below 1"),
    ):
        if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
            raise ConversionError(f"{name} is {value!r}; expected {expected}")
    found = [
        (slot.ranking.learner, slot.mask(module, name), score_of(module, name))
        for _, module, name, slot in masked_weights(unwrap(model))
    ]
    if not found:
        raise ConversionError(f"{type(model).__name__} has no masked weights; convert it first")
    for learner, _, _ in found:
        _check(learner)
    kept = torch.stack([learner.kept_weights(score, mask) for learner, mask, score in found]).sum()
    density = kept / sum(score.numel() for _, _, score in found)
    return (density - target).clamp(min=0) * weight


def _check(learner: Learner) -> None:
    if learner.takes_k:
        raise ConversionError(
            f"{name_of(learner)} takes a k, which sets how many weights are kept; a penalty on their number "
            "needs a learner without one, such as supermask or piggyback"
        )
