"""The learning rate over a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import Training


def rates(training: "Training") -> Callable[[float, float], float]:
    """The learning rate as a function of the epochs that have passed, from 0, and the epochs from one rate to the next.

    (e + stride)/W of `lr` in the W epochs of warm-up; then timm's schedule over the epochs that are left, which for
    `cosine` is lr · 0.5·(1 + cos(π(e − W)/(E − W))), as in the paper's experiments.
    """
    import torch
    from timm.scheduler import create_scheduler_v2

    warmup, length = training.warmup_epochs, training.epochs - training.warmup_epochs
    scheduler = None
    if training.schedule != "constant" and length > 0:
        optimizer = torch.optim.SGD([torch.zeros(1)], training.lr)
        scheduler, _ = create_scheduler_v2(optimizer, training.schedule, length, **training.schedule_kwargs)
    elif training.schedule_kwargs:
        raise ValueError("there is nothing to schedule")

    def rate(epoch: float, stride: float) -> float:
        if epoch < warmup:
            return training.lr * (epoch + stride) / warmup
        if scheduler is None:
            return training.lr
        scheduler.step(epoch - warmup)
        return float(optimizer.param_groups[0]["lr"])

    return rate
