"""One step of the optimiser."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.schema import Training
from ..data.batches import Batches, ProcessShard, TrainBatch
from ..errors import RunError
from ..torch_compat import BROADCAST_BUFFERS_DEPRECATED
from .mixing import Mixing
from .optimizers import for_derivatives, make_step, optimizer_of, second_order, seed_for_step
from .outputs import heads
from .sharding import shard, uses_shards


class OptimizerStep:
    """One step of the optimiser, over this process's pieces of a batch.

    Args:
        classes: number of classes of the data set; 0 if unknown.
        penalty: returns what the loss of each batch gains beside that of the images; None for nothing.

    Attributes:
        parameters: what a step changes: all parameters of the model that require a gradient.
        model, optimizer: as prepared by Accelerate.
        sums: float64 tensor [3] of the summed loss without the penalty, the correct answers and the images since the
            last reset to 0.
        not_finite: the first step whose loss was not finite, or -1. It is a tensor, so that no step waits for it.
        number: the number of the step, as a tensor too, so that one graph serves all steps.
        warm_up: how many steps of a run take longer than the others.
    """

    warm_up = 1

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        accelerator: Accelerator,
        part: ProcessShard,
        classes: int,
        penalty: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.training, self.accelerator, self.part, self.penalty = training, accelerator, part, penalty
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = optimizer_of(self.parameters, training)
        self.second_order = second_order(optimizer)
        self.mixing = Mixing(training, classes) if training.mixup or training.cutmix else None
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        self.model, self.optimizer = self._prepared(model, optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if training.compile:
            self.model.compile(mode=None if training.compile is True else training.compile)
        self.sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
        self.not_finite = torch.tensor(-1, device=accelerator.device)
        self.number = torch.tensor(0, device=accelerator.device)

    def _prepared(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Return the model and the optimiser as prepared by Accelerate."""
        from timm.layers import convert_sync_batchnorm

        if self.training.sync_batchnorm and self.part.processes > 1:
            model = convert_sync_batchnorm(model)
        if self.training.channels_last:
            model = cast(Any, model).to(memory_format=torch.channels_last)  # torch 2.11 has no type for this argument
        if uses_shards(self.accelerator):
            self.parameters.clear()  # so that none of them stays whole in memory
            optimizer.param_groups.clear()
            shard(model, self.accelerator)
            spread = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return model, self.accelerator.prepare_optimizer(optimizer_of(spread, self.training))
        if not self.parameters:  # DDP refuses a model without gradients to exchange
            return model.to(self.accelerator.device), self.accelerator.prepare_optimizer(optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", BROADCAST_BUFFERS_DEPRECATED)
            return self.accelerator.prepare(model, optimizer)

    def pieces(self, data: Batches, epoch: int, first: int = 0) -> Iterator[Any]:
        """Return this process's pieces of an epoch's batches, from the batch `first` on, as a step takes them."""
        return data.train(epoch, self.part, first)

    def __call__(self, pieces: Iterator[TrainBatch], number: int, rate: Callable[[], float]) -> bool:
        """Take step `number` of the run, counted from 0.

        Args:
            pieces: as `pieces` returns them.
            rate: returns the learning rate; called once there is a batch.

        Returns False if there are no more batches; then no step is taken.
        """
        for piece in range(self.part.accumulate):
            images, labels, weight = next(pieces, (None, None, 0.0))
            if images is None or labels is None:
                return False
            if piece == 0:
                self._begin(number, rate())
                self.optimizer.zero_grad()
            last = piece == self.part.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self._piece(images, labels, weight)
        self._step(number)
        return True

    def _begin(self, number: int, rate: float) -> None:
        """Set the number and the learning rate of a step."""
        self.number.fill_(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _piece(self, images: Tensor, labels: Tensor, weight: float) -> None:
        """Add the gradients of a piece, a share `weight` of its batch, and count its answers."""
        loss, logits = self._backward(images, labels, weight)
        self._count(loss, logits, labels, len(labels) if weight else 0)

    def _step(self, number: int) -> None:
        """Let the optimiser change the parameters."""
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.training.clip_norm)
        if not self.parameters:
            return
        seed_for_step(self.optimizer.optimizer, self.training.seed, number, self.part.processes)
        try:
            make_step(self.optimizer, self.training)
        except RuntimeError as error:
            if not self.second_order:
                raise
            raise RunError(
                f"training.optimizer is {self.training.optimizer}, which needs second derivatives; an operation of "
                f"this network has none: {error}"
            ) from error

    def _backward(self, images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of a piece, a share `weight` of its batch. Returns its loss and its logits."""
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels)
        if self.training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with for_derivatives(self.optimizer.optimizer), self.accelerator.autocast():
            found = heads(self.model(images))
            loss = sum(
                (self.criterion(logits.float(), targets) * share for logits, share in found[1:]),
                self.criterion(found[0][0].float(), targets),
            )
        # processes average their gradients; the weights sum to 1 over all pieces
        if self.parameters:
            with for_derivatives(self.optimizer.optimizer):
                create_graph = {"create_graph": True} if self.second_order else {}
                penalty = self.penalty()
                whole = loss if penalty is None else loss + penalty
                self.accelerator.backward(whole * (weight * self.part.processes), **create_graph)
        return loss.detach(), found[0][0].detach()

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor, count: int) -> None:
        right = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss * count, right * bool(count), torch.full_like(right, count)])
        first = (self.not_finite < 0) & ~loss.isfinite()
        self.not_finite.copy_(torch.where(first, self.number, self.not_finite))
