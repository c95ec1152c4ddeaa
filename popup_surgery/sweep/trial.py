"""A trial before a sweep: how many runs at a time on each GPU make the most steps. See `Local.pack`.

The runs of the trial are processes of this module. One makes steps of a run, in the run's environment, and writes no
file. Its order is a line of JSON on stdin. It ends when stdin does, and so also when the sweep's process is killed.
"""

import json
import logging
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from ..config import Recipe
from ..errors import RunError, Stopped
from ..plugins import load_plugins, loaded_plugins
from .estimate import STEPS, measure, prepared
from .gpus import environment, gpus
from .grid import Run

log = logging.getLogger("popup_surgery")

COUNTS = (1, 2, 4, 8, 16)  # of runs at a time on each GPU
SECONDS = 5.0  # of a measurement, or as long as each run needs for STEPS steps
LIMIT = 120.0  # seconds: numbers that take longer to measure are left out
PATIENCE = 10.0  # seconds for a process to end
_NOW = struct.Struct("dq")  # when a step ended, and the number of steps until then


def best_pack(runs: Sequence[Run], threads: int | None, stop: Callable[[], bool]) -> int:
    """Return how many of the runs to have on each GPU at a time, and log what was measured.

    One run of each kind is measured alone, for the memory that it needs, and then the most frequent kind in numbers.

    Args:
        threads: threads of each run, in place of its `training.threads`.
        stop: once it returns true, the trial ends.
    """
    counts = [count for count in COUNTS if count * len(gpus()) <= len(runs)]
    if len(counts) < 2:
        return 1
    try:
        kinds = measure(runs, threads)
    except RunError as error:
        log.warning("--pack auto takes 1 at a time on each GPU: %s", error)
        return 1
    room = min((kind.room for kind in kinds if kind.room is not None), default=counts[-1])
    run = max(kinds, key=lambda kind: len(kind.runs)).runs[0]
    with _Trial(run, stop) as trial:
        speeds = speeds_of((count for count in counts if count <= room), trial.speed)
    chosen = choice(speeds)
    made = ", ".join(f"{speed:,.1f} with {count}" for count, speed in speeds.items()) or "none could be measured"
    log.warning(
        "--pack auto takes %d at a time on each GPU; steps a second in total, of runs such as %s: %s", chosen, run, made
    )
    return chosen


def speeds_of(counts: Iterable[int], speed: Callable[[int], float | None]) -> dict[int, float]:
    """Return the speed of each number of runs, until one cannot be measured or is less than 10 % above the one before.

    Args:
        counts: the numbers, in ascending order.
        speed: returns the steps per second of that many runs together, or None.
    """
    found: dict[int, float] = {}
    before = 0.0
    for count in counts:
        if (now := speed(count)) is None:
            break
        found[count] = now
        if now < 1.1 * before:
            break
        before = now
    return found


def choice(speeds: Mapping[int, float]) -> int:
    """Return the smallest number of runs whose speed is within 5 % of the best; 1 if there is none."""
    return min((count for count, speed in speeds.items() if speed >= 0.95 * max(speeds.values())), default=1)


class _Stepping:
    """A process that makes steps of a run, until `end`."""

    def __init__(self, run: Run, place: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.write(_NOW.pack(0.0, 0))
        self._file.flush()
        number = self._file.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(number)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=environment(run, place), pass_fds=[number], text=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed, as its status will tell
            print(json.dumps([run.recipe.dump(), [*loaded_plugins()]]), file=self.process.stdin, flush=True)

    def now(self) -> tuple[float, int]:
        """Return when a step ended, the latest that is known, and the number of steps until then."""
        when, steps = _NOW.unpack(os.pread(self._file.fileno(), _NOW.size, 0))
        return when, steps

    def ask_to_end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self) -> None:
        """Wait for the end of a process that was asked to. A kill is the last resort: it disturbs others under MPS."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        self._file.close()


class _Trial:
    """Processes that make steps of a run on each GPU; more of them as they are asked for. A context manager."""

    def __init__(self, run: Run, stop: Callable[[], bool]) -> None:
        self.run, self.stop, self.all = run, stop, list[_Stepping]()

    def __enter__(self) -> "_Trial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each in self.all:
            each.ask_to_end()
        for each in self.all:
            each.end()

    def speed(self, count: int) -> float | None:
        """Return the steps per second of `count` runs on each GPU together; None if they do not make enough steps."""
        while len(self.all) < count * len(gpus()):
            self.all.append(_Stepping(self.run, len(self.all)))
        end = time.monotonic() + LIMIT
        before = [(0.0, 0)] * len(self.all)
        for seconds in (0.0, SECONDS):  # at first until all of them make steps, and are warm
            least = time.monotonic() + seconds
            while (now := time.monotonic()) < least or not self._ahead(before):
                if now > end or self.stop() or any(each.process.poll() is not None for each in self.all):
                    return None
                time.sleep(0.05)
            earlier, before = before, [each.now() for each in self.all]
        return sum((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(earlier, before, strict=True))

    def _ahead(self, before: Sequence[tuple[float, int]]) -> bool:
        """Return whether each process has made `STEPS` steps more than before."""
        return all(each.now()[1] >= steps + STEPS for each, (_, steps) in zip(self.all, before, strict=True))


def step_on(number: int) -> None:
    """Make steps of the run that stdin describes until stdin ends, and note each in the open file `number`."""
    values, plugins = json.loads(sys.stdin.readline())
    load_plugins(plugins)
    with prepared(Recipe.parse(values)) as trainer, suppress(Stopped):

        def ended() -> bool:
            if trainer.step % STEPS == 0:
                trainer.update.not_finite.item()  # waits for the GPU
                os.pwrite(number, _NOW.pack(time.monotonic(), trainer.step), 0)
            return bool(select.select([sys.stdin], [], [], 0)[0])

        trainer.epochs = sys.maxsize
        trainer.run(lambda epoch: None, stop=ended)


if __name__ == "__main__":
    step_on(int(sys.argv[1]))
