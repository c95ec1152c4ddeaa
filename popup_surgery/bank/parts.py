"""What one tensor of the network is under one task, as it is kept in memory, and how it is written into the network.

Values are moved as words, unsigned integers of the dtype's size, so that every dtype is exact to the bit. A masked
weight is the bitwise AND of the base and its mask, piece by piece in the processor's cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..weights.fill import rounded
from ..weights.streams import BITS, words

Words = NDArray[np.unsignedinteger[Any]]
Packed = NDArray[np.uint8]

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 18  # weights written at a time, which fit in cache
_PARALLEL = 1 << 21  # weights from which on threads pay
_ON_DEVICE = 1 << 24  # weights unpacked at a time on a device that is not the CPU


def words_of(tensor: Tensor) -> Words:
    """Return the elements of a contiguous tensor on the CPU as words, in row-major order, in the same memory."""
    size = tensor.dtype.itemsize
    return tensor.detach().reshape(-1).view(_INTEGER[size]).numpy().view(_UNSIGNED[size])


@lru_cache
def _rows(size: int) -> Words:
    """Return eight words for each byte of a mask, all ones where its bit is 1, lowest bit first: [256, 8]."""
    return np.repeat(-BITS.astype(np.int8), size, axis=1).view(_UNSIGNED[size])


class Source(ABC):
    """The values that a masked weight has in the base."""

    @abstractmethod
    def masked(self, mask: Packed, start: int, stop: int, out: Words) -> None:
        """Write the elements from `start` to `stop` under a packed mask into `out`. `start` is a multiple of 8."""

    @abstractmethod
    def masked_on(self, mask: Packed, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the same elements on a device that is not the CPU."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the values in bytes."""


class Held(Source):
    """Values that are kept as numbers, such as pretrained weights.

    Args:
        values: the weight, of any shape, in the network's dtype.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach().contiguous().view(-1)
        self._words: Words | None = None  # the values as words, in the same memory on the CPU

    def masked(self, mask: Packed, start: int, stop: int, out: Words) -> None:
        if self._words is None:
            self._words = words_of(self.values.cpu())
        rows, whole = _rows(self.values.dtype.itemsize), (stop - start) // 8 * 8
        np.take(rows, mask[start // 8 : (start + whole) // 8], axis=0, out=out[:whole].reshape(-1, 8), mode="clip")
        if whole < stop - start:
            out[whole:] = rows[mask[stop // 8], : stop - start - whole]
        np.bitwise_and(self._words[start:stop], out, out=out)

    def masked_on(self, mask: Packed, start: int, stop: int, device: torch.device) -> Tensor:
        if self.values.device != device:
            self.values, self._words = self.values.to(device), None
        integer = _INTEGER[self.values.dtype.itemsize]
        rows = torch.from_numpy(_rows(self.values.dtype.itemsize)).view(integer).to(device)
        bits = torch.from_numpy(mask[start // 8 : -(-stop // 8)]).to(device).int()
        kept = rows.index_select(0, bits).view(-1)[: stop - start]
        return (self.values[start:stop].view(integer) & kept).view(self.values.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Signs(Source):
    """The values +std and −std, of which only the signs are kept, one bit for each.

    Args:
        numel, std, seed, stream: of the weight, as its file describes it.
        dtype: the network's.
    """

    def __init__(self, numel: int, std: float, seed: int, stream: str, dtype: torch.dtype) -> None:
        raw = words(seed, "weight", stream).random_raw(-(-numel // 64)).astype("<u8", copy=False)
        self.signs: Packed = raw.view(np.uint8)[: -(-numel // 8)]
        # Row 16 · mask + signs has four weights, for half a byte of each, lowest bit first.
        signs, kept = np.tile(BITS[:16, :4], (16, 1)), np.repeat(BITS[:16, :4], 16, axis=0)
        values = np.where(kept, np.where(signs, np.float32(std), np.float32(-std)), np.float32(0))
        self.four = rounded(values, dtype)

    def _halves(self, mask: Packed, start: int, stop: int) -> Packed:
        """Return the rows of `four` for the elements from `start` to `stop`, two for each byte."""
        bytes_ = slice(start // 8, -(-stop // 8))
        pairs = mask[bytes_].astype("<u2")
        np.left_shift(pairs, 8, out=pairs)
        np.bitwise_or(pairs, self.signs[bytes_], out=pairs)
        # The two middle halves change places: each byte has then the mask and the signs of the same four weights.
        middle = (pairs ^ pairs >> 4) & 0xF0
        return (pairs ^ middle ^ middle << 4).view(np.uint8)

    def masked(self, mask: Packed, start: int, stop: int, out: Words) -> None:
        halves, four, whole = self._halves(mask, start, stop), words_of(self.four), (stop - start) // 4 * 4
        np.take(four.reshape(-1, 4), halves[: whole // 4], axis=0, out=out[:whole].reshape(-1, 4), mode="clip")
        if whole < stop - start:
            out[whole:] = four.reshape(-1, 4)[halves[whole // 4], : stop - start - whole]

    def masked_on(self, mask: Packed, start: int, stop: int, device: torch.device) -> Tensor:
        rows = torch.from_numpy(self._halves(mask, start, stop)).to(device).int()
        return self.four.to(device).index_select(0, rows).view(-1)[: stop - start]

    @property
    def nbytes(self) -> int:
        return self.signs.nbytes + self.four.nbytes


class Part(ABC):
    """One tensor of the network under one task."""

    @abstractmethod
    def piece(self, start: int, stop: int, out: Words) -> None:
        """Write the elements from `start`, a multiple of 8, to `stop` into `out`."""

    @abstractmethod
    def write(self, target: Tensor) -> None:
        """Write the whole tensor into `target`, of the same shape and dtype and without gradient, in place."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that the task takes for it, in bytes: without the base."""


