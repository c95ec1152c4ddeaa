"""Decoded images held in memory, cropped and flipped a batch at a time."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..config.schema import Data
from ..errors import DataError
from .batches import TRAIN, VALIDATION, WHOLE, Batch, Prepared, ProcessShard, Progress, TrainBatch
from .reading import MicroBatches, chunks, read_pieces
from .sources import Source, Unreadable
from .transforms import ToBytes


class InMemory(Prepared):
    """Decoded images held as uint8 on the device, cropped and flipped there a batch at a time."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        splits: dict[str, Batch],
        classes: list[str],
        missing: Mapping[str, list[Unreadable]] = MappingProxyType({}),
    ) -> None:
        for images, _ in splits.values():
            if tuple(images.shape[1:]) != input_size:
                found, wanted = " × ".join(map(str, images.shape[1:])), " × ".join(map(str, input_size))
                raise DataError(f"the images of data set {config.name} are {found}; the network expects {wanted}")
        counts = {role: len(labels) for role, (_, labels) in splits.items()}
        super().__init__(config, input_size, seed, device, classes, counts)
        self.splits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in splits.items()}
        self.missing = missing  # every process has read all images, so only the first one counts these

    def fit_to(self, outputs: int) -> None:
        super().fit_to(outputs)
        most = max((int(labels.max()) for _, labels in self.splits.values() if len(labels)), default=0)
        if not self.classes and most >= outputs:
            raise DataError(
                f"data set {self.config.name} has the label {most}; the network has {outputs} outputs, from 0"
            )

    def train(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        """As `Batches.train`; crops and flips whole batches on the device."""
        for rows, weight in self.rows(epoch, part, first):
            yield *self.of_rows(rows), weight

    def rows(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[tuple[Tensor, float]]:
        """Yield what `train` makes images of, and the third value that it yields.

        The rows are int64 [batch, 4], on the device: the image, the first row and column of its crop, 0 … 2·pad, and 1
        if it is mirrored. Those of an epoch are copied there together.
        """
        generator = np.random.default_rng([self.seed, epoch])
        count = len(self.splits[TRAIN][1])
        order = generator.permutation(count)
        shifts = generator.integers(0, 2 * self.config.pad + 1, (count, 2))
        flips = generator.random(count) < self.config.hflip
        all_rows = np.column_stack([order, shifts[order], flips[order]])
        table = torch.from_numpy(all_rows).to(self.splits[TRAIN][0].device)
        if first == 0 and part.rank == 0:
            self._leave_out(self.missing.get(TRAIN, ()))
        size = self.config.batch_size
        for start in range(first * size, count, size):
            if start and count - start < self.least:
                break  # these are in the batch before
            end = start + size if count - start - size >= self.least else count
            yield from part.cut(table[start:end], self.least)

    def of_rows(self, rows: Tensor) -> Batch:
        """Return the images and labels of rows that `rows` yielded. The host does not wait for the device."""
        images, labels = self.splits[TRAIN]
        index = rows[:, 0]
        cropped = _crop(images[index], self.config.pad, rows[:, 1:3], rows[:, 3].bool())
        return self.normalise(cropped), self._placed(labels[index])

    def validation(self, part: ProcessShard = WHOLE) -> Iterator[Batch]:
        if part.rank == 0:
            self._leave_out(self.missing.get(VALIDATION, ()))
        images, labels = (held[part.rank :: part.processes] for held in self.splits[VALIDATION])
        size = self.config.batch_size
        for pixels, label in zip(images.split(size), labels.split(size), strict=True):
            yield self.normalise(pixels), self._placed(label)


def _crop(images: Tensor, pad: int, shift: Tensor, flip: Tensor) -> Tensor:
    """Crop zero-padded images at `shift`, int [batch, 2] in 0 … 2·pad, and mirror those with `flip`, bool [batch]."""
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (pad,) * 4)
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = shift[:, 1:] + torch.where(flip[:, None], columns.flip(1), columns)
    first = torch.arange(batch, device=images.device)[:, None, None, None]
    second = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[first, second, rows[:, None, :, None], columns[:, None, None, :]]


def decode(
    source: Source, config: Data, input_size: tuple[int, int, int], progress: Progress, role: str
) -> tuple[Batch, list[Unreadable]]:
    """Decode a split's images.

    Returns:
        The images, uint8 [images, channels, height, width], and labels, int64 [images]; and those that could not be
        read.

    Raises:
        DataError: no image can be read.
    """
    count = source.count or 0
    images = torch.empty((count, *input_size), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    start, missing = 0, []
    pieces = MicroBatches(source, ToBytes(config, input_size), input_size, [])
    plan = ((chunk, 1.0) for chunk in chunks(source.keys(None), 500))
    with progress(-(-count // 500), f"reading {role} images") as step:
        for part, label, weight, unreadable in read_pieces(pieces, plan, config):
            missing += unreadable
            end = start + len(label) if weight else start
            images[start:end], labels[start:end] = part[: end - start], label[: end - start]
            start = end
            step()
    if not start:
        raise DataError(
            "; ".join([f"none of the {role} images of data set {config.name} can be read", *map(str, missing[:1])])
        )
    return (images[:start], labels[:start]), missing
