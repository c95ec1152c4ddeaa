"""The one training loop, on Accelerate: one process or many, to be stopped and gone on with at any step."""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from ..config.schedule import rates
from ..config.schema import Training
from ..data.batches import TRAIN, Batches, ProcessShard, Progress
from ..data.reading import warn_of_skipped
from ..data.seeding import seed_generators as _seed
from ..data.workers import worker_deaths
from ..errors import RunError, Stopped
from ..learners import sampled
from ..masking.bake import bake, masks
from ..torch_compat import BROADCAST_BUFFERS_DEPRECATED
from .checkpoint import Checkpoint, file_of, pack, unpack
from .evaluation import right_answers
from .metrics import Epoch, LayerMask

log = logging.getLogger("popup_surgery")

Packed = np.ndarray[Any, np.dtype[np.uint8]]


class Trainer:
    """Training of whatever of a model requires a gradient: a converted network's scores, or a plain one's weights.

    Everything random in a step is a function of (seed, epoch, step, process), so that no generator's state is kept.

    Args:
        kept: masks of parameters by name, bool: outside them a plain network's weights stay 0.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        training: Training,
        accelerator: Accelerator,
        progress: Progress,
        kept: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        from timm.layers import convert_sync_batchnorm
        from timm.optim import create_optimizer_v2

        self.core, self.data, self.training, self.accelerator = model, data, training, accelerator
        self.progress = progress
        self.part = ProcessShard(accelerator.process_index, accelerator.num_processes, training.accumulate)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options = training.optimizer_kwargs.copy()
        if training.optimizer in ("sgd", "momentum"):
            options["nesterov"] = training.nesterov
        try:
            optimizer = create_optimizer_v2(
                self.parameters or [nn.Parameter(torch.empty(0))], training.optimizer, training.lr,
                training.weight_decay, training.momentum, **options,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise RunError(
                f"training.optimizer {training.optimizer} does not take {training.optimizer_kwargs}: {error}"
            ) from error
        self.rate = rates(training)
        self.mixup = self._mixup()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        if training.sync_batchnorm and self.part.processes > 1:
            model = convert_sync_batchnorm(model)
        if training.channels_last:
            model = model.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", BROADCAST_BUFFERS_DEPRECATED)
            if self.parameters:
                self.model, self.optimizer = accelerator.prepare(model, optimizer)
            else:  # nothing that processes would exchange, which DDP refuses
                self.model, self.optimizer = model.to(accelerator.device), accelerator.prepare(optimizer)
        self._hold_zeros(kept)
        if training.compile:
            self.model.compile(mode=None if training.compile is True else training.compile)
        self.epochs = training.epochs
        self.history: list[Epoch] = []
        self.batch = 0  # of the epoch that is running, the next one
        self.step = 0  # of the whole run
        self.kept = 0  # the step of the last checkpoint
        self.seconds = 0.0  # spent on the epoch before the run was gone on with
        self.sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)  # loss, right answers, images
        self.wrong = torch.tensor(-1, device=accelerator.device)  # the first step whose loss was not finite
        self.numel = {key: mask.numel() for key, mask in self.masks().items()}
        self.initial = self.before = self.found = self._packed()  # masks at the start, an epoch ago, and now
        self.told_of_skipped = False

    @property
    def epoch(self) -> int:
        """The epoch that is running, from 0."""
        return len(self.history)

    @worker_deaths()
    def run(
        self,
        after_epoch: Callable[[Epoch], None],
        keep: Callable[[int, Checkpoint], None] = lambda step, checkpoint: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Epoch]:
        """Train to the end. The last epoch's accuracy is the run's: nothing is selected on the validation images.

        Args:
            after_epoch: called with each epoch's numbers.
            keep: called with each checkpoint, in the first process alone.
            stop: asked after each step; once it is true in any process, a checkpoint is kept and `Stopped` raised.

        Raises:
            RunError: the loss is not finite; a process has other masks than the first.
            DataError: an image cannot be read; a worker process of the loader died.
            Stopped: `stop` was true.
        """
        while self.epoch < self.epochs:
            if not self.batch:
                self._begin_epoch()
            self._train_epoch(keep, stop)
            self._end_epoch(after_epoch)
            self._keep(keep)
            if self.epoch < self.epochs and self._highest(int(stop())):
                raise Stopped(f"stopped after step {self.step:,}, in epoch {self.epoch}")
        return self.history

    def _begin_epoch(self) -> None:
        """Called before the first step of each epoch."""

    def _scheduled(self) -> int:
        """The epoch whose rate holds now."""
        return self.epoch

    def _train_epoch(self, keep: Callable[[int, Checkpoint], None], stop: Callable[[], bool]) -> None:
        training, steps = self.training, self.data.steps()
        self.model.train()
        began = kept = time.monotonic()
        spent = self.seconds
        pieces = self.data.train(self.epoch, self.part, self.batch)
        with self.progress(steps, f"epoch {self.epoch + 1}/{self.epochs}") as advance:
            for _ in range(self.batch):
                advance()
            while self._one_step(pieces):
                advance()
                self.seconds = spent + time.monotonic() - began
                late = training.checkpoint_minutes and time.monotonic() - kept > 60 * training.checkpoint_minutes
                wish = self._highest(2 if stop() else 1 if late else 0)
                if wish:
                    self._keep(keep)
                    kept = time.monotonic()
                if wish == 2:
                    raise Stopped(f"stopped after step {self.step:,}, in epoch {self.epoch + 1}")
        self.seconds = spent + time.monotonic() - began

    def _one_step(self, pieces: Iterator[tuple[Tensor, Tensor, float]]) -> bool:
        """One step of the optimiser; False where the epoch has no more batches."""
        # a learner that samples shows the pieces of a step, in all processes, the same network
        with sampled(self.training.seed, self.epoch, self.batch):
            return self._update(pieces)

    def _update(self, pieces: Iterator[tuple[Tensor, Tensor, float]]) -> bool:
        accelerator, training = self.accelerator, self.training
        _seed([training.seed, self.epoch, self.batch, self.part.rank])
        for piece in range(self.part.accumulate):
            images, labels, weight = next(pieces, (None, None, 0.0))
            if images is None or labels is None:
                return False
            targets = labels
            if self.mixup is not None:
                images, targets = self._mixed(images, labels)
            if training.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            last = piece == self.part.accumulate - 1
            if piece == 0:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._rate(self.batch)
                self.optimizer.zero_grad()
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    logits = self.model(images)
                    loss = self.criterion(logits.float(), targets)
                # processes average their gradients; the weights sum to 1 over all pieces
                if self.parameters:
                    accelerator.backward(loss * (weight * self.part.processes))
            count = len(labels) if weight else 0
            right = (logits.detach().argmax(1) == labels).sum()
            self.sums += torch.stack([loss.detach() * count, right * bool(count), torch.full_like(right, count)])
            self.wrong = torch.where((self.wrong < 0) & ~loss.detach().isfinite(), self.step, self.wrong)
        if training.clip_norm is not None:
            accelerator.clip_grad_norm_(self.parameters, training.clip_norm)
        if self.parameters:
            self.optimizer.step()
        self.batch += 1
        self.step += 1
        return True

    def _hold_zeros(self, kept: Mapping[str, Tensor]) -> None:
        self.held = held = {
            name: (self.core.get_parameter(name), mask.to(self.accelerator.device, copy=True))
            for name, mask in kept.items()
        }

        def zero(*_: Any) -> None:
            with torch.no_grad():
                for parameter, mask in held.values():
                    parameter.mul_(mask)

        for parameter, mask in held.values():
            parameter.register_hook(mask.mul)  # keeps them out of the gradients' norm
        if held:  # whatever an optimiser does with a gradient of 0
            self.optimizer.optimizer.register_step_post_hook(zero)

    def masks(self) -> dict[str, Tensor]:
        """The masks of a converted network, or those that a plain one's weights are held in."""
        return masks(self.core) or {name: mask for name, (_, mask) in self.held.items()}

    def _packed(self) -> dict[str, Packed]:
        """The masks, one bit a weight."""
        return {key: np.packbits(mask.cpu().numpy()) for key, mask in self.masks().items()}

    def _rate(self, batch: int) -> float:
        """The rate of a batch of this epoch."""
        epoch = self._scheduled()
        if self.training.schedule_per == "epoch":
            return self.rate(float(epoch), 1.0)
        steps = self.data.steps()
        if not steps:
            raise RunError("training.schedule_per is step; the data set does not say how many steps an epoch has")
        return self.rate(epoch + batch / steps, 1 / steps)

    def _mixup(self) -> Any:
        from timm.data import Mixup

        training, classes = self.training, len(self.data.classes)
        if not training.mixup and not training.cutmix:
            return None
        if not classes:
            raise RunError("training.mixup and cutmix need the number of classes, which the data set does not say")
        return Mixup(
            training.mixup, training.cutmix, None, training.mixup_prob, training.mixup_switch_prob,
            training.mixup_mode, label_smoothing=0.0, num_classes=classes,
        )  # fmt: skip

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed in pairs, and the probabilities of their classes; the last of an odd number stays as it is."""
        targets = functional.one_hot(labels, self.mixup.num_classes).float()
        even = len(images) // 2 * 2
        if even:
            images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets

    def layers(self) -> list[LayerMask]:
        """The mask of each weight at the end of the last epoch."""
        return [
            LayerMask(
                key, _ones(mask) / self.numel[key], _ones(mask ^ self.before[key]) / self.numel[key],
                _ones(mask & self.initial[key]) / max(_ones(mask), 1),
            )
            for key, mask in self.found.items()
        ]  # fmt: skip

    def _end_epoch(self, after_epoch: Callable[[Epoch], None]) -> None:
        self._check_finite()
        loss, right, seen = self.accelerator.reduce(self.sums, "sum").tolist()
        self._share_statistics()
        with sampled(self.training.seed, self.epoch):
            baked = bake(self.core)
        batches = self.data.validation(self.part)
        correct, images = right_answers(baked, batches, self.accelerator.autocast)
        counts = self.accelerator.reduce(torch.tensor([correct, images], device=self.accelerator.device), "sum")
        skipped = self._skipped()
        if not seen or not counts[1]:
            raise RunError(f"the data set has no {'validation' if seen else 'training'} images that can be read")
        self.before, self.found = self.found, self._packed()
        changed = sum(_ones(mask ^ self.before[key]) for key, mask in self.found.items())
        epoch = Epoch(
            self.epoch + 1, self.optimizer.param_groups[0]["lr"], loss / seen, right / seen,
            int(counts[0]) / int(counts[1]), changed / max(sum(self.numel.values()), 1), self.seconds,
            seen / self.seconds, skipped,
        )  # fmt: skip
        self.history.append(epoch)
        self.batch, self.seconds, self.data.skipped = 0, 0.0, 0
        self.sums.zero_()
        after_epoch(epoch)

    def _keep(self, keep: Callable[[int, Checkpoint], None]) -> None:
        self._check_finite()
        self._check_masks()
        self._share_statistics()
        sums, skipped = self.accelerator.reduce(self.sums, "sum"), self._skipped()
        if self.accelerator.is_main_process:
            keep(self.step, self._checkpoint(sums.tolist(), skipped))
        self.kept = self.step
        self.accelerator.wait_for_everyone()

    def _skipped(self) -> int:
        """Images that all processes have left out in this epoch so far; when there are any, one is named, once."""
        skipped = int(self.accelerator.reduce(torch.tensor(self.data.skipped, device=self.accelerator.device), "sum"))
        if skipped and not self.told_of_skipped:
            named = [file for file in gather_object([self.data.left_out]) if file]
            self.told_of_skipped = bool(named)
            if named and self.accelerator.is_main_process:
                warn_of_skipped(skipped, named[0])
        return skipped

    def _check_finite(self) -> None:
        wrong = int(self._highest(int(self.wrong) + 1)) - 1
        if wrong >= 0:
            self._fail_at(wrong, "the loss")
        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                self._fail_at(self.step - 1, f"{name} after the update")

    def _fail_at(self, step: int, what: str) -> None:
        kept = f"the last good checkpoint is {file_of(self.kept)}" if self.kept else "there is no checkpoint yet"
        raise RunError(
            f"{what} of step {step + 1:,}, in epoch {self.epoch + 1}, is not finite at the rate "
            f"{self._rate(self.batch - self.step + step):g}; {kept}"
        )

    def _check_masks(self) -> None:
        if self.part.processes == 1:
            return
        digest = hashlib.sha256()
        for mask in self._packed().values():
            digest.update(mask.tobytes())
        digests = gather_object([digest.hexdigest()])
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise RunError(f"process {rank} has other masks than process 0 after step {self.step:,}")

    def _share_statistics(self) -> None:
        """The first process's running statistics, to all of them."""
        if self.part.processes > 1:
            for buffer in self.core.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _highest(self, wish: int) -> int:
        """The highest of all processes' `wish`."""
        if self.part.processes == 1:
            return wish
        wishes = torch.tensor(wish, device=self.accelerator.device)
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
        return int(wishes)

    def _checkpoint(self, sums: list[float], skipped: int) -> Checkpoint:
        tensors = {f"model.{key}": tensor.detach().cpu().contiguous() for key, tensor in self._learnt().items()}
        tensors |= {f"before.{key}": torch.from_numpy(mask) for key, mask in self.found.items()}
        scaler = self.accelerator.scaler
        return Checkpoint(
            tensors,
            {
                "step": self.step,
                "batch": self.batch,
                "seconds": self.seconds,
                "sums": sums,
                "images": self.data.counts[TRAIN],
                "skipped": skipped,
                "history": [asdict(epoch) for epoch in self.history],
                "optimizer": pack(self.optimizer.state_dict(), "optimizer", tensors),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "processes": self.part.processes,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was taken."""
        state = checkpoint.state
        if state["processes"] != self.part.processes and self.accelerator.is_main_process:
            log.warning(
                "the checkpoint was taken by %d processes and goes on with %d: what is random in a network, and the "
                "statistics of batch norms, differ from here",
                state["processes"],
                self.part.processes,
            )
        if state["images"] != self.data.counts[TRAIN] and self.accelerator.is_main_process:
            log.warning(
                "the checkpoint was taken with %s training images and goes on with %s: their order differs from here",
                state["images"],
                self.data.counts[TRAIN],
            )
        with torch.no_grad():
            for key, tensor in self._learnt().items():
                tensor.copy_(checkpoint.tensors[f"model.{key}"])
        self.optimizer.load_state_dict(unpack(state["optimizer"], checkpoint.tensors))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.kept = state["step"]
        self.step, self.batch, self.seconds = state["step"], state["batch"], state["seconds"]
        if self.accelerator.is_main_process:  # the others' part of the sums is in it
            self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            self.data.skipped = state["skipped"]
        self.found = {key: checkpoint.tensors[f"before.{key}"].numpy() for key in self.found}

    def _learnt(self) -> dict[str, Tensor]:
        """What training changes: parameters that require a gradient, and persistent buffers."""
        frozen = {id(parameter) for parameter in self.core.parameters() if not parameter.requires_grad}
        entries: dict[str, Tensor] = self.core.state_dict(keep_vars=True)
        return {key: tensor for key, tensor in entries.items() if id(tensor) not in frozen}


def _ones(bits: Packed) -> int:
    return int(np.bitwise_count(bits).sum())
