"""The training loop, on Accelerate: one process or many, resumable at any step."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.schedule import rates
from ..config.schema import Training
from ..data.batches import Batches, ProcessShard, Progress, TrainBatch
from ..data.seeding import seed_generators
from ..data.workers import worker_deaths
from ..errors import RunError, Stopped
from ..learners import sampled
from ..masking.bake import bake, masks
from ..masking.density import density_penalty
from ..masking.k_schedule import KSchedule
from ..masking.rewrites import Rewrite
from . import trainer_state
from .agreement import Agreement
from .checkpoint import Checkpoint, file_of
from .evaluation import right_answers
from .graph import step_of
from .hooks import LearnerHooks
from .mask_history import MaskHistory
from .metrics import Epoch, LayerMask, Steps
from .sharding import check_learners, uses_shards
from .weight_masks import WeightMasks

AfterEpoch = Callable[[Epoch], None]
AfterSteps = Callable[[Steps], None]
Save = Callable[[int, Checkpoint], None]
Stop = Callable[[], bool]


class Trainer:
    """The training loop. It trains all parameters that require a gradient.

    These are the scores of a converted network, or the weights of a plain one. Everything random in a step is a
    function of (seed, epoch, step, process), so no generator's state has to be saved.

    Args:
        weight_masks: bool masks of a plain network's parameters, by name. Weights outside them stay 0.
        k_schedule: the share of weights that a converted network's masks keep, by epoch.
        rewrites: when weights of a converted network that do not take part get other values.

    Attributes:
        history: the epochs that have ended.
        batch: index of the next batch in the current epoch.
        step: number of steps made in the whole run.
        checkpoint_step: value of `step` at the last checkpoint; 0 if there is none.
        seconds: time spent on the current epoch, in seconds.
        logged: the sums of the current epoch, over all processes, at the last call of `after_steps`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        training: Training,
        accelerator: Accelerator,
        progress: Progress,
        weight_masks: Mapping[str, Tensor] = MappingProxyType({}),
        k_schedule: KSchedule | None = None,
        rewrites: Sequence[Rewrite] = (),
    ) -> None:
        self.core, self.data, self.training, self.accelerator = model, data, training, accelerator
        self.progress = progress
        self.part = ProcessShard(accelerator.process_index, accelerator.num_processes, training.accumulate)
        self.update = step_of(
            model, data, training, accelerator, self.part, self._penalty, lambda: self.hooks.in_force()
        )
        self.model, self.optimizer = self.update.model, self.update.optimizer
        self.weight_masks = WeightMasks(model, weight_masks, accelerator.device)
        self.weight_masks.apply_during(self.optimizer.optimizer)
        self.agreement = Agreement(accelerator)
        self.rate = rates(training)
        self.epochs = training.epochs
        self.history: list[Epoch] = []
        self.batch = self.step = self.checkpoint_step = 0
        self.seconds = 0.0
        self.logged = [0.0, 0.0, 0.0]
        self.hooks = LearnerHooks(model, training.seed, k_schedule, rewrites)
        if uses_shards(accelerator):
            more = {"a network without masks": not self.hooks.weights}
            more |= {f"surgery.{rewrite.key}": True for rewrite in rewrites}
            check_learners((learner for learner, _ in self.hooks.weights.values()), more)
        of_k = None if k_schedule is None else self.masks()  # to compare with: a ramp may begin with all weights
        self.hooks.at(0.0, 0)
        self.mask_history = MaskHistory(self.masks(), of_k)

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return len(self.history)

    @worker_deaths()
    def run(
        self,
        after_epoch: AfterEpoch,
        save: Save = lambda step, checkpoint: None,
        stop: Stop = lambda: False,
        after_steps: AfterSteps = lambda steps: None,
    ) -> list[Epoch]:
        """Train to the end, and return the epochs.

        The accuracy of the run is that of the last epoch: nothing is selected on the validation images.

        Args:
            after_epoch: called with each epoch's numbers.
            save: called with the step and each checkpoint, in the first process only.
            stop: called after each step. Once it returns true in any process, a checkpoint is saved and `Stopped` is
                raised.
            after_steps: called with the numbers of every `training.log_every` steps.

        Raises:
            RunError: the loss or an updated parameter is not finite; a process's masks differ from the first's; no
                image can be read.
            DataError: an image cannot be read; a worker process of the loader died.
            Stopped: `stop` returned true.
        """
        while self.epoch < self.epochs:
            self.hooks.at(self._progress(), self.epoch)
            if not self.batch:
                self._begin_epoch()
            self._train_epoch(save, stop, after_steps)
            self._end_epoch(after_epoch)
            self._save(save)
            if self.epoch < self.epochs and self.agreement.highest(int(stop())):
                raise Stopped(f"stopped after step {self.step:,}, in epoch {self.epoch}")
        return self.history

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of a converted network, or the `weight_masks` of a plain one."""
        return masks(self.core) or dict(self.weight_masks.tensors)

    def layers(self) -> list[LayerMask]:
        """Return the numbers of each weight's mask at the end of the last epoch."""
        return self.mask_history.layers()

    def learned(self) -> dict[str, Tensor]:
        """Return what training changes: parameters that require a gradient, rewritten weights, persistent buffers."""
        entries: dict[str, Tensor] = self.core.state_dict(keep_vars=True)
        frozen = {id(parameter) for parameter in self.core.parameters() if not parameter.requires_grad}
        frozen -= self.hooks.rewritten()
        return {key: tensor for key, tensor in entries.items() if id(tensor) not in frozen}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the state to that of `checkpoint`; `run` resumes there."""
        trainer_state.restore(self, checkpoint)

    def _checkpoint(self, sums: list[float], skipped: int) -> Checkpoint:
        return trainer_state.checkpoint_of(self, sums, skipped)

    def _begin_epoch(self) -> None:
        """Prepare an epoch; called before its first step."""

    def _scheduled(self) -> int:
        """Return the epoch of the schedule that sets the current rate."""
        return self.epoch

    def _progress(self) -> float:
        """Return the share of the run that is done, 0 … 1. It counts whole epochs if the steps of one are unknown."""
        steps = self.data.steps()
        return (self.epoch + (min(self.batch / steps, 1.0) if steps else 0.0)) / self.epochs

    def _train_epoch(self, save: Save, stop: Stop, after_steps: AfterSteps = lambda steps: None) -> None:
        """Make the remaining steps of the epoch, and save a checkpoint when one is due or the run has to stop."""
        self.model.train()
        began = saved = time.monotonic()
        spent, longest = self.seconds, 60 * self.training.checkpoint_minutes
        pieces = self.update.pieces(self.data, self.epoch, self.batch)
        with self.progress(self.data.steps(), f"epoch {self.epoch + 1}/{self.epochs}") as advance:
            for _ in range(self.batch):
                advance()
            while self._one_step(pieces):
                advance()
                self.seconds = spent + time.monotonic() - began
                self._log(after_steps)
                late = longest and time.monotonic() - saved > longest
                wish = self.agreement.highest(2 if stop() else 1 if late else 0)
                if wish:
                    self._save(save)
                    saved = time.monotonic()
                if wish == 2:
                    raise Stopped(f"stopped after step {self.step:,}, in epoch {self.epoch + 1}")
        self.update.not_finite.item()  # a GPU's time counts until it has made the steps
        self.seconds = spent + time.monotonic() - began

    def _one_step(self, pieces: Iterator[TrainBatch]) -> bool:
        """Make one step of the optimiser. Returns False if the epoch has no more batches."""
        # with a learner that samples, all pieces of a step see the same network, in all processes
        with sampled(self.training.seed, self.epoch, self.batch):
            seed_generators([self.training.seed, self.epoch, self.batch, self.part.rank])
            with self.hooks.step():
                made = self.update(pieces, self.step, lambda: self._rate(self.batch))
            if made:
                self.batch += 1
                self.step += 1
                self.hooks.step_done(self._progress(), self.epoch, self.step)
        return made

    def _log(self, after_steps: AfterSteps) -> None:
        """Report the steps since the last report, if as many as the recipe says were made."""
        every = self.training.log_every
        if every is None or self.step % every:
            return
        before, self.logged = self.logged, self.agreement.total(self.update.sums).tolist()
        loss, images = self.logged[0] - before[0], self.logged[2] - before[2]
        rate = self.optimizer.param_groups[0]["lr"]
        after_steps(Steps(self.epoch + 1, self.step, rate, loss / images if images else math.nan))

    def _penalty(self) -> Tensor | None:
        """Return what the loss of a batch gains beside that of the images; None for nothing."""
        of_learners, section = self.hooks.penalty(), self.training.density_penalty
        if section is None:
            return of_learners
        of_density = density_penalty(self.core, section.weight, section.target)
        return of_density if of_learners is None else of_density + of_learners

    def _rate(self, batch: int) -> float:
        """Return the learning rate of a batch of this epoch."""
        epoch = self._scheduled()
        if self.training.schedule_per == "epoch":
            return self.rate(float(epoch), 1.0)
        steps = self.data.steps()
        if not steps:
            raise RunError(
                "training.schedule_per is step; expected epoch, because the data set does not say how many steps an "
                "epoch has"
            )
        return self.rate(epoch + batch / steps, 1 / steps)

    def _end_epoch(self, after_epoch: AfterEpoch) -> None:
        """Validate, and add the epoch's numbers to the history."""
        self._check_finite()
        self.hooks.epoch_done(self.epoch + 1, self.epochs)
        loss, right, seen = self.agreement.total(self.update.sums).tolist()
        correct, images = self._validate()
        skipped = self.agreement.skipped(self.data)
        if not seen or not images:
            raise RunError(f"none of the data set's {'validation' if seen else 'training'} images can be read")
        epoch = Epoch(
            self.epoch + 1, self.optimizer.param_groups[0]["lr"], loss / seen, right / seen, correct / images,
            self.mask_history.add(self.masks()), self.seconds, seen / self.seconds, skipped,
            self.hooks.k, self.mask_history.density(),
        )  # fmt: skip
        self.history.append(epoch)
        self.batch, self.seconds, self.data.skipped = 0, 0.0, 0
        self.update.sums.zero_()
        self.logged = [0.0, 0.0, 0.0]
        after_epoch(epoch)

    def _validate(self) -> tuple[int, int]:
        """Return the correct answers on the validation images and the number of images, over all processes."""
        self.agreement.share_statistics(self.core)
        with sampled(self.training.seed, self.epoch):
            baked = bake(self.core)
        counts = right_answers(baked, self.data.validation(self.part), self.accelerator.autocast)
        correct, images = self.agreement.total(torch.tensor(counts, device=self.accelerator.device)).tolist()
        return correct, images

    def _save(self, save: Save) -> None:
        """Check the state in all processes, and save a checkpoint in the first."""
        self._check_finite()
        if self.part.processes > 1:
            self.agreement.check_masks(self.masks(), self.step)
        self.agreement.share_statistics(self.core)
        sums, skipped = self.agreement.total(self.update.sums), self.agreement.skipped(self.data)
        main = self.accelerator.is_main_process
        if main or uses_shards(self.accelerator):  # where all processes gather what it holds
            checkpoint = self._checkpoint(sums.tolist(), skipped)
            if main:
                save(self.step, checkpoint)
        self.checkpoint_step = self.step
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        """Raise `RunError` if the loss of a step or an updated parameter is not finite."""
        bad = self.agreement.not_finite(self.core, int(self.update.not_finite), self.step)
        if bad is not None:
            step, what = bad
            last = f"the last checkpoint before it is {file_of(self.checkpoint_step)}; try a lower training.lr"
            raise RunError(
                f"{what} of step {step + 1:,}, in epoch {self.epoch + 1}, is not finite at the rate "
                f"{self._rate(self.batch - self.step + step):g}; "
                + (last if self.checkpoint_step else "there is no checkpoint; try a lower training.lr")
            )
