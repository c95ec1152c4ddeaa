"""Planes: bits beside a mask that change the weights that take part (docs/artifact-format.md, section 8)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..codecs.bitpack import padding_is_zero
from ..weights.streams import CHUNK, Floats

Packed = NDArray[np.uint8]
Bools = NDArray[np.bool_]


def _signed(values: Floats, positive: Bools) -> Floats:
    """Return the magnitudes with other signs. Zeros get one too."""
    return np.copysign(values, np.where(positive, np.float32(1), np.float32(-1)))


# Each turns the values of the weights that take part, and their bits, into effective weights.
PLANES: dict[str, Callable[[Floats, Bools], Floats]] = {"sign": _signed}


@dataclass(frozen=True)
class Bits:
    """What a file says about one masked weight: its packed mask, and its planes by kind, in the order of the manifest.

    Attributes:
        mask: uint8 [ceil(n / 8)].
        planes: of each kind uint8 [ceil(kept / 8)], a bit for each weight that takes part, lowest bit first.
    """

    mask: Packed
    planes: Mapping[str, Packed] = field(default_factory=dict)

    def effective(self, values: Iterable[Floats]) -> Iterator[Floats]:
        """Yield the effective weights for a weight's own values: changed by the planes, and +0.0 where the mask is 0.

        Args:
            values: pieces of float32, in row-major order, whose sizes are multiples of 8 but for the last.
        """
        start = place = 0
        for piece in values:
            kept = _unpacked(self.mask, start, len(piece))
            taken = piece[kept]
            for kind, plane in self.planes.items():
                taken = PLANES[kind](taken, _unpacked(plane, place, len(taken)))
            out = np.zeros(len(piece), np.float32)
            out[kept] = taken
            yield out
            start, place = start + len(piece), place + len(taken)

    def spread(self, kind: str, numel: int) -> Packed:
        """Return a plane with a bit for every weight, 0 for those that do not take part: uint8 [ceil(numel / 8)]."""
        out, place = np.empty(len(self.mask), np.uint8), 0
        for start in range(0, numel, CHUNK):
            bits = _unpacked(self.mask, start, min(CHUNK, numel - start))
            kept = int(bits.sum())
            bits[bits] = _unpacked(self.planes[kind], place, kept)
            out[start // 8 : start // 8 + -(-len(bits) // 8)] = np.packbits(bits, bitorder="little")
            place += kept
        return out

    def moved(self, order: NDArray[np.int64]) -> "Bits":
        """Return the bits with the weights in another order: place i gets what place order[i] has."""
        n = len(order)
        mask = _unpacked(self.mask, 0, n)[order]
        planes = {kind: _unpacked(self.spread(kind, n), 0, n)[order][mask] for kind in self.planes}
        return Bits(_packed(mask), {kind: _packed(plane) for kind, plane in planes.items()})


def plane_error(plane: Packed, kept: int) -> str:
    """Return what is wrong with the bytes of a plane for `kept` weights, whose number is right; empty if nothing is."""
    return "" if padding_is_zero(plane, kept) else "has padding bits that are not 0"


def _unpacked(packed: Packed, start: int, count: int) -> Bools:
    """Return `count` bits from the one with the index `start`."""
    part = packed[start // 8 : -(-(start + count) // 8)]
    return np.unpackbits(part, bitorder="little")[start % 8 :][:count].view(np.bool_)


def _packed(bits: Bools) -> Packed:
    return np.packbits(bits, bitorder="little")
