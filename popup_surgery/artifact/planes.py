"""Planes: what changes the weights that take part, beside a mask (docs/artifact-format.md, sections 8, 10 and 14)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codecs import generations, sources
from ..codecs.bitpack import bits_at, ones, pack, padding_is_zero
from ..weights.streams import CHUNK, Floats, Generations, Origin, Sources, origins

Packed = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Of = Callable[[Sources], NDArray[np.integer[Any]]]  # from places in the flattened tensor


COATS = 8
SOURCE, GENERATION = "source", "generation"  # whose values weights have, and how often these were drawn again
ORIGIN_KINDS = (SOURCE, GENERATION)  # they are no bits, and say which the values are that other planes change …
OF_MANY = ("normal", "uniform")  # … of these distributions: other constants are other signs, and have the plane `sign`
PLANES = (*ORIGIN_KINDS, "sign", *(f"coat{i}" for i in range(2, COATS + 1)))


def in_order(value: Any, kinds: list[str]) -> bool:
    """Return whether a value of a manifest is a list of some of these kinds, without gaps between coats."""
    if not isinstance(value, list) or not value or value != [kind for kind in kinds if kind in value]:
        return False
    coats = [kind for kind in value if kind.startswith("coat")]
    return coats == [f"coat{i}" for i in range(2, len(coats) + 2)]


def are_ones(value: Any, planes: Iterable[str], kept: int) -> bool:
    """Return whether a value of a manifest may be the numbers of ones in planes for `kept` weights."""
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        return False
    whole = len(value) == len(of_bits(planes))
    return whole and all(0 <= one <= bits for bits, one in counts(planes, kept, value).values())


def of_bits(planes: Iterable[str]) -> list[str]:
    """Return the planes that are bits, in order."""
    return [kind for kind in planes if kind not in ORIGIN_KINDS]


def counts(planes: Iterable[str], kept: int, plane_ones: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return how many bits each plane for `kept` weights has, and how many of them are 1, which `plane_ones` gives."""
    found, about = {}, kept
    for kind, count in zip(of_bits(planes), plane_ones, strict=True):
        found[kind] = about, count
        about = about if kind == "sign" else count
    return found