class Kept(Part):
    """A masked weight: a source in the base, and the packed mask.

    Args:
        negative: which weights are negative, packed as the mask, and 0 where that is; None if as in the base.
    """

    def __init__(self, source: Source, mask: Packed, negative: Packed | None = None) -> None:
        self.source = source
        self.mask = mask
        self.negative = negative

    def piece(self, start: int, stop: int, out: Words) -> None:
        self.source.masked(self.mask, start, stop, out)
        if self.negative is not None:
            size = out.dtype.itemsize
            sign = out.dtype.type(1 << 8 * size - 1)
            bits = np.take(_rows(size), self.negative[start // 8 : -(-stop // 8)], axis=0).reshape(-1)[: stop - start]
            np.bitwise_and(out, ~sign, out=out)
            np.bitwise_or(out, bits & sign, out=out)

    def _piece_on(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the elements from `start` to `stop` on a device that is not the CPU."""
        found = self.source.masked_on(self.mask, start, stop, device)
        if self.negative is None:
            return found
        negative = self.negative[start // 8 : -(-stop // 8)]
        bits = torch.from_numpy(np.unpackbits(negative, count=stop - start, bitorder="little").view(np.bool_))
        return torch.where(bits.to(device), -found.abs(), found.abs())

    def write(self, target: Tensor) -> None:
        n = target.numel()
        if target.device.type == "cpu":
            flat = target if target.is_contiguous() else torch.empty(n, dtype=target.dtype)
            out = words_of(flat)
            for start in range(0, n, _PIECE):
                self.piece(start, min(start + _PIECE, n), out[start : start + _PIECE])
            torch.autograd.graph.increment_version(flat)
        else:
            flat = target.detach().view(-1) if target.is_contiguous() else torch.empty_like(target.reshape(-1))
            for start in range(0, n, _ON_DEVICE):
                stop = min(start + _ON_DEVICE, n)
                flat[start:stop] = self._piece_on(start, stop, target.device)
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + (0 if self.negative is None else self.negative.nbytes)


class Whole(Part):
    """A tensor that is the task's own, kept as it is."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()

    def piece(self, start: int, stop: int, out: Words) -> None:
        out[:] = words_of(self.values.cpu())[start:stop]

    def write(self, target: Tensor) -> None:
        target.copy_(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Filled(Part):
    """A tensor whose elements all have one value."""

    def __init__(self, value: bool | int | float, dtype: torch.dtype) -> None:
        self.value = value
        self.dtype = dtype

    def piece(self, start: int, stop: int, out: Words) -> None:
        out[:] = words_of(torch.tensor([self.value], dtype=self.dtype))

    def write(self, target: Tensor) -> None:
        target.fill_(self.value)

    @property
    def nbytes(self) -> int:
        return 0


def write_all(written: Iterable[tuple[Part, Tensor]]) -> None:
    """Write parts into tensors without gradient, the masked weights on as many threads as PyTorch has."""
    rest: list[tuple[Part, Tensor]] = []
    shared: list[tuple[Part, Tensor]] = []
    for part, target in written:
        plain = target.device.type == "cpu" and target.is_contiguous()
        (shared if isinstance(part, Kept) and plain else rest).append((part, target))
    threads = torch.get_num_threads()
    if threads == 1 or sum(target.numel() for _, target in shared) < _PARALLEL:
        threads, rest, shared = 1, rest + shared, []
    pieces = [
        (part, start, out[start : start + _PIECE])
        for part, target in shared
        for out in [words_of(target)]
        for start in range(0, len(out), _PIECE)
    ]
    pieces.sort(key=lambda piece: len(piece[2]), reverse=True)
    with ThreadPoolExecutor(threads) as pool:  # which waits for all that was begun, also if it is interrupted
        begun = [pool.submit(_write_pieces, pieces[i::threads]) for i in range(threads) if pieces]
        for part, target in rest:
            part.write(target)
        for each in begun:
            each.result()
    for _, target in shared:
        torch.autograd.graph.increment_version(target)


def _write_pieces(pieces: Sequence[tuple[Part, int, Words]]) -> None:
    for part, start, out in pieces:
        part.piece(start, start + len(out), out)
