"""An estimate of how long a sweep takes, from a few steps of each kind of run in it."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from ..config import Recipe
from ..config.keys import comparable, select
from ..data.batches import VALIDATION, Progress, quiet
from ..data.seeding import ambient_seed
from ..errors import RunError, Stopped
from ..experiment.setup import prepare
from ..masking.bake import bake
from ..plugins import loaded_plugins, restore_plugins
from ..training.distributed import numerics, start
from ..training.evaluation import accuracy_of
from ..training.trainer import Trainer
from .grid import Run

STEPS = 5  # measured steps, after those to warm up


@dataclass(frozen=True)
class RunKind:
    """Runs whose steps take the same time.

    Attributes:
        start: seconds until the first step.
        step: seconds per step.
        epoch: seconds per epoch.
        room: how many such runs the memory of a GPU has room for; None on the CPU.
    """

    runs: tuple[Run, ...]
    start: float
    step: float
    epoch: float
    room: int | None

    def seconds(self, run: Run) -> float:
        """Return the seconds that a run takes when it runs alone."""
        return self.start + run.recipe.epochs * self.epoch


def measure(runs: Sequence[Run], threads: int | None = None, progress: Progress = quiet) -> list[RunKind]:
    """Return the kinds of `runs`, each measured in its own process.

    Args:
        threads: threads of each run, in place of its `training.threads`.

    Raises:
        RunError: the measured run of a kind cannot start, or the size of its data set is unknown. The message names the
            run.
    """
    groups: dict[str, list[Run]] = {}
    for run in [run.with_threads(threads) for run in runs]:
        settings = select(run.recipe, lambda setting: setting.key.affects_speed)
        groups.setdefault(comparable(settings), []).append(run)
    kinds = []
    with progress(len(groups), "measuring") as advance:
        for alike in groups.values():
            began = time.perf_counter()
            try:
                with ProcessPoolExecutor(1, get_context("spawn"), restore_plugins, (loaded_plugins(),)) as pool:
                    busy, step, epoch, room = pool.submit(_measure, alike[0].recipe.dump()).result()
            except Exception as error:  # a network and a plugin may raise anything
                raise RunError(f"{alike[0]} cannot be measured: {str(error) or type(error).__name__}") from error
            kinds.append(RunKind(tuple(alike), time.perf_counter() - began - busy, step, epoch, room))
            advance()
    return kinds


@contextmanager
def prepared(recipe: Recipe) -> Iterator[Trainer]:
    """Context manager: yield the trainer of a run, before its first step and under the run's seed."""
    accelerator = start(recipe.training)
    with numerics(recipe.training), ambient_seed([recipe.training.seed]):
        yield prepare(recipe, accelerator, quiet)[0]


def _measure(values: dict[str, Any]) -> tuple[float, float, float, int | None]:
    """Measure a run. Returns the seconds of the measurement, of a step, and of an epoch; and the `RunKind.room`."""
    with prepared(Recipe.parse(values)) as trainer:
        accelerator, times = trainer.accelerator, [time.perf_counter()]

        def enough() -> bool:
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return len(times) > STEPS + trainer.update.warm_up

        with suppress(Stopped):
            trainer.run(lambda epoch: None, stop=enough)
        steps = [after - before for before, after in pairwise(times)]
        began = time.perf_counter()
        batches = 3
        accuracy_of(bake(trainer.core), islice(trainer.data.validation(), batches), accelerator.autocast)
        ended = time.perf_counter()
    count, rest = trainer.data.steps(), trainer.data.steps(VALIDATION)
    if count is None or rest is None:
        raise RunError("its data set does not say how many images it has")
    step = median(steps[trainer.update.warm_up :] or steps)
    room = None
    if accelerator.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()  # of all processes: the context is counted too
        room = total // (total - free)
    return ended - times[0], step, count * step + rest * (ended - began) / min(batches, rest), room
