"""The Xet store of the local Hub (`hub_server`): xorbs, shards and reconstructions, as hf_xet sends and asks for them.

The formats are those of huggingface.co/docs/xet: a xorb is a run of chunks, each behind a header of eight bytes, and a
shard says which chunks of which xorbs make up a file.
"""

import struct
from dataclasses import dataclass, field
from typing import Any

NONE, LZ4, GROUPED_LZ4 = range(3)
ENTRY = 48  # bytes of every record of a shard
VERIFIED, WITH_METADATA = 1 << 31, 1 << 30


def hexed(digest: bytes) -> str:
    """A Xet hash as text: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def unpack_block(source: bytes, out: bytearray) -> None:
    """Append what a block of LZ4 stands for."""
    at = 0
    while at < len(source):
        token = source[at]
        at += 1
        count = token >> 4
        if count == 15:
            while True:
                count += source[at]
                at += 1
                if source[at - 1] != 255:
                    break
        out += source[at : at + count]
        at += count
        if at >= len(source):
            return
        back = source[at] | source[at + 1] << 8
        at += 2
        count = (token & 15) + 4
        if count == 19:
            while True:
                count += source[at]
                at += 1
                if source[at - 1] != 255:
                    break
        start = len(out) - back
        while count > 0:  # a copy may overlap itself
            piece = out[start : start + count]
            out += piece
            count -= len(piece)


def unpack_frame(source: bytes) -> bytes:
    """What a frame of LZ4 stands for."""
    if source[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("not an LZ4 frame")
    flags = source[4]
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    out = bytearray()
    while size := int.from_bytes(source[at : at + 4], "little"):
        at += 4
        length = size & 0x7FFFFFFF
        block = source[at : at + length]
        if size >> 31:
            out += block
        else:
            unpack_block(block, out)
        at += length + 4 * bool(flags & 16)
    return bytes(out)


def ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    out, at = bytearray(len(data)), 0
    for group in range(4):
        size = len(range(group, len(data), 4))
        out[group::4] = data[at : at + size]
        at += size
    return bytes(out)


@dataclass
class Xorb:
    """Chunks as they were uploaded; `starts` has the place of each chunk's header, and one more."""

    data: bytes
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        at = 0
        while at + 8 <= len(self.data) and self.data[at] == 0:  # a footer, if there is one, begins with a letter
            self.starts.append(at)
            self.sizes.append(int.from_bytes(self.data[at + 5 : at + 8], "little"))
            at += 8 + int.from_bytes(self.data[at + 1 : at + 4], "little")
        self.starts.append(at)

    def chunk(self, index: int) -> bytes:
        start, end = self.starts[index : index + 2]
        scheme, packed = self.data[start + 4], self.data[start + 8 : end]
        if scheme == NONE:
            return packed
        plain = unpack_frame(packed)
        return ungrouped(plain) if scheme == GROUPED_LZ4 else plain


@dataclass
class Term:
    """Chunks `start` to `end` of a xorb."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass
class Stored:
    """A file: its terms, and the SHA-256 that the shard gave for it."""

    terms: list[Term]
    sha256: str

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


class XetStore:
    def __init__(self) -> None:
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, Stored] = {}

    def by_sha256(self, sha256: str) -> str | None:
        return next((name for name, file in self.files.items() if file.sha256 == sha256), None)

    def add_shard(self, data: bytes) -> None:
        """Register the files of a shard. Raises ValueError if a xorb is missing."""
        at = ENTRY  # the header: 32 bytes of a tag, a version and the size of a footer
        while data[at : at + 32] != b"\xff" * 32:
            name = hexed(data[at : at + 32])
            flags, count = struct.unpack_from("<II", data, at + 32)
            at += ENTRY
            terms = []
            for index in range(count):
                place = at + index * ENTRY
                xorb = hexed(data[place : place + 32])
                _, size, start, end = struct.unpack_from("<IIII", data, place + 32)
                if xorb not in self.xorbs:
                    raise ValueError(f"no xorb {xorb}")
                terms.append(Term(xorb, start, end, size))
            at += count * ENTRY * (2 if flags & VERIFIED else 1)
            sha256 = ""
            if flags & WITH_METADATA:
                sha256 = hexed(data[at : at + 32])
                at += ENTRY
            self.files[name] = Stored(terms, sha256)

    def content(self, name: str) -> bytes:
        """A file's bytes."""
        return b"".join(
            self.xorbs[term.xorb].chunk(index)
            for term in self.files[name].terms
            for index in range(term.start, term.end)
        )

    def reconstruction(self, name: str, first: int, last: int | None, url: str) -> dict[str, Any] | None:
        """How to put together the bytes from `first` to `last` of a file; None if it ends before. `url`: of xorbs."""
        file = self.files[name]
        if first >= file.size:
            return None
        terms: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        at = skipped = 0
        for term in file.terms:
            if at + term.size <= first:
                at += term.size
                continue
            if last is not None and at > last:
                break
            if not terms:
                skipped = first - at
            at += term.size
            xorb = self.xorbs[term.xorb]
            span = {"start": term.start, "end": term.end}
            terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": span})
            bytes_ = {"start": xorb.starts[term.start], "end": xorb.starts[term.end] - 1}
            places = fetch.setdefault(term.xorb, [])
            if not any(place["range"] == span for place in places):
                places.append({"range": span, "url": f"{url}/{term.xorb}", "url_range": bytes_})
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch}
