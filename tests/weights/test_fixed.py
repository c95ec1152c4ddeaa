"""Which weights the seed fixes: the page's rule, its vectors, and exact numbers."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from popup_surgery.weights.fixed import DROPPED, FREE, KEPT, Fates, Fixed
from popup_surgery.weights.streams import CHUNK, words
from support import GOLDEN

VECTORS = json.loads((GOLDEN / "fixed.json").read_text(encoding="utf-8"))["vectors"]


def fates(fixed: Fixed, n: int, seed: int = 0, name: str = "weight") -> Fates:
    return np.concatenate([*fixed.fates(n, seed, name)])


def by_the_page(fixed: Fixed, n: int, seed: int = 0, name: str = "weight") -> Fates:
    order = np.argsort(words(seed, "fixed", name).random_raw(-(-n // 4)).view("<u2")[:n], kind="stable")
    found = np.full(n, FREE, np.int8)
    found[order[: fixed.dropped]] = DROPPED
    found[order[fixed.dropped : fixed.dropped + fixed.kept]] = KEPT
    return found


@given(st.data(), st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_the_words_decide_and_of_equal_ones_the_lower_index(data: st.DataObject, n: int, seed: int) -> None:
    dropped = data.draw(st.integers(0, n))
    fixed = Fixed(dropped, data.draw(st.integers(0, n - dropped)))
    found = fates(fixed, n, seed)
    assert np.array_equal(found, by_the_page(fixed, n, seed))
    assert fixed.free(n) == np.count_nonzero(found == FREE)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.1), (0.3333, 0.6667), (1.0, 0.0), (0.0, 1.0)])
def test_over_several_pieces_with_many_ties(shares: tuple[float, float]) -> None:
    n = 2 * CHUNK + 1234
    fixed = Fixed(int(shares[0] * n), n - int((1 - shares[1]) * n) if sum(shares) < 1 else n - int(shares[0] * n))
    assert np.array_equal(fates(fixed, n), by_the_page(fixed, n))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['n']}-{vector['fixed']}")
def test_vectors(vector: Any) -> None:
    found = fates(Fixed(**vector["fixed"]), vector["n"], int(vector["seed"]), vector["stream"])
    for name, fate in (("dropped_weights", DROPPED), ("kept_weights", KEPT)):
        packed = np.packbits(found == fate, bitorder="little").tobytes()
        assert vector.get(name, packed.hex()) == packed.hex()
        digest = hashlib.sha256(packed).hexdigest()
        assert vector.get(f"{name}_sha256", digest) == digest


@given(st.integers(1, 50), st.integers(-2, 60), st.integers(-2, 60), st.integers(0, 60))
@example(8, 0, 0, 8)
def test_what_a_mask_can_keep(n: int, dropped: int, kept: int, total: int) -> None:
    possible = {kept + more for more in range(n - dropped - kept + 1)} if min(dropped, kept) >= 0 else set()
    assert Fixed(dropped, kept).allows(n, total) == (total in possible)