@dataclass(frozen=True)
class Bits:
    """What a file says about one masked weight: its packed mask, and its planes by kind, in the order of `PLANES`.

    Attributes:
        mask: uint8 [ceil(n / 8)].
        planes: of each kind uint8, lowest bit first: a bit for each weight that takes part, and of the coats after
            coat 2 for each weight of the coat before. `source` and `generation` have the bytes of `codecs.sources` and
            `codecs.generations`.
    """

    mask: Packed
    planes: Mapping[str, Packed] = field(default_factory=dict)

    def effective(self, values: Iterable[Floats]) -> Iterator[Floats]:
        """Yield the effective weights for a weight's own values: changed by the planes, and +0.0 where the mask is 0.

        Args:
            values: pieces of float32, in row-major order, whose sizes are multiples of 8 but for the last. They are
                those of the weight's `origins`.
        """
        start, places = 0, dict.fromkeys(of_bits(self.planes), 0)

        def take(kind: str, count: int) -> Bools:
            places[kind] += count
            return bits_at(self.planes[kind], places[kind] - count, count)

        for piece in values:
            kept = bits_at(self.mask, start, len(piece))
            taken = piece[kept]
            count, inside = np.ones(len(taken), np.float32), np.arange(len(taken))
            for kind in places:
                if kind == "sign":
                    taken = _signed(taken, take(kind, len(taken)))
                else:
                    inside = inside[take(kind, len(inside))]
                    count[inside] += 1
            out = np.zeros(len(piece), np.float32)
            out[kept] = taken * count
            yield out
            start += len(piece)

    def origins(self, numel: int) -> Iterator[Origin] | None:
        """Return where the weights' values are from, as `streams.origins` does. Those that take no part are the first.

        None if no plane says so of any.
        """
        return origins(numel, self.generations(numel), self.sources(numel))

    def generations(self, numel: int) -> Iterator[Generations] | None:
        """Return how often each weight was drawn again, in pieces of CHUNK; None if none was."""
        if GENERATION not in self.planes:
            return None
        reader = generations.Reader(self.planes[GENERATION], ones(self.mask))
        return self._of_each(numel, lambda own: np.zeros(len(own), np.uint16), lambda own: reader.take(len(own)))

    def sources(self, numel: int) -> Iterator[Sources] | None:
        """Return whose value each weight has, in pieces of CHUNK; None if none has another's."""
        if SOURCE not in self.planes:
            return None
        reader = sources.Reader(self.planes[SOURCE], ones(self.mask), numel)
        return self._of_each(numel, lambda own: own, reader.take)

    def _of_each(self, numel: int, first: Of, taken: Of) -> Iterator[NDArray[np.integer[Any]]]:
        """Yield what `taken` returns for the places of the weights that take part, and `first` for the others'."""
        for start in range(0, numel, CHUNK):
            own = np.arange(start, min(start + CHUNK, numel))
            kept = bits_at(self.mask, start, len(own))
            piece = first(own)
            piece[kept] = taken(own[kept])
            yield piece

    def spread(self, kind: str, numel: int) -> Packed:
        """Return a plane with a bit for every weight, 0 for those that it is not about: uint8 [ceil(numel / 8)]."""
        about = self.mask
        for before in self._before(kind):
            about = _spread(about, self.planes[before], numel)
        return _spread(about, self.planes[kind], numel)

    def moved(self, order: NDArray[np.int64]) -> "Bits":
        """Return the bits with the weights in another order: place i gets what place order[i] has.

        Sources and generations belong to places, and are left out.
        """
        n = len(order)
        kinds = of_bits(self.planes)
        about = {"": self.mask} | {kind: self.spread(kind, n) for kind in kinds}
        there = {kind: bits_at(bits, 0, n)[order] for kind, bits in about.items()}
        planes = {kind: pack(there[kind][there[["", *self._before(kind)][-1]]]) for kind in kinds}
        return Bits(pack(there[""]), planes)

    def wrong(self, name: str, kept: int) -> str:
        """Return what is wrong with the planes of a weight that keeps `kept`; empty if nothing is.

        `mask_bytes.decode_planes` says what is wrong with coded ones, which must wait for the mask.
        """
        n = kept
        for kind in of_bits(self.planes):
            plane = self.planes[kind]
            count = kept if kind == "sign" else n
            if len(plane) != -(-count // 8):
                return f"'{name}.{kind}' has {len(plane)} bytes; expected {-(-count // 8)} for {count:,} weights"
            if not padding_is_zero(plane, count):
                return f"'{name}.{kind}' has padding bits that are not 0"
            n = n if kind == "sign" else ones(plane)
        return ""

    def _before(self, kind: str) -> list[str]:
        """Return the coats between the mask and a plane."""
        return [] if kind == "sign" else [f"coat{i}" for i in range(2, int(kind.removeprefix("coat")))]


def origin_sizes(kind: str, kept: int, numel: int) -> range:
    """Return the possible numbers of bytes of a plane in `ORIGIN_KINDS`, for a tensor that keeps `kept` of `numel`."""
    return sources.bound(kept, numel) if kind == SOURCE else generations.bound(kept)


def check_origins(kind: str, data: Packed, kept: int, numel: int) -> None:
    """Raise ValueError unless these can be the bytes of a plane in `ORIGIN_KINDS`."""
    sources.check(data, kept, numel) if kind == SOURCE else generations.check(data, kept)


def _signed(values: Floats, positive: Bools) -> Floats:
    """Return the magnitudes with other signs. Zeros get one too."""
    return np.copysign(values, np.where(positive, np.float32(1), np.float32(-1)))


def _spread(about: Packed, plane: Packed, numel: int) -> Packed:
    """Return the bits of `plane` at the places of the ones in `about`, and 0 elsewhere."""
    out, place = np.empty(len(about), np.uint8), 0
    for start in range(0, numel, CHUNK):
        bits = bits_at(about, start, min(CHUNK, numel - start))
        count = int(bits.sum())
        bits[bits] = bits_at(plane, place, count)
        out[start // 8 : start // 8 + -(-len(bits) // 8)] = pack(bits)
        place += count
    return out
