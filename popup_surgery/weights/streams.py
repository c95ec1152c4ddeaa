"""Draw a tensor's values from a seed and its name: section 1 of docs/artifact-format.md.

Uses NumPy alone, so that the values do not depend on a device, a library default or the order of traversal.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConversionError

PERSON = b"popup-surgery/v1"
QUANTILES_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
CHUNK = 1 << 17  # elements drawn at a time, which fit in cache; a multiple of 64, so that pieces end at whole words

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)  # of each byte

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint64]
Generations = NDArray[np.integer[Any]]  # how often weights were drawn again
Sources = NDArray[np.integer[Any]]  # places in the flattened tensor that weights have their values from
Origin = tuple[Generations, Sources]
Values = Callable[[Bytes, int], Floats]


def check_seed(seed: object) -> int:
    """Return `seed` if it is an integer from 0 to 2⁶⁴ − 1, else raise `ConversionError`."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ConversionError(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1")
    return int(seed)


def key_of(seed: int, purpose: str, name: str) -> Words:
    """Return the key of a tensor's stream: uint64 [2], a BLAKE2b digest of the seed, the purpose and the name."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16, person=PERSON).digest()
    return np.frombuffer(digest, "<u8")


def words(seed: int, purpose: str, name: str) -> np.random.Philox:
    """Return the generator of a tensor's random words: Philox4x64-10, whose key is that of its stream."""
    return np.random.Philox(key=key_of(seed, purpose, name))


@lru_cache(maxsize=1)
def quantiles() -> Floats:
    """Return the quantiles Φ⁻¹((i + ½) / 65536) of the standard normal: float32 [65536], checked against a digest."""
    inverse = statistics.NormalDist().inv_cdf
    table = np.array([inverse((i + 0.5) / 65536) for i in range(65536)], "<f4")
    if hashlib.sha256(table.tobytes()).hexdigest() != QUANTILES_SHA256:
        raise RuntimeError("this platform computes another normal quantile table than the specification's")
    return table


def draw(distribution: str, numel: int, std: float, seed: int, purpose: str, name: str) -> Iterator[Floats]:
    """Yield the values of one tensor in row-major order, in pieces of float32 [at most CHUNK].

    Args:
        distribution: a key of `DISTRIBUTIONS`.
        std: standard deviation, float64, > 0.
        purpose: `weight`, `other` or `score`.
        name: the tensor's stream name.
    """
    bits, values = DISTRIBUTIONS[distribution]
    return _pieces(numel, bits, values(std), words(seed, purpose, name))


def draw_scores(numel: int, fan_in: float, seed: int, name: str) -> Iterator[Floats]:
    """Yield initial scores, U(−1/√fan_in, 1/√fan_in), in pieces like `draw` (Kaiming uniform, a = √5)."""
    return _pieces(numel, 32, _symmetric(1.0 / math.sqrt(fan_in)), words(seed, "score", name))


MOST = 4095  # how often a weight is drawn again at most


def origins(
    numel: int, generations: Iterator[Generations] | None, sources: Iterator[Sources] | None
) -> Iterator[Origin] | None:
    """Return where each weight's value is from, in pieces of CHUNK: the stream's generation, and the place in it.

    None if both are missing. If one is, the weights were never drawn again, or have the values of their own places.
    """
    return None if generations is None and sources is None else _origins(numel, generations, sources)


def _origins(
    numel: int, generations: Iterator[Generations] | None, sources: Iterator[Sources] | None
) -> Iterator[Origin]:
    for start in range(0, numel, CHUNK):
        own = np.arange(start, min(start + CHUNK, numel))
        yield (
            np.zeros_like(own) if generations is None else next(generations),
            own if sources is None else next(sources),
        )


def draw_again(
    pieces: Iterable[Floats],
    origins: Iterable[Origin],
    distribution: str,
    std: float,
    seed: int,
    name: str,
) -> Iterator[Floats]:
    """Yield the weights of a tensor, where those that were drawn again or copied have their latest values.

    Args:
        pieces: the first values, as `draw` yields them. They are written to.
        origins: the generation of each, 0 … MOST, and the place, in pieces of the same sizes.
        distribution, std, seed, name: as for `draw`.
    """
    start = 0
    for piece, (generation, source) in zip(pieces, origins, strict=True):
        other = np.flatnonzero((generation != 0) | (source != np.arange(start, start + len(piece))))
        piece[other] = values_at(source[other], generation[other], distribution, std, seed, name)
        yield piece
        start += len(piece)


