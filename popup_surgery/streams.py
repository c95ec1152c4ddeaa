"""From a seed and a tensor's name to its values: section 1 of docs/artifact-format.md.

NumPy alone, so that the values depend on no device, library default or order of traversal.
"""

import hashlib
import math
import statistics
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import ConversionError

PERSON = b"popup-surgery/v1"
QUANTILES_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
PURPOSES = ("weight", "other", "score")

Floats = NDArray[np.float32]


def check_seed(seed: object) -> int:
    """`seed` if it is an integer in 0 … 2⁶⁴ − 1, else `ConversionError`."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ConversionError(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1")
    return int(seed)


def stream(seed: int, purpose: str, name: str, count: int) -> NDArray[np.uint8]:
    """The first `count` bytes of the stream of tensor `name`: uint8 [count] (Philox4x64-10 under a BLAKE2b key)."""
    text = f"{seed}/{purpose}/{name}".encode()
    digest = hashlib.blake2b(text, digest_size=16, person=PERSON).digest()
    philox = np.random.Philox(key=np.frombuffer(digest, "<u8"))
    words = philox.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


@lru_cache(maxsize=1)
def quantiles() -> Floats:
    """The standard normal's quantiles Φ⁻¹((i + ½) / 65536): float32 [65536], checked against its digest."""
    inverse = statistics.NormalDist().inv_cdf
    table = np.array([inverse((i + 0.5) / 65536) for i in range(65536)], "<f4")
    if hashlib.sha256(table.tobytes()).hexdigest() != QUANTILES_SHA256:
        raise RuntimeError("this platform computes another normal quantile table than the specification's")
    return table


def _symmetric(bound: float, numel: int, seed: int, purpose: str, name: str) -> Floats:
    u = stream(seed, purpose, name, 4 * numel).view("<u4") >> np.uint32(8)
    steps = (2 * u.astype(np.int32) + np.int32(1 - 2**24)).astype(np.float32)
    steps *= np.float32(2**-24)  # exact, so that the one rounding is the next product's
    steps *= np.float32(bound)
    return steps


def draw(distribution: str, numel: int, std: float, seed: int, purpose: str, name: str) -> Floats:
    """Values of one tensor: float32 [numel], row-major.

    Args:
        distribution: a key of `DISTRIBUTIONS`.
        std: standard deviation, float64, > 0.
        purpose: `weight`, `other` or `score`.
        name: the tensor's stream name.
    """
    return DISTRIBUTIONS[distribution](numel, std, seed, purpose, name)


def draw_scores(numel: int, fan_in: float, seed: int, name: str) -> Floats:
    """Initial scores, U(−1/√fan_in, 1/√fan_in): float32 [numel] (Kaiming uniform with a = √5, as the authors')."""
    return _symmetric(1.0 / math.sqrt(fan_in), numel, seed, "score", name)


def _signed_constant(numel: int, std: float, seed: int, purpose: str, name: str) -> Floats:
    bits = np.unpackbits(stream(seed, purpose, name, -(-numel // 8)), count=numel, bitorder="little")
    return np.array([-std, std], np.float32)[bits]


def _unsigned_constant(numel: int, std: float, seed: int, purpose: str, name: str) -> Floats:
    return np.full(numel, std, np.float32)


def _normal(numel: int, std: float, seed: int, purpose: str, name: str) -> Floats:
    return quantiles()[stream(seed, purpose, name, 2 * numel).view("<u2")] * np.float32(std)


def _uniform(numel: int, std: float, seed: int, purpose: str, name: str) -> Floats:
    return _symmetric(std * math.sqrt(3.0), numel, seed, purpose, name)


DISTRIBUTIONS = {
    "signed_constant": _signed_constant,
    "unsigned_constant": _unsigned_constant,
    "normal": _normal,
    "uniform": _uniform,
}
