"""Accuracy of a plain network."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.workers import worker_deaths
from ..errors import RunError


@worker_deaths()
def accuracy_of(model: nn.Module, batches: Iterator[Batch], autocast: Callable[[], Any]) -> tuple[float, int]:
    """Return the accuracy of a plain network in eval mode, 0 … 1, and the number of images.

    Raises:
        RunError: there are no images.
    """
    correct, seen = right_answers(model, batches, autocast)
    if not seen:
        raise RunError("the data set has no validation images")
    return correct / seen, seen


def right_answers(model: nn.Module, batches: Iterator[Batch], autocast: Callable[[], Any]) -> tuple[int, int]:
    """Return how many images a plain network classifies correctly in eval mode, and the number of images."""
    model.eval()
    seen, correct = 0, None
    with torch.inference_mode(), autocast():
        for images, labels in batches:
            right: Tensor = (model(images).argmax(1) == labels).sum()
            correct = right if correct is None else correct + right
            seen += len(labels)
    return int(correct or 0), seen
