"""N of each M neighbours: which weights are neighbours, and the choice of the N largest |score| among each M.

The neighbours are consecutive input channels of one output and one kernel position, as sparse tensor cores want them.
Each group is ranked by itself, so there is no threshold, and no exchange between processes.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bits import MAGNITUDE, Bits, bits_of

LARGEST = 16  # neighbours in a group
FAR = 1 << 20  # elements from one neighbour to the next, at most
PIECE = 1 << 17  # elements that are looked at together, which fit in cache
EXPECTED = f"'N:M', N of each M neighbours, with 1 <= N < M <= {LARGEST}, such as '2:4'"
_TEXT = re.compile("([1-9][0-9]?):([1-9][0-9]?)", re.ASCII)


def parse_pattern(text: object) -> tuple[int, int]:
    """Return N and M of a pattern such as `2:4`; `ValueError` says what was expected."""
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    keep, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= keep < of <= LARGEST:
        raise ValueError(f"expected {EXPECTED}")
    return keep, of


@dataclass(frozen=True)
class Pattern:
    """N of each M neighbours, for one weight.

    The weight's elements, in row-major order, are a tensor [outer, channels, stride]. Along the second dimension, `of`
    elements at a time are a group. A remainder of r keeps ⌈r·N/M⌉.

    Attributes:
        keep, of: N and M.
        channels: inputs of one output at one kernel position.
        stride: elements from one of them to the next.
    """

    keep: int
    of: int
    channels: int
    stride: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def fits(self, numel: int) -> bool:
        """Return whether there is such a pattern, for a weight of `numel` elements."""
        return (
            1 <= self.keep < self.of <= LARGEST
            and self.channels >= 1
            and 1 <= self.stride <= FAR
            and numel % (self.channels * self.stride) == 0
        )

    @property
    def sections(self) -> Iterator[tuple[int, int, int, int]]:
        """The channels of whole groups, and those of remainders: where they begin and end, a group's size and how many
        of it are kept."""
        whole = self.channels // self.of * self.of
        if whole:
            yield 0, whole, self.of, self.keep
        if rest := self.channels - whole:
            yield whole, self.channels, rest, -(-rest * self.keep // self.of)

    def groups(self, numel: int) -> Iterator[tuple[int, int, int]]:
        """Yield for each section the number of its groups in a weight of `numel` elements, their size, and N."""
        for start, stop, size, keep in self.sections:
            yield numel // self.channels * (stop - start) // size, size, keep

    def kept(self, numel: int) -> int:
        """Return how many of a weight's `numel` elements are kept."""
        return sum(count * keep for count, _, keep in self.groups(numel))

    def bits(self, numel: int) -> float:
        """Return the information in a mask, in bits."""
        # of more than a file can hold, so many
        return sum(min(count, 1 << 60) * math.log2(math.comb(size, keep)) for count, size, keep in self.groups(numel))

    def pieces(self, numel: int, largest: int = PIECE) -> Iterator[tuple[slice, int]]:
        """Yield the parts of a flat weight in order, each of whole groups, and how many channels each of its rows has.

        Args:
            largest: elements in a piece, unless one row of groups has more.
        """
        row = self.channels * self.stride
        if row <= largest:
            step = largest // row * row
            for start in range(0, numel, step):
                yield slice(start, min(start + step, numel)), self.channels
            return
        many = max(1, largest // (self.of * self.stride)) * self.of
        for start in range(0, numel, row):
            for channel in range(0, self.channels, many):
                count = min(many, self.channels - channel)
                first = start + channel * self.stride
                yield slice(first, first + count * self.stride), count

    def in_groups(self, piece: Any, channels: int) -> Iterator[tuple[Any, int]]:
        """Yield the whole groups in a piece of a flat weight, then the remainders: a view, and how many are kept.

        Args:
            piece: an array or a tensor; the views are [rows, groups, size, stride].
            channels: in each row of the piece.
        """
        rows = piece.reshape(-1, channels, self.stride)
        whole = channels // self.of * self.of
        if whole:
            yield rows[:, :whole].reshape(-1, whole // self.of, self.of, self.stride), self.keep
        if rest := channels - whole:
            yield rows[:, None, whole:], -(-rest * self.keep // self.of)


def select_pattern(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N largest |score| of each group. Ties go to the lower index, and a NaN ranks above infinity.

    Args:
        score: float32, of any shape and strides.
        pattern: of the weight.

    Returns:
        The mask: bool, of the score's shape and strides.
    """
    if score.dtype != torch.float32:
        raise ValueError(f"scores are ranked in float32, not {score.dtype}")
    mask = torch.empty_like(score, dtype=torch.bool)
    flat = mask if mask.is_contiguous() else torch.empty(score.shape, dtype=torch.bool, device=score.device)
    if score.device.type == "cpu":
        bits, out = bits_of(score), flat.view(-1).numpy()
        for piece, channels in pattern.pieces(len(bits)):
            groups = zip(pattern.in_groups(bits[piece], channels), pattern.in_groups(out[piece], channels), strict=True)
            for (group, keep), (found, _) in groups:
                if not _above(group, keep, found):
                    _ranked(torch.from_numpy(group), keep, torch.from_numpy(found))
    else:  # a look at ties would make the host wait
        whole = score.detach().contiguous().view(-1).view(torch.int32), flat.view(-1)
        for (group, keep), (found, _) in zip(
            *(pattern.in_groups(each, pattern.channels) for each in whole), strict=True
        ):
            _ranked(group, keep, found)
    return mask if flat is mask else mask.copy_(flat)


def _above(group: Bits, keep: int, mask: NDArray[np.bool_]) -> bool:
    """Write the mask of all that reach the `keep`-th largest of their group; return False if ties make them too many.

    Args:
        group, mask: [rows, groups, size, stride].
    """
    each = [group[:, :, i] & MAGNITUDE for i in range(group.shape[2])]
    largest = each[:1]  # of those seen so far, in descending order
    for seen, value in enumerate(each[1:], 1):
        for place in range(len(largest)):
            larger = np.maximum(largest[place], value)
            if place + 1 < keep:  # what the last place loses matters no more
                value = np.minimum(largest[place], value)
            largest[place] = larger
        if seen < keep:
            largest.append(value)
    for i, value in enumerate(each):
        np.greater_equal(value, largest[-1], out=mask[:, :, i])
    return int(np.count_nonzero(mask)) == keep * each[0].size


def _ranked(group: Tensor, keep: int, mask: Tensor) -> None:
    """Write the mask of all that fewer than `keep` of their group come before. Arguments as for `_above`."""
    # Of two equal ones the first comes before the other. Example: 5 1 3 3, two to keep. 0 come before 5, 3 before 1, 1
    # before the first 3 and 2 before the second: the mask is 1 0 1 0.
    size = group.shape[2]
    each = [group[:, :, i] & MAGNITUDE for i in range(size)]
    before = [torch.full_like(each[i], size - 1 - i, dtype=torch.int8) for i in range(size)]  # as if all later ones did
    for i in range(size):
        for j in range(i + 1, size):
            first = torch.ge(each[i], each[j]).view(torch.int8)
            before[i] -= first
            before[j] += first
    for i in range(size):
        torch.lt(before[i], keep, out=mask[:, :, i])


@torch.library.custom_op("popup_surgery::select_pattern", mutates_args=())
def select_pattern_op(score: Tensor, pattern: Sequence[int]) -> Tensor:
    """Return `select_pattern`, as one operator that compilers and tracers do not look into.

    Args:
        pattern: keep, of, channels and stride.
    """
    return select_pattern(score, Pattern(*pattern))


@select_pattern_op.register_fake
def _(score: Tensor, pattern: Sequence[int]) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)


@select_pattern_op.register_vmap
def _(info: Any, in_dims: Any, score: Tensor, pattern: Sequence[int]) -> tuple[Tensor, int]:
    return select_pattern_op(score.movedim(in_dims[0], 0), pattern), 0  # each weight has whole rows
