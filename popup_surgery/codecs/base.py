"""What a codec is, and the registry of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import unknown

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """One way to write the mask of a weight of some shape: bits to bytes and back.

    The bits are packed as `codecs.bitpack` packs them: uint8 [ceil(n / 8)] for a shape of n elements.

    Attributes:
        name: what the manifest calls it, under `encoding`.
        encode: from bits and a shape to bytes, uint8 [size]; other bits give other bytes.
        decode: from bytes, which may be a stranger's, and a shape to the bits. It raises ValueError for bytes that
            `encode` does not write, with a message that follows the tensor's name.
        bound: how many bytes the mask of a shape can have. It is asked before anything is allocated, so let in no file
            that is much smaller than the bits that come out of it.
    """

    name: str
    encode: Callable[[Bytes, Shape], Bytes]
    decode: Callable[[Bytes, Shape], Bytes]
    bound: Callable[[Shape], range]


CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Make `codec` known by its name; a name that is taken fails at once."""
    if codec.name in CODECS:
        raise ValueError(f"the codec {codec.name!r} is registered already")
    CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """The codec called `name`; `UnknownName` lists the nearest."""
    if not isinstance(name, str) or name not in CODECS:
        raise unknown("codec", name, CODECS)
    return CODECS[name]
