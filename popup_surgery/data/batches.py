"""What a data set provides for training: batches, and the part of each that a process gets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.schema import Data
from ..errors import DataError, listed
from .sources import Key, Unreadable
from .transforms import Normalise

TRAIN, VALIDATION = "train", "validation"  # the role of a split, whatever its name

Batch = tuple[Tensor, Tensor]
TrainBatch = tuple[Tensor, Tensor, float]
MicroBatch = tuple[Sequence[Key], float]  # images of one batch, and their share of it


class Progress(Protocol):
    """A callable that shows the progress of a long task: `with progress(total, what) as step: step()`."""

    def __call__(self, total: int | None, what: str) -> Any: ...


@dataclass(frozen=True)
class ProcessShard:
    """The part of each batch that one of several processes gets, cut into `accumulate` consecutive pieces."""

    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    @property
    def pieces(self) -> int:
        """Number of pieces into which a whole batch is cut."""
        return self.processes * self.accumulate

    def cut(self, batch: Any, least: int = 1) -> Iterator[tuple[Any, float]]:
        """Yield this part's pieces of a whole batch, a list or an array, each with its share of the batch.

        If a batch is too small to give every piece `least` images, the remaining pieces repeat its first images with
        the share 0, because all processes must take part in every step.

        Raises:
            DataError: the batch has fewer images than `least`.
        """
        if len(batch) < least:
            raise DataError(f"a batch has {len(batch)} image; the network trains on {least} at a time or more")
        size, more = divmod(len(batch), filled := min(self.pieces, len(batch) // least))
        for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
            start = i * size + min(i, more)
            piece = batch[start : start + size + (i < more)]
            yield (piece, len(piece) / len(batch)) if i < filled else (batch[:least], 0.0)


WHOLE = ProcessShard()


class Batches(Protocol):
    """A data set ready for training. Images are float32 [batch, channels, height, width], labels int64 [batch].

    Attributes:
        classes: names of the classes in the order of their labels; empty if the data set does not say.
        counts: number of images of each role; None if unknown.
        least: number of images that the network needs at a time. Where the last batch of an epoch would have fewer,
            they join the one before.
        skipped: number of images that this process could not read and left out. The caller that counts them resets it.
        left_out: the first of these images and what is wrong with it; empty if there is none.
    """

    classes: list[str]
    counts: Mapping[str, int | None]
    least: int
    skipped: int
    left_out: str

    def fit_to(self, outputs: int) -> None:
        """Make a label that is none of the network's outputs an error. `DataError` if there is one in memory."""

    def name_by(self, classes: list[str]) -> None:
        """Make labels places in `classes`, which a network was trained on, by the names of the data set's own classes.

        If the data set has no names, its labels stay.

        Raises:
            DataError: the data set has a class that is not in `classes`.
        """

    def train(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        """Yield `part` of the training images, augmented, in the epoch's order, from the batch `first` on.

        The third value is the share of its whole batch that a piece makes up. It is less if images of the piece are
        left out. If all are, it is 0, and the piece is one image of zeros.
        """

    def validation(self, part: ProcessShard = WHOLE) -> Iterator[Batch]:
        """Yield the validation images that the process of `part` gets, each once."""

    def steps(self, role: str = TRAIN) -> int | None:
        """Return the number of batches in an epoch of the training or the validation images; None if unknown."""


class Prepared:
    """Base class of `InMemory` and `Streamed`."""

    least = 1

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
        self.outputs: int | None = None  # of the network, once they are known
        self.places: Tensor | None = None  # the label of each of the data set's own labels, if it is another
        self.normalise = Normalise(config, input_size, device)

    def fit_to(self, outputs: int) -> None:
        self.outputs = outputs

    def name_by(self, classes: list[str]) -> None:
        if not self.classes or self.classes == classes:
            return
        if unknown := [name for name in self.classes if name not in classes]:
            rest = [name for name in classes if name not in self.classes] or classes
            raise DataError(
                f"data set {self.config.name} has the classes {listed(unknown)}, which the network was not trained on; "
                f"choose a data set with the file's classes, such as {listed(rest)}"
            )
        places = {name: place for place, name in enumerate(classes)}
        self.places = torch.tensor([places[name] for name in self.classes], device=self.device)
        self.classes = classes

    def _placed(self, labels: Tensor) -> Tensor:
        """Return the data set's own labels as places in `classes`."""
        return labels if self.places is None else self.places[labels]

    def steps(self, role: str = TRAIN) -> int | None:
        count, size = self.counts[role], self.config.batch_size
        if count is None:
            return None
        joins = role == TRAIN and 0 < count % size < self.least and count > size
        return -(-count // size) - joins

    def _leave_out(self, missing: Sequence[Unreadable]) -> None:
        self.skipped += len(missing)
        self.left_out = self.left_out or "".join(map(str, missing[:1]))


def quiet(total: int | None, what: str) -> Any:
    """A `Progress` that shows nothing."""
    return nullcontext(lambda: None)
