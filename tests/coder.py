"""The coder of docs/artifact-format.md, section 6, in plain Python, which needs no library."""

from collections.abc import Iterable

import numpy as np


class Writer:
    """The coder of docs/artifact-format.md, with whole numbers of any size."""

    def __init__(self) -> None:
        self.low, self.range, self.shifts = 0, 2**64 - 1, 0

    def put(self, symbols: Iterable[int], frequencies: list[int]) -> None:
        before = [0, *np.cumsum(frequencies).tolist()]
        for symbol in symbols:
            scale = self.range >> 24
            self.low += scale * before[symbol]
            self.range = scale * frequencies[symbol]
            if self.range < 2**32:
                self.low, self.range, self.shifts = self.low << 32, self.range << 32, self.shifts + 1

    def bytes(self) -> bytes:
        p = self.low + 2**32 - 1 >> 32
        words = [p >> 32 * i & 2**32 - 1 for i in range(self.shifts, -1, -1)]
        words += [0] * (self.low + self.range >> 32 == p)
        return np.array(words, "<u4").tobytes()
