"""What a data set gives to training: batches, and the share of them that falls to each process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.schema import Data
from .sources import Key, Unreadable
from .transforms import Normalise

TRAIN, VALIDATION = "train", "validation"  # what a split is for, whatever it is called

Batch = tuple[Tensor, Tensor]
TrainBatch = tuple[Tensor, Tensor, float]
MicroBatch = tuple[Sequence[Key], float]  # images of one batch and the share of it that they are


class Progress(Protocol):
    """What counts the steps of something long: `with progress(total, what) as step: step()`."""

    def __call__(self, total: int | None, what: str) -> Any: ...


@dataclass(frozen=True)
class ProcessShard:
    """The part of each batch that falls to one of several processes, in so many pieces one after another."""

    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    @property
    def pieces(self) -> int:
        """Into how many pieces a whole batch is cut."""
        return self.processes * self.accumulate

    def cut(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """This part's pieces of a whole batch, a list or an array, and the share of it that each is.

        A batch too small to give every piece an image repeats its first one, with the share 0, because all processes
        must take part in every step.
        """
        size, more = divmod(len(batch), self.pieces)
        for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
            start = i * size + min(i, more)
            piece = batch[start : start + size + (i < more)]
            yield (piece, len(piece) / len(batch)) if len(piece) else (batch[:1], 0.0)


WHOLE = ProcessShard()


class Batches(Protocol):
    """A data set ready for training. Images are float32 [batch, channels, height, width], labels int64 [batch].

    Attributes:
        classes: names of the classes in the order of their labels; none where the data set does not say.
        counts: images of each role, where known.
        skipped: images that this process has left out, which could not be read; whoever counts them sets it back.
        left_out: the first of them and what is wrong with it; empty where there was none.
    """

    classes: list[str]
    counts: Mapping[str, int | None]
    skipped: int
    left_out: str

    def train(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        """`part` of the training images from the batch `first` on, in the epoch's order, augmented.

        The third value is the share of its whole batch that a piece is; less where images of it are left out, and 0,
        with one image of zeros, where all are.
        """

    def validation(self, part: ProcessShard = WHOLE) -> Iterator[Batch]:
        """The validation images that fall to a process of `part`, each of them once."""

    def steps(self, role: str = TRAIN) -> int | None:
        """Batches in an epoch of the training or the validation images, where known."""


class Prepared:
    """What both kinds of data have."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        classes: list[str],
        counts: Mapping[str, int | None],
    ) -> None:
        self.config, self.seed, self.device, self.classes, self.counts = config, seed, device, classes, counts
        self.skipped, self.left_out = 0, ""
        self.normalise = Normalise(config, input_size, device)

    def steps(self, role: str = TRAIN) -> int | None:
        count = self.counts[role]
        return None if count is None else -(-count // self.config.batch_size)

    def _leave_out(self, missing: Sequence[Unreadable]) -> None:
        self.skipped += len(missing)
        self.left_out = self.left_out or "".join(map(str, missing[:1]))


def quiet(total: int | None, what: str) -> Any:
    """A `Progress` that shows nothing."""
    return nullcontext(lambda: None)
