"""The one training loop, on Accelerate."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ..errors import RunError
from ..surgery import bake
from .data import Batch, Batches, Progress
from .recipe import Training

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl. Accuracies are shares of 0 … 1; `accuracy` is on the validation images."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    accuracy: float
    seconds: float
    images_per_second: float

    def line(self) -> dict[str, Any]:
        """As JSON, null for what is not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def start(training: Training) -> Accelerator:
    """The accelerator of a run: device, precision and processes."""
    AcceleratorState._reset_state()  # a run earlier in this process may have had another precision
    try:
        accelerator = Accelerator(mixed_precision=_PRECISIONS[training.precision])
    except ValueError as error:
        raise RunError(
            f"training.precision is {training.precision!r}, which this device does not have: {error}"
        ) from error
    processes = max(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    if processes > 1:
        raise RunError(f"the run was started on {processes} processes; this version trains on one")
    return accelerator


def fit(
    model: nn.Module,
    data: Batches,
    training: Training,
    accelerator: Accelerator,
    progress: Progress,
    after_epoch: Callable[[Epoch], None],
) -> list[Epoch]:
    """Train whatever of `model` requires a gradient: a converted network's scores, or a plain one's weights.

    The last epoch's accuracy is the run's: nothing is selected on the validation images.

    Raises:
        RunError: the loss is not finite.
    """
    from timm.optim import create_optimizer_v2

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"nesterov": training.nesterov} if training.optimizer in ("sgd", "momentum") else {}
    optimizer = create_optimizer_v2(
        parameters,
        training.optimizer,
        training.lr,
        training.weight_decay,
        training.momentum,
        **options,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rate(epoch, training))
    criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
    model, optimizer = accelerator.prepare(model, optimizer)
    history = []
    for epoch in range(training.epochs):
        began = time.perf_counter()
        lr = float(schedule.get_last_lr()[0])
        model.train()
        seen = 0
        loss_sum, correct = torch.zeros(2, device=accelerator.device)
        with progress(data.steps(), f"epoch {epoch + 1}/{training.epochs}") as step:
            for images, labels in data.train(epoch):
                optimizer.zero_grad()
                with accelerator.autocast():
                    logits = model(images)
                    loss = criterion(logits.float(), labels)
                accelerator.backward(loss)
                optimizer.step()
                seen += len(labels)
                loss_sum += loss.detach() * len(labels)
                correct += (logits.detach().argmax(1) == labels).sum()
                step()
        seconds = time.perf_counter() - began
        if not math.isfinite(mean_loss := float(loss_sum) / seen):
            raise RunError(f"the loss of epoch {epoch + 1} is {mean_loss} at the rate {lr:g}; expected a finite one")
        accuracy, _ = accuracy_of(bake(accelerator.unwrap_model(model)), data.validation(), accelerator.autocast)
        history.append(Epoch(epoch + 1, lr, mean_loss, float(correct) / seen, accuracy, seconds, seen / seconds))
        after_epoch(history[-1])
        schedule.step()
    return history


def rate(epoch: int, training: Training) -> float:
    """Factor of the rate in `epoch`, from 0: (e + 1)/W in the warm-up, then 0.5·(1 + cos(π(e − W)/(E − W)))."""
    warmup, epochs = training.warmup_epochs, training.epochs
    if epoch < warmup:
        return (epoch + 1) / warmup
    if training.schedule == "constant" or epoch >= epochs:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def accuracy_of(model: nn.Module, batches: Iterator[Batch], autocast: Callable[[], Any]) -> tuple[float, int]:
    """Share of images that a plain network classifies rightly, in eval mode, and how many images there were."""
    model.eval()
    seen, correct = 0, None
    with torch.inference_mode(), autocast():
        for images, labels in batches:
            right: Tensor = (model(images).argmax(1) == labels).sum()
            correct = right if correct is None else correct + right
            seen += len(labels)
    if correct is None:
        raise RunError("the data set has no validation images")
    return int(correct) / seen, seen
