"""The bytes of a mask in a file: all of its bits, or where the seed fixes weights those of the others, encoded."""

import numpy as np

from ..codecs import get_codec
from ..codecs.base import Bytes, Shape
from ..codecs.bitpack import bits_at, ones, pack
from ..codecs.pattern_coded import obeys as obeys_pattern
from ..errors import ArtifactError
from ..weights.fixed import FREE, KEPT
from .manifest import TensorSpec
from .planes import Packed


def mask_sizes(entry: TensorSpec) -> range:
    """Return the possible numbers of bytes of a mask."""
    return get_codec(entry.encoding).sizes(*_coded(entry), entry.pattern)


def expands(entry: TensorSpec) -> bool:
    """Return whether a mask of almost no bytes may stand for any number of weights."""
    return entry.fixed is not None or get_codec(entry.encoding).expands


def encode_mask(entry: TensorSpec, seed: int, packed: Packed) -> Bytes:
    """Return the bytes of a packed mask, which obeys what is fixed."""
    free = packed if entry.fixed is None else _free(entry, seed, packed)
    return get_codec(entry.encoding).to_bytes(free, *_coded(entry), entry.pattern)


def decode_mask(entry: TensorSpec, seed: int, data: Bytes) -> Packed:
    """Return the packed mask that the bytes stand for, checked against what the manifest says about it.

    Raises:
        ArtifactError: no mask has these bytes, or not one that keeps as many weights, or that obeys its pattern.
    """
    codec = get_codec(entry.encoding)
    try:
        packed = codec.to_bits(data, *_coded(entry), entry.pattern)
    except ValueError as error:
        raise ArtifactError(f"'{entry.name}.mask' {error}") from error
    if entry.fixed is not None:
        packed = _whole(entry, seed, packed)
    if ones(packed) != entry.kept:
        raise ArtifactError(f"'{entry.name}.mask' keeps {ones(packed)} weights; expected {entry.kept}")
    if entry.pattern is not None and not codec.needs_pattern and not obeys_pattern(packed, entry.shape, entry.pattern):
        raise ArtifactError(f"'{entry.name}.mask' does not keep {entry.pattern} of its neighbours, as its pattern says")
    return packed


def obeys_fixed(entry: TensorSpec, seed: int, packed: Packed) -> bool:
    """Return whether a mask keeps and drops what the seed fixes."""
    return entry.fixed is None or np.array_equal(_whole(entry, seed, _free(entry, seed, packed)), packed)


def _coded(entry: TensorSpec) -> tuple[Shape, int]:
    """Return the shape of what is encoded, and how many ones it has."""
    if entry.fixed is None:
        return entry.shape, entry.kept or 0
    return (entry.fixed.free(entry.numel),), (entry.kept or 0) - entry.fixed.kept


def _free(entry: TensorSpec, seed: int, packed: Packed) -> Packed:
    """Return the bits of the weights that are not fixed."""
    assert entry.fixed is not None
    start, left, found = 0, np.empty(0, bool), [np.empty(0, np.uint8)]
    for fates in entry.fixed.fates(entry.numel, seed, entry.stream):
        left = np.concatenate([left, bits_at(packed, start, len(fates))[fates == FREE]])
        whole = left.size // 8 * 8
        found.append(pack(left[:whole]))
        left, start = left[whole:], start + len(fates)
    return np.concatenate([*found, pack(left)])


def _whole(entry: TensorSpec, seed: int, free: Packed) -> Packed:
    """Return a whole mask, from the bits of the weights that are not fixed."""
    assert entry.fixed is not None
    place, found = 0, []
    for fates in entry.fixed.fates(entry.numel, seed, entry.stream):
        bits, chosen = fates == KEPT, fates == FREE
        count = int(np.count_nonzero(chosen))
        bits[chosen] = bits_at(free, place, count)
        found.append(pack(bits))
        place += count
    return np.concatenate(found)
