"""The codec type, and the registry of codecs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnknownName
from ..selection.pattern import Pattern

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
        needs_kept: whether the three also take the number of ones, as their last argument. `bound` may then accept a
            file that is smaller than the bits: they are decoded only after the shape has matched a network's, or if
            there are at most 2³³ of them in the file.
        needs_pattern: whether the three take the weight's pattern, such as 2:4, as their last argument. The codec is
            for weights that have one, and `bound` may accept small files in the same way.
    """

    name: str
    encode: Callable[..., Bytes]
    decode: Callable[..., Bytes]
    bound: Callable[..., range]
    needs_kept: bool = False
    needs_pattern: bool = False

    @property
    def expands(self) -> bool:
        """Whether a file may be much smaller than the bits in it."""
        return self.needs_kept or self.needs_pattern

    def to_bytes(self, packed: Bytes, shape: Shape, kept: int, pattern: Pattern | None = None) -> Bytes:
        """Return the bytes of a mask that has `kept` ones."""
        return self.encode(packed, shape, *self._more(kept, pattern))

    def to_bits(self, data: Bytes, shape: Shape, kept: int, pattern: Pattern | None = None) -> Bytes:
        """Return the packed mask whose bytes these are; `ValueError` if no mask has them."""
        return self.decode(data, shape, *self._more(kept, pattern))

    def sizes(self, shape: Shape, kept: int, pattern: Pattern | None = None) -> range:
        """Return the possible numbers of bytes for a mask of a shape that has `kept` ones."""
        return self.bound(shape, *self._more(kept, pattern))

    def _more(self, kept: int, pattern: Pattern | None) -> list[Any]:
        return [kept] * self.needs_kept + [pattern] * self.needs_pattern


CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Register `codec` under its name; `ValueError` if the name is taken."""
    if codec.name in CODECS:
        raise ValueError(f"the codec {codec.name!r} is registered already")
    CODECS[codec.name] = codec


def get_codec(name: str) -> Codec:
    """Return the codec called `name`; `UnknownName` lists all."""
    if not isinstance(name, str) or name not in CODECS:
        raise UnknownName(f"unknown encoding {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]
