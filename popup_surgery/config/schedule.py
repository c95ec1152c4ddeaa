"""The learning rate over a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import Training


def rates(training: "Training") -> Callable[[float, float], float]:
    """Return the learning rate as a function of the epochs passed, from 0, and the epochs from one rate to the next.

    After e of E epochs, the rate is lr · (e + stride)/W within the W epochs of warm-up. After them, it follows timm's
    schedule over the remaining epochs. For `cosine` this is lr · 0.5·(1 + cos(π(e − W)/(E − W))), as in the paper's
    experiments.
    """
    import torch
    from timm.scheduler import create_scheduler_v2

    warmup, length = training.warmup_epochs, training.epochs - training.warmup_epochs
    scheduler = None
    if training.schedule != "constant" and length > 0:
        optimizer = torch.optim.SGD([torch.zeros(1)], training.lr)
        scheduler, _ = create_scheduler_v2(optimizer, training.schedule, length, **training.schedule_kwargs)
    elif training.schedule_kwargs:
        raise ValueError("the rate is constant, or no epochs are left after warmup_epochs")

    def rate(epoch: float, stride: float) -> float:
        if epoch < warmup:
            return training.lr * (epoch + stride) / warmup
        if scheduler is None:
            return training.lr
        scheduler.step(epoch - warmup)
        return float(optimizer.param_groups[0]["lr"])

    return rate
