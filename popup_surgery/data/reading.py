"""Read images in worker processes, each image with its own seed."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config.schema import Data
from ..errors import DataError
from .batches import MicroBatch
from .pixels import eight_bits, mode_of
from .seeding import ambient_seed, seed_generators
from .sources import Source, Unreadable, reason
from .workers import outlive_signals, worker_deaths

log = logging.getLogger("popup_surgery")
_T = TypeVar("_T")


class MicroBatches(Dataset):
    """Parts of batches, read and transformed. Each image has its own seed, whichever process reads it.

    A part with fewer images than `least` that can be read has the first of them more than once. Labels are from 0 to
    `limit`, exclusive; None for no limit.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        input_size: tuple[int, int, int],
        entropy: list[int],
        limit: int | None = None,
        least: int = 1,
    ) -> None:
        self.source, self.transform, self.input_size, self.entropy = source, transform, input_size, entropy
        self.limit, self.least, self.mode = limit, least, mode_of(input_size[0])

    def __getitem__(self, piece: MicroBatch) -> tuple[Tensor, Tensor, float, list[Unreadable]]:
        keys, weight = piece
        with ambient_seed(self.entropy, gpu=False):
            found = [self._read(number, key) for number, key in keys]
        missing = [image for image in found if weight and isinstance(image, Unreadable)]
        images = [image for image in found if not isinstance(image, Unreadable)]
        if not images:
            return torch.zeros(self.least, *self.input_size), torch.zeros(self.least, dtype=torch.int64), 0.0, missing
        padded = images + images[:1] * (self.least - len(images))
        return *default_collate(padded), weight * len(images) / len(found), missing

    def _read(self, number: int, key: Any) -> tuple[Tensor, int] | Unreadable:
        seed_generators([*self.entropy, number], gpu=False)
        try:
            image, label = self.source.read(key)
            return self.transform(eight_bits(image, self.mode)), _number(label, self.limit)
        except Exception as error:  # a damaged file can make a decoder raise anything
            return Unreadable(self.source.name(key), reason(error))


def read_pieces(
    pieces: MicroBatches, plan: Iterable[MicroBatch], config: Data, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor, float, list[Unreadable]]]:
    """Yield the pieces of a plan in its order, read by worker processes.

    Raises:
        DataError: an image cannot be read and `config.on_error` is `stop`, or a worker process died.
    """
    loader = DataLoader(
        pieces,
        sampler=plan,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=config.workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=outlive_signals,
    )
    with worker_deaths(ConnectionError, EOFError, FileNotFoundError):
        for images, labels, weight, missing in loader:
            if missing and config.on_error == "stop":
                raise DataError(f"{missing[0]}; set data.on_error to skip to leave such images out")
            yield images, labels, weight, missing


def _number(label: Any, limit: int | None) -> int:
    """Return a label as an int. `DataError` if it is none from 0 to `limit`, exclusive."""
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or (limit is not None and number >= limit) or (isinstance(label, float) and number != label):
        expected = "a whole number from 0" + (f" to {limit - 1}" if limit is not None else "")
        raise DataError(f"its label is {label!r}; expected {expected}")
    return number


def warn_of_skipped(count: int, first: str) -> None:
    """Log how many images were left out, and why the first of them was."""
    log.warning("left out %d image%s that could not be read; the first: %s", count, "s" * (count != 1), first)


def _as_it_is(piece: _T) -> _T:
    return piece


def joined(batches: Iterable[list[_T]], least: int) -> Iterator[list[_T]]:
    """Yield batches; one of fewer than `least` items joins the one before."""
    before: list[_T] = []
    for batch in batches:
        if before and len(batch) >= least:
            yield before
            before = batch
        else:
            before = before + batch
    if before:
        yield before


def chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield `items` in lists of `size`; the last list has what is left."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk
