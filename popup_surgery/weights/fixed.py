"""Weights that the seed fixes before training, as dropped or as kept (docs/artifact-format.md, section 11)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .streams import CHUNK, words

FREE, KEPT, DROPPED = 0, 1, -1  # what becomes of a weight
Fates = NDArray[np.int8]
_WORDS = 1 << 16  # how many different words there are


@dataclass(frozen=True)
class Fixed:
    """How many of a tensor's weights are fixed: always dropped, and always kept. The others are free."""

    dropped: int
    kept: int

    def free(self, numel: int) -> int:
        """Return how many of a tensor's `numel` weights are not fixed."""
        return numel - self.dropped - self.kept

    def allows(self, numel: int, kept: int) -> bool:
        """Return whether a mask of `numel` weights, thus fixed, can keep `kept` of them in all."""
        return self.dropped >= 0 and 0 <= self.kept <= kept <= numel - self.dropped

    def fates(self, numel: int, seed: int, name: str) -> Iterator[Fates]:
        """Yield FREE, KEPT or DROPPED for each weight in row-major order, in pieces of int8 [at most CHUNK].

        The weights are ordered by random words of 16 bits, the lower index first among equal ones. The first `dropped`
        of them are dropped, the next `kept` are kept.

        Args:
            numel: the number of weights, at least `dropped` + `kept`.
            name: the tensor's stream name.
        """
        found = np.zeros(_WORDS, np.int64)
        for piece in _random(numel, seed, name):
            found += np.bincount(piece, minlength=_WORDS)
        dropped, fixed = (_First(found, count) for count in (self.dropped, self.dropped + self.kept))
        for piece in _random(numel, seed, name):
            fates = fixed.of(piece).view(np.int8)
            fates[dropped.of(piece)] = DROPPED
            yield fates


class _First:
    """Tells piece by piece which weights are the first `count` in the order of their words.

    Args:
        found: how often each word occurs.
    """

    def __init__(self, found: NDArray[np.int64], count: int) -> None:
        # Example: the words 5 1 3 3 9 3, three of them. 1 is before the limit, 3, and two of the three 3 are wanted.
        upward = np.cumsum(found)
        self.limit = int(np.searchsorted(upward, count))
        self.wanted = count - int(upward[self.limit] - found[self.limit])

    def of(self, piece: NDArray[np.uint16]) -> NDArray[np.bool_]:
        first = piece < self.limit
        ties = np.flatnonzero(piece == self.limit)
        first[ties[: self.wanted]] = True
        self.wanted = max(0, self.wanted - len(ties))
        return first


def _random(numel: int, seed: int, name: str) -> Iterator[NDArray[np.uint16]]:
    generator = words(seed, "fixed", name)
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        yield generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
