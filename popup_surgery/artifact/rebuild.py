"""Rebuild weights from a seed and a mask, and compute digests over them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.bitpack import pack, unpack
from ..weights.fill import rounded
from ..weights.source import source_of
from ..weights.streams import BITS, CHUNK, SIGNS, draw, words
from .container import DTYPES, Stored
from .manifest import TensorSpec
from .planes import Bits, Packed


def generated_pieces(entry: TensorSpec, seed: int) -> Iterator[NDArray[np.float32]]:
    """Yield the values of an unmasked tensor, in pieces of float32."""
    return draw(entry.distribution, entry.numel, entry.std, seed, "other", entry.stream)


def effective_pieces(
    entry: TensorSpec, seed: int, bits: Bits, base: Tensor | None = None
) -> Iterator[NDArray[np.float32]]:
    """Yield effective weights in pieces of float32: the drawn or `base` weight where the bit is 1, +0.0 elsewhere.

    If there are planes, they change the weights that take part.
    """
    if entry.distribution == "signed_constant" and not bits.planes:
        yield from _signed_pieces(entry, seed, bits.mask)
        return
    origins = bits.origins(entry.numel)
    weights = source_of(entry.distribution).values(entry.numel, entry.std, seed, entry.stream, base, origins)
    if bits.planes:
        dtype = DTYPES[entry.dtype]
        if dtype.itemsize < 4:  # rounded before the product too, as in a network of that dtype
            weights = (rounded(piece, dtype).float().numpy() for piece in weights)
        yield from bits.effective(weights)
        return
    for piece, ones in zip(weights, unpack(bits.mask, entry.numel), strict=True):
        yield (piece.view(np.uint32) & ones).view(np.float32)  # a bitwise AND, so that no −0.0 comes out


def _signed_pieces(entry: TensorSpec, seed: int, mask: Packed) -> Iterator[NDArray[np.float32]]:
    """As `effective_pieces`, but four weights at once, from half a byte of signs and half a byte of the mask."""
    # Row 16 · mask + signs of `four` has the four weights for these half bytes, lowest bit first. A mask's byte 0x63
    # and the signs' byte 0xA6 give the rows 0x36 and 0x6A. Of 0x36 the mask 3 is 1 1 0 0 and the signs 6 are − + + −:
    # −std +std 0 0. Of 0x6A the mask 6 is 0 1 1 0 and the signs A are − + − +: 0 +std −std 0.
    signs, kept = np.tile(BITS[:16, :4], (16, 1)), np.repeat(BITS[:16, :4], 16, axis=0)
    four = np.where(kept, np.where(signs, np.float32(entry.std), np.float32(-entry.std)), np.float32(0))
    for start, rows in zip(range(0, entry.numel, CHUNK), _rows(entry, seed, mask), strict=True):
        yield np.take(four, rows, axis=0).reshape(-1)[: entry.numel - start]


def _rows(entry: TensorSpec, seed: int, mask: Packed) -> Iterator[Packed]:
    """Yield 16 · mask + signs of four signed constants in each byte, in pieces."""
    generator = words(seed, "weight", entry.stream)
    for start in range(0, entry.numel, CHUNK):
        count = min(CHUNK, entry.numel - start)
        bits = mask[start // 8 : -(-(start + count) // 8)]
        raw = generator.random_raw(-(-count // 64)).astype("<u8", copy=False).view(np.uint8)[: len(bits)]
        yield np.stack([bits << 4 | raw & 15, bits & 240 | raw >> 4], axis=1).reshape(-1)


WITH_SIGNS = ((), ("sign",))  # with which planes `codes` takes constants


def codes(entry: TensorSpec, seed: int, bits: Bits) -> Packed:
    """Return constants under a mask as bits, for `masking.ternary.unpack`: uint8 [ceil(n / 4)], four in each byte.

    The high half of a byte says which are kept, the low half which are positive; lowest bit first.
    """
    out = np.empty(-(-entry.numel // 4), np.uint8)
    mask = bits.mask
    pieces: Iterable[Packed]
    if "sign" in bits.planes or entry.distribution in SIGNS.values():
        signs = bits.spread("sign", entry.numel) if bits.planes else _positive(entry, seed)
        pieces = [np.stack([mask << 4 | signs & 15, mask & 240 | signs >> 4], axis=1).reshape(-1)]
    elif entry.distribution == "signed_constant":
        pieces = _rows(entry, seed, mask)
    else:
        pieces = [np.stack([mask << 4 | 15, mask | 15], axis=1).reshape(-1)]
    start = 0
    for piece in pieces:
        piece = piece[: len(out) - start]
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out


def _positive(entry: TensorSpec, seed: int) -> Packed:
    """Return which drawn weights are positive, packed."""
    values = source_of(entry.distribution).values(entry.numel, entry.std, seed, entry.stream, None)
    return np.concatenate([pack(piece > 0) for piece in values])


def weights_digest(entries: list[tuple[TensorSpec, Bits]], seed: int, base: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the effective weights, rounded to their dtype and widened to float32.

    Args:
        base: the pretrained weights by name.
    """
    digest = hashlib.sha256()
    for entry, bits in entries:
        for piece in effective_pieces(entry, seed, bits, base.get(entry.name)):
            widened = rounded(piece, DTYPES[entry.dtype]).float()
            digest.update(widened.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def masks_digest(masks: list[Packed]) -> str:
    """Return the SHA-256 over the packed masks, one after another."""
    digest = hashlib.sha256()
    for mask in masks:
        digest.update(mask.data)
    return digest.hexdigest()


def tensors_digest(tensors: dict[str, tuple[str, tuple[int, ...], memoryview]]) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of each tensor that is not a mask, sorted by name."""
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(tensors.items()):
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def stored_tensor(stored: Stored, data: memoryview) -> Tensor:
    """Return a stored tensor over its bytes of the file."""
    if not len(data):
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[stored.dtype]).view(stored.shape)
