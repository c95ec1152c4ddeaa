"""The codec type, and the registry of codecs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import unknown

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """An encoding of masks: from packed bits to bytes and back, for a weight of a given shape.

    The bits are packed as `codecs.bitpack` packs them: uint8 [ceil(n / 8)] for a shape of n elements.

    Attributes:
        name: what the manifest calls it, under `encoding`.
        encode: turns bits and a shape into bytes, uint8 [size]. Different bits give different bytes.
        decode: turns bytes, which may come from an untrusted file, and a shape into bits. It raises ValueError for
            bytes that `encode` does not write; its message is appended to the tensor's name.
        bound: gives the possible numbers of bytes for the mask of a shape. It is called before anything is allocated,
            so it must not accept a file that is much smaller than the bits decoded from it.
    """

    name: str
    encode: Callable[[Bytes, Shape], Bytes]
    decode: Callable[[Bytes, Shape], Bytes]
    bound: Callable[[Shape], range]


CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Register `codec` under its name; `ValueError` if the name is taken."""
    if codec.name in CODECS:
        raise ValueError(f"the codec {codec.name!r} is registered already")
    CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """Return the codec called `name`; `UnknownName` lists the nearest."""
    if not isinstance(name, str) or name not in CODECS:
        raise unknown("codec", name, CODECS)
    return CODECS[name]