def values_at(
    places: Sources,
    generations: Generations,
    distribution: str,
    std: float,
    seed: int,
    name: str,
) -> Floats:
    """Return single weights: float32 [n], of n places in the flattened tensor.

    Generation g > 0 has a stream of its own, `<name>@<g>`. Any value can be read without those before it.
    """
    bits, values = DISTRIBUTIONS[distribution]
    found = np.empty(len(places), np.float32)
    for start in range(0, len(places), CHUNK):
        at = places[start : start + CHUNK] * bits
        numbers, which = np.unique(generations[start : start + CHUNK], return_inverse=True)
        keys = np.array([key_of(seed, "weight", f"{name}@{g}" if g else name) for g in numbers], np.uint64).reshape(
            -1, 2
        )[which]
        four = philox((at // 256 + 1).astype(np.uint64), keys[:, 0], keys[:, 1])
        word = np.choose(at // 64 % 4, four) >> (at % 64).astype(np.uint64)
        raw = np.packbits(word & 1, bitorder="little") if bits == 1 else word.astype(f"<u{bits // 8 or 1}")
        found[start : start + CHUNK] = values(std)(raw.view(np.uint8), len(at))
    return found


def philox(counter: Words, k0: Words, k1: Words) -> tuple[Words, Words, Words, Words]:
    """Return the four words of Philox4x64-10 for each counter (c, 0, 0, 0) and key: uint64 [n] each."""
    zero = np.zeros_like(counter)
    x = counter, zero, zero, zero
    with np.errstate(over="ignore"):
        for _ in range(10):
            high0, low0 = _product(0xD2E7470EE14C6C93, x[0])
            high1, low1 = _product(0xCA5A826395121157, x[2])
            x = high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0
            k0, k1 = k0 + np.uint64(0x9E3779B97F4A7C15), k1 + np.uint64(0xBB67AE8584CAA73B)
    return x


def _product(factor: int, x: Words) -> tuple[Words, Words]:
    """Return the high and the low half of a product of 128 bits, from products of 32 bits each."""
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    low, high = np.uint64(factor & 2**32 - 1), np.uint64(factor >> 32)
    x_low, x_high = x & mask, x >> half
    middle = x_high * low + (x_low * low >> half)
    other = x_low * high + (middle & mask)
    return x_high * high + (middle >> half) + (other >> half), x * np.uint64(factor)


SPREAD = 1 / 16  # of a constant's magnitude


def untied(pieces: Iterable[Floats], seed: int, name: str) -> Iterator[Floats]:
    """Yield the same values with ties broken by the seed, for learners whose scores start as the weights.

    If all magnitudes of a piece are one constant, up to a 16th of it is added to each. A smaller spread would leave the
    order to the first steps of training, in which whole layers may die. If many are equal, as quantised ones are, 0 …
    4095 units in the last place are added to each, which half and bfloat16 round off again. Other pieces do not change.

    Args:
        pieces: float32 values of one tensor in row-major order.
        name: the tensor's stream name.
    """
    generator = words(seed, "tie", name)
    for piece in pieces:
        bits = piece.view(np.uint32)
        magnitudes = bits & np.uint32(0x7FFFFFFF)
        looked_at = magnitudes[:: max(1, len(piece) // 1024)]
        different = len(np.unique(looked_at))
        if 2 * different > len(looked_at):
            yield piece
            continue
        random = generator.random_raw(-(-len(piece) // 4)).astype("<u8", copy=False).view("<u2")[: len(piece)]
        if different == 1 and magnitudes[0] and (magnitudes == magnitudes[0]).all():
            with np.errstate(over="ignore"):
                spread = piece * (np.float32(1) + random * np.float32(SPREAD / 65536))
            yield np.where(np.isfinite(spread), spread, piece)
        else:
            finite = magnitudes < np.uint32(0x7F7FF000)  # and far enough from infinity
            yield (bits + (random & 0xFFF) * finite).astype(np.uint32, copy=False).view(np.float32)


def _pieces(numel: int, bits: int, values: Values, generator: np.random.Philox) -> Iterator[Floats]:
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        raw = generator.random_raw(-(-count * bits // 64)) if bits else np.empty(0, np.uint64)
        yield values(raw.astype("<u8", copy=False).view(np.uint8), count)


def _symmetric(bound: float) -> Values:
    """Return a function that turns 32 bits into a value, uniform in −bound … bound, symmetric about 0 and never 0."""

    def values(raw: Bytes, count: int) -> Floats:
        # u is from 0 to 2²⁴ − 1, so 2u + 1 − 2²⁴ is odd: u = 0 gives −16,777,215 and so −bound · 0.99999994, u = 2²³
        # gives 1 and so bound · 0.00000006. No value is 0, and each value's negative occurs too.
        u = raw.view("<u4")[:count] >> np.uint32(8)
        steps = (2 * u.astype(np.int32) + np.int32(1 - 2**24)).astype(np.float32)
        steps *= np.float32(2**-24)  # exact: only the next product rounds
        steps *= np.float32(bound)
        return steps

    return values


def _signed_constant(std: float) -> Values:
    # all eight elements of a byte at once: 0x05 has the bits 1 0 1 0 0 0 0 0, lowest first: + − + − − − − −
    eight = np.where(BITS, np.float32(std), np.float32(-std))
    return lambda raw, count: np.take(eight, raw[: -(-count // 8)], axis=0).reshape(-1)[:count]


def _unsigned_constant(std: float) -> Values:
    return lambda raw, count: np.full(count, std, np.float32)


def _normal(std: float) -> Values:
    return lambda raw, count: quantiles()[raw.view("<u2")[:count]] * np.float32(std)


def _uniform(std: float) -> Values:
    return _symmetric(std * math.sqrt(3.0))


def _sign(word: str) -> Callable[[float], Values]:
    """Return the values of a distribution's signs: that of an element is the highest bit of its word."""
    return lambda std: lambda raw, count: np.where(raw.view(word)[:count] < 0, np.float32(std), np.float32(-std))


# name: bits that one element takes from the stream, and a function that, for a standard deviation, decodes the bytes
DISTRIBUTIONS: dict[str, tuple[int, Callable[[float], Values]]] = {
    "signed_constant": (1, _signed_constant),
    "unsigned_constant": (0, _unsigned_constant),
    "normal": (16, _normal),
    "uniform": (32, _uniform),
    "normal_sign": (16, _sign("<i2")),
    "uniform_sign": (32, _sign("<i4")),
}
SIGNS = {"normal": "normal_sign", "uniform": "uniform_sign"}  # of the same draw, with one magnitude in place of its own
CONSTANTS = ("signed_constant", "unsigned_constant", *SIGNS.values())  # distributions of one magnitude
