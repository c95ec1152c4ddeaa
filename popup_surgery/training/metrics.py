"""The numbers of an epoch and of a layer's mask."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl. Shares are 0 … 1; `accuracy` is on the validation images.

    `changed` is the share of mask bits that are other than an epoch before, 0 where nothing is masked; `skipped` counts
    images of both splits that could not be read and were left out.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    accuracy: float
    changed: float
    seconds: float
    images_per_second: float
    skipped: int = 0

    def line(self) -> dict[str, Any]:
        """As JSON, null for what is not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class LayerMask:
    """One weight's mask: the share that is kept, the share of bits other than an epoch before, and of the kept weights
    the share that the initial mask keeps too; all 0 … 1."""

    name: str
    density: float
    changed: float
    overlap: float
