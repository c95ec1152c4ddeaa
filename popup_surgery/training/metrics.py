"""The numbers of an epoch, of steps within one, and of a layer's mask."""

import math
from dataclasses import asdict, dataclass
from typing import Any


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Steps:
    """A line of metrics.jsonl within an epoch: after step `step` of the run, counted from 1.

    `train_loss` is the mean over the images since the line before, or since the epoch began; `lr` is the last rate.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float

    def line(self) -> dict[str, Any]:
        """Return it as a JSON object, with null for numbers that are not finite."""
        return _finite(asdict(self))


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl. Shares are 0 … 1; `accuracy` is that on the validation images.

    `changed` is the share of mask bits that differ from the epoch before, 0 where nothing is masked. `skipped` counts
    the images of both splits that could not be read and were left out. `k` is the share of all masked weights that took
    part in the epoch; it is None, and not in the line, unless the recipe has a `surgery.k_schedule`. `density` is the
    share of weights that the masks keep at its end, None where nothing is masked and in runs of version 0.1.
    `train_loss` is that of the images, without penalties.
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
    k: float | None = None
    density: float | None = None

    def line(self) -> dict[str, Any]:
        """Return the epoch as a JSON object: null for numbers that are not finite, no k or density where it is None."""
        values = _finite(asdict(self))
        return {name: value for name, value in values.items() if name not in ("k", "density") or value is not None}


@dataclass(frozen=True)
class LayerMask:
    """Numbers of one weight tensor's mask, each 0 … 1.

    `density` is the share of weights that it keeps. `changed` is the share of bits that differ from the epoch before.
    `overlap` is the share of its kept weights that the initial mask keeps too.
    """

    name: str
    density: float
    changed: float
    overlap: float
