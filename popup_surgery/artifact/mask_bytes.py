"""The bytes of a mask and its planes in a file.

Of a mask all bits are encoded, or where the seed fixes weights those of the others.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..codecs import Codec, get_codec
from ..codecs.base import Bytes, Shape
from ..codecs.bitpack import bits_at, ones, pack
from ..codecs.pattern_coded import obeys as obeys_pattern
from ..errors import ArtifactError
from ..selection.pattern import Pattern
from ..weights.fixed import FREE, KEPT
from .manifest import TensorSpec
from .planes import ORIGIN_KINDS, Packed, check_origins, counts, of_bits, origin_sizes

PLANE_CODEC = "range_coded"
SAVING = 32  # bytes, about as many as a manifest takes to say that the planes of a weight are coded


def mask_sizes(entry: TensorSpec) -> range:
    """Return the possible numbers of bytes of a mask."""
    return get_codec(entry.encoding).sizes(*_coded(entry), entry.pattern)


def plane_sizes(entry: TensorSpec, kind: str) -> range:
    """Return the possible numbers of bytes of a plane."""
    kept = entry.kept or 0
    if kind in ORIGIN_KINDS:
        return origin_sizes(kind, kept, entry.numel)
    if entry.plane_ones:
        bits, found = _coded_planes(entry)[kind]
        return get_codec(PLANE_CODEC).sizes((bits,), found)
    size = -(-kept // 8)
    return range(size if kind in ("sign", "coat2") else 0, size + 1)  # a later coat is about those in the one before


def expanding(entry: TensorSpec) -> int:
    """Return how many bits a mask, and planes, of almost no bytes may stand for."""
    of_mask = entry.numel if entry.fixed is not None or get_codec(entry.encoding).expands else 0
    return of_mask + sum(bits for bits, _ in _coded_planes(entry).values())


def recoded(entry: TensorSpec, encoding: str, planes: Mapping[str, Packed]) -> TensorSpec:
    """Return the entry of a mask in another encoding. At the entropy limit, planes are coded too if that saves bytes.

    Args:
        planes: by kind, as `planes.Bits` has them.
    """
    entry = replace(entry, encoding=encoding, plane_ones=())
    if not get_codec(encoding).expands:
        return entry
    coded = replace(entry, plane_ones=tuple(ones(planes[kind]) for kind in of_bits(planes)))
    before, after = (sum(map(len, encode_planes(each, planes).values())) for each in (entry, coded))
    return coded if before - after >= SAVING else entry


def encode_planes(entry: TensorSpec, planes: Mapping[str, Packed]) -> dict[str, Bytes]:
    """Return the bytes of each plane."""
    codec, found = get_codec(PLANE_CODEC), dict(planes)
    for kind, (bits, count) in _coded_planes(entry).items():
        found[kind] = codec.to_bytes(planes[kind], (bits,), count)
    return found


def decode_planes(entry: TensorSpec, data: Mapping[str, Packed]) -> dict[str, Packed]:
    """Return the planes as `planes.Bits` has them, of their bytes. What may be as good as empty is checked here.

    Raises:
        ArtifactError: no plane has these bytes, or not one with as many ones.
    """
    found = dict(data)
    for kind, (bits, count) in _coded_planes(entry).items():
        name = f"{entry.name}.{kind}"
        found[kind] = _decode(name, get_codec(PLANE_CODEC), data[kind], (bits,), count)
        if ones(found[kind]) != count:
            raise ArtifactError(f"{name!r} has {ones(found[kind])} ones; expected {count}, as plane_ones says")
    for kind in (kind for kind in ORIGIN_KINDS if kind in data):
        try:
            check_origins(kind, data[kind], entry.kept or 0, entry.numel)
        except ValueError as error:
            raise ArtifactError(f"'{entry.name}.{kind}' {error}") from error
    return found


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
    packed = _decode(f"{entry.name}.mask", codec, data, *_coded(entry), entry.pattern)
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


def _decode(name: str, codec: Codec, data: Bytes, shape: Shape, kept: int, pattern: Pattern | None = None) -> Packed:
    try:
        return codec.to_bits(data, shape, kept, pattern)
    except ValueError as error:
        raise ArtifactError(f"{name!r} {error}") from error


def _coded_planes(entry: TensorSpec) -> dict[str, tuple[int, int]]:
    """Return how many bits each coded plane has, and how many of them are 1."""
    return counts(entry.planes, entry.kept or 0, entry.plane_ones) if entry.plane_ones else {}


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
