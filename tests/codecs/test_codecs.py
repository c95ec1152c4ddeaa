"""What every registered codec owes, and a codec of a script's own from `save` to `load`."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from popup_surgery import ArtifactError, UnknownName, bake, convert, inspect, load, masks, save, start_from, verify
from popup_surgery.artifact import stored_masks
from popup_surgery.codecs import CODECS, Codec, get_codec, register_codec
from popup_surgery.codecs.bitpack import ones, pack, padding_is_zero, unpack_mask

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

BITPACK = CODECS["bitpack"]
INVERTED = Codec(
    "inverted",
    lambda bits, shape: ~bits,
    lambda data, shape: BITPACK.decode(~data, shape),
    BITPACK.bound,
)


@pytest.fixture
def inverted() -> Iterator[None]:
    """The codec `inverted`, registered for one test."""
    register_codec(INVERTED)
    yield
    del CODECS["inverted"]


@st.composite
def boolean_masks(draw: Callable[..., Any]) -> Mask:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    n = math.prod(shape)
    return np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), np.bool_).reshape(shape)


def decoded(codec: Codec, data: np.ndarray, mask: Mask) -> np.ndarray | None:
    """The bits that a reader gets for a mask of that shape, which keeps as many; None where it refuses the bytes."""
    if data.size not in codec.sizes(mask.shape, int(mask.sum())):
        return None
    try:
        return codec.to_bits(data, mask.shape, int(mask.sum()))
    except ValueError:
        return None


def encoded(codec: Codec, mask: Mask) -> np.ndarray:
    return codec.to_bytes(pack(mask), mask.shape, int(mask.sum()))


# test_pattern_coded.py has the same for those that need a pattern, which most masks do not obey
ANY = [codec for codec in CODECS.values() if not codec.needs_pattern]
CONTRACT = pytest.mark.parametrize("codec", [*ANY, INVERTED], ids=lambda codec: codec.name)
EXAMPLES = settings(max_examples=100, deadline=None)


@CONTRACT
@given(mask=boolean_masks())
@EXAMPLES
def test_a_mask_comes_back(codec: Codec, mask: Mask) -> None:
    data = encoded(codec, mask)
    assert (data.dtype, data.ndim) == (np.uint8, 1)
    bits = decoded(codec, data, mask)
    assert bits is not None
    assert np.array_equal(bits, pack(mask))
    assert np.array_equal(unpack_mask(bits, mask.shape), mask)
    assert ones(bits) == mask.sum()


@CONTRACT
@given(mask=boolean_masks(), more=st.binary(min_size=1, max_size=9))
@EXAMPLES
def test_bytes_of_another_length_are_refused(codec: Codec, mask: Mask, more: bytes) -> None:
    data = encoded(codec, mask)
    assert decoded(codec, np.append(data, np.frombuffer(more, np.uint8)), mask) is None
    assert all(decoded(codec, data[:size], mask) is None for size in range(data.size))


@CONTRACT
@given(mask=boolean_masks())
@EXAMPLES
def test_each_bit_says_something_or_must_be_as_it_is(codec: Codec, mask: Mask) -> None:
    """Two files never hold one mask: a bit that is flipped gives another mask, of the same size, or is refused."""
    data, found = encoded(codec, mask), [pack(mask).tobytes()]
    refused = 0
    for bit in range(8 * data.size):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        bits = decoded(codec, changed, mask)
        refused += bits is None
        if bits is not None:
            assert bits.shape == (-(-mask.size // 8),)
            assert padding_is_zero(bits, mask.size)
            found.append(bits.tobytes())
    assert len(set(found)) == len(found)
    if codec.name in ("bitpack", "inverted"):
        assert refused == -mask.size % 8, "the stray bits, and no other"


@CONTRACT
def test_the_bound_of_a_shape_without_end_costs_nothing(codec: Codec) -> None:
    for shape in ((2**62, 2**62), (10**31,) * 64):
        n = math.prod(shape)
        for kept in (1, 5, 10**9, n // 1000, n // 2, n - 10**9, n - 1):
            sizes = codec.sizes(shape, kept)
            assert 0 not in sizes
            assert min(kept, n - kept) < 10**9 or 2**20 not in sizes, "a small file cannot ask for as many ones"
        assert codec.needs_kept == (0 in codec.sizes(shape, 0)) == (0 in codec.sizes(shape, n))


def test_names(inverted: None) -> None:
    assert get_codec("inverted") is INVERTED
    with pytest.raises(ValueError, match="'bitpack' is registered already"):
        register_codec(BITPACK)
    with pytest.raises(UnknownName, match="unknown encoding 'bitpak'; expected one of bitpack"):
        get_codec("bitpak")


# a codec of a script's own


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))


def test_a_file_in_another_encoding(inverted: None, tmp_path: Path) -> None:
    path, usual = tmp_path / "inverted", tmp_path / "usual"
    net = convert(network(), k=0.4, seed=3)
    manifest, plain = save(net, path, encoding="inverted"), save(net, usual)
    assert inspect(path) == manifest
    assert {entry.encoding for entry in manifest.masked} == {"inverted"}
    assert manifest.masks_sha256 == plain.masks_sha256, "over the masks, however they are written"
    written, packed = load_file(path), load_file(usual)
    assert written.keys() == packed.keys()
    assert all(torch.equal(written[name], ~bits) for name, bits in packed.items())

    assert verify(path, network())
    state = load(path, network()).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bake(net).state_dict().items())
    assert all(torch.equal(stored_masks(path)[name], mask) for name, mask in masks(net).items())
    again = convert(network(), k=0.4, seed=3)
    start_from(again, path)
    save(again, tmp_path / "again", encoding="inverted")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_mask_in_another_encoding_is_checked_like_any(inverted: None, tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(network(), k=0.4, seed=3), path, encoding="inverted")
    good = path.read_bytes()
    end = load_file(path)["3.weight.mask"].numpy().tobytes()  # of 15 weights: the highest bit is a stray one
    for bit, says in ((7, "'3.weight.mask' has padding bits that are not 0"), (6, "'3.weight.mask' keeps")):
        changed = bytes([end[0], end[1] ^ 1 << bit])
        path.write_bytes(changed.join(good.rsplit(end, 1)))
        with pytest.raises(ArtifactError, match=f"net: {says}"):
            load(path, network())


def test_a_reader_that_lacks_the_codec_says_so(tmp_path: Path) -> None:
    register_codec(INVERTED)
    save(convert(network(), seed=3), tmp_path / "net", encoding="inverted")
    del CODECS["inverted"]
    for reader in (load, inspect, verify):
        with pytest.raises(
            ArtifactError, match=r"encoding is 'inverted'; expected one of bitpack, range_coded, pattern"
        ):
            reader(tmp_path / "net")
    with pytest.raises(UnknownName, match="unknown encoding 'inverted'"):
        save(convert(network(), seed=3), tmp_path / "other", encoding="inverted")
    assert not (tmp_path / "other").exists()
