"""Whole steps as CUDA graphs: crop, forward, backward, ranking and the optimiser's step, started together.

A graph repeats what was captured, with the numbers that the host gave then: the learning rate, k, where tensors are. So
each epoch captures its own, after a few steps without a graph. What changes from step to step is in tensors: which
images, and the number of the step. A batch of another size needs no graph.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.checks import without_graph
from ..config.schema import Training
from ..data.batches import TRAIN, Batches, ProcessShard
from ..data.in_memory import InMemory
from ..data.seeding import host_generators
from ..errors import RunError
from ..learners import name_of
from ..learners.base import Learner
from ..masking.walk import masked_weights
from ..torch_compat import SURVIVES_FAILED_CAPTURE
from .optimizers import optimizer_of
from .step import OptimizerStep

log = logging.getLogger("popup_surgery")

DEVICES = {"cuda"}  # the tests add "cpu", with another class in place of `CudaGraph`
WARM = 3  # steps before a capture: kernels are chosen, and the optimiser makes its state


class CudaGraph:
    """Work on the device that is captured as one CUDA graph."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.drop()

    def run(self, work: Callable[[], None]) -> None:
        """Do work without a graph, in the stream that captures."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            work()
        before.wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Capture work, which is not done, in place of what was captured before."""
        before = torch.cuda.current_stream()
        self.drop()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(before)  # which torch leaves undone if the capture fails

    def replay(self) -> None:
        """Do the work that was captured."""
        self.graph.replay()

    def drop(self) -> None:
        """Free the memory of what was captured."""
        self.graph = torch.cuda.CUDAGraph()


class GraphedStep(OptimizerStep):
    """`OptimizerStep` that captures itself, for images on the device. Its pieces are rows of `InMemory.rows`.

    Args:
        kept: returns how many weights each group of masks keeps now.

    The others are those of `OptimizerStep`.
    """

    warm_up = WARM + 1

    def __init__(self, data: InMemory, kept: Callable[[], list[int]], *arguments: Any) -> None:
        super().__init__(*arguments)
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        self.of_rows, self.kept = data.of_rows, kept
        self.rows = torch.zeros(data.config.batch_size, 4, dtype=torch.int64, device=self.accelerator.device)
        self.graph = CudaGraph()
        self.epoch, self.fails = 0, False
        self.captured: Any = None  # the numbers that the host gave the graph
        self.waiting: tuple[Any, int] = None, 0  # others, and how many steps were made with them

    def pieces(self, data: Batches, epoch: int, first: int = 0) -> Iterator[Any]:
        assert isinstance(data, InMemory)
        self.epoch, self.captured = epoch, None
        self.graph.drop()
        return data.rows(epoch, self.part, first)

    def __call__(self, pieces: Iterator[Any], number: int, rate: Callable[[], float]) -> bool:
        rows, _ = next(pieces, (None, 0.0))
        if rows is None:
            return False
        given = rate()
        self._begin(number, given)
        if rows.shape == self.rows.shape and self._is_captured((self.epoch, given, self.kept()), number):
            self.rows.copy_(rows)
            self.graph.replay()
        else:
            self.graph.run(lambda: self._whole(rows, number))
        return True

    def _whole(self, rows: Tensor, number: int) -> None:
        """Make a step of one piece, all of it on the device."""
        self.optimizer.zero_grad()
        self._piece(*self.of_rows(rows), 1.0)
        self._step(number)

    def _is_captured(self, given: Any, number: int) -> bool:
        """Return whether there is a graph of steps with these numbers. It is captured once enough were made."""
        if given == self.captured or self.fails:
            return not self.fails
        before = self.waiting[1] if given == self.waiting[0] else 0
        self.waiting = given, before + 1
        if before < WARM:
            return False
        with host_generators() as drew:
            try:
                self.graph.capture(lambda: self._whole(self.rows, number))
            except RuntimeError as error:
                self._give_up(str(error.__context__ or error).partition("\n")[0], SURVIVES_FAILED_CAPTURE)
            else:
                self.captured = given
                if drew():
                    self._give_up("it draws random numbers on the host, which a graph would repeat")
        return not self.fails

    def _give_up(self, why: str, survives: bool = True) -> None:
        """Make all further steps without a graph, if the recipe allows it and the process can continue."""
        self.fails, self.captured = True, None
        if self.training.graph is True or not survives:
            expected = "auto or false" if survives else "false"
            raise RunError(
                f"training.graph is {str(self.training.graph).lower()}; expected {expected} for this network: {why}"
            )
        self.graph.drop()
        log.warning("the run trains without a CUDA graph, which cannot capture the network's steps: %s", why)


def step_of(
    model: nn.Module,
    data: Batches,
    training: Training,
    accelerator: Accelerator,
    part: ProcessShard,
    penalty: Callable[[], Tensor | None],
    kept: Callable[[], list[int]],
) -> OptimizerStep:
    """Return the step of a run, as a graph if the recipe wants one and the run can have it.

    Raises:
        RunError: the recipe wants nothing else, and the run cannot have it.
    """
    arguments = model, training, accelerator, part, len(data.classes), penalty
    if training.graph:
        why = _why_not(model, data, training, accelerator)
        if why is None:
            return GraphedStep(cast(InMemory, data), kept, *arguments)
        if training.graph is True:
            raise RunError(f"training.graph is true; expected auto or false, because {why}")
        log.info("the steps are no CUDA graph, because %s", why)
    return OptimizerStep(*arguments)


def _why_not(model: nn.Module, data: Batches, training: Training, accelerator: Accelerator) -> str | None:
    """Return why a graph cannot be a run's steps; None if it can."""
    if accelerator.device.type not in DEVICES:
        return f"the run is on the device {accelerator.device}"
    if accelerator.num_processes > 1:
        return f"the run has {accelerator.num_processes} processes"
    if not isinstance(data, InMemory):
        return "the images are not all in the device's memory"
    if (whole := (data.counts[TRAIN] or 0) // data.config.batch_size) <= WARM:
        return f"an epoch has {whole} whole batches, and the first {WARM} run without a graph"
    groups = (optimizer := optimizer_of([], training)).param_groups
    if type(optimizer) is not torch.optim.SGD and not all("capturable" in group for group in groups):
        return f"training.optimizer {training.optimizer} works on the host too"
    for _, _, _, slot in masked_weights(model):
        learner = slot.ranking.learner
        if learner.samples or type(learner).around_step is not Learner.around_step:
            return f"the learner {name_of(learner)} works on the host in each step"
    return next(without_graph(training), None)
