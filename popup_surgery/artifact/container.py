"""Read a safetensors file without trusting it: header first, and memory only for bytes that the file really has."""

import math
import os
from dataclasses import dataclass
from io import UnsupportedOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from ..errors import ArtifactError
from ..hub import is_address, suggestion
from .kinds import ARTIFACT, METADATA, folder_kind, other_kind, safetensors_kind
from .strict_json import parse

if TYPE_CHECKING:
    from ..hub.files import HubFile

HEADER_LIMIT = 16 << 20
DIMENSIONS_LIMIT = 64  # the same limit as in NumPy and PyTorch

# safetensors' names of dtypes
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: dtype (safetensors' name), shape, and the range of its bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The checked header of any safetensors file: its metadata, its tensors by name, the data's offset in bytes."""

    metadata: Any
    tensors: dict[str, Stored]
    data_start: int


@dataclass(frozen=True)
class Container:
    """A checked header: the manifest's text, the tensors by name, the data's offset in bytes, and the file's stamp."""

    manifest: str
    tensors: dict[str, Stored]
    data_start: int
    stamp: tuple[int, int, int]


def element_count(shape: Any, what: str) -> int:
    """Return the number of elements of a shape from a file, after checking that each size is a non-negative integer."""
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_LIMIT:
        raise ArtifactError(f"{what}: the shape is not a list of at most {DIMENSIONS_LIMIT} sizes")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ArtifactError(f"{what}: the shape is {shape}; expected integers from 0")
    return math.prod(shape)


def read_header(file: BinaryIO) -> Container:
    """Read and check the header alone, from the beginning of `file`.

    Raises:
        ArtifactError: the file is not a safetensors file, or does not hold one popup artifact and nothing else.
    """
    header = read_safetensors(file)
    metadata = header.metadata
    if not isinstance(metadata, dict) or list(metadata) != [METADATA] or not isinstance(metadata[METADATA], str):
        raise ArtifactError(f"this is not a popup artifact: {safetensors_kind(metadata, header.tensors)}")
    return Container(metadata[METADATA], header.tensors, header.data_start, stamp_of(file))


def read_safetensors(file: BinaryIO) -> Header:
    """Read and check the header of any safetensors file, from the beginning of `file`.

    Raises:
        ArtifactError: the file is not a safetensors file, or damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        if kind := other_kind(prefix + file.read(248)):
            raise ArtifactError(f"this is not a safetensors file: {kind}")
        raise ArtifactError(
            f"the file ends before its header does ({size} bytes); it is truncated, or not a safetensors file"
        )
    if length > HEADER_LIMIT:
        raise ArtifactError(f"the header has {length:,} bytes; expected at most {HEADER_LIMIT:,}")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the header is not UTF-8 (byte {error.start})") from None
    header = parse(text, "the header")
    del text
    if not isinstance(header, dict):
        raise ArtifactError("the header is not a JSON object; expected a safetensors file")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry) for name, entry in header.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ArtifactError(f"tensor {name!r} begins at byte {tensor.start} of the data; expected {end}")
        end = tensor.stop
    if end != size - 8 - length:
        raise ArtifactError(f"the data has {size - 8 - length} bytes, the tensors need {end}; the file is damaged")
    return Header(metadata, tensors, 8 + length)


def _stored(name: str, entry: Any) -> Stored:
    """Check one tensor's entry in the header."""
    what = f"tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{what}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"{what}: the dtype is {str(dtype)[:40]!r}; expected one of {', '.join(DTYPES)}")
    count = element_count(shape, what)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise ArtifactError(f"{what}: data_offsets are not two integers from 0")
    start, stop = offsets
    if stop - start != count * DTYPES[dtype].itemsize:
        raise ArtifactError(
            f"{what}: {stop - start} bytes lie there; {dtype} {shape} needs {count * DTYPES[dtype].itemsize}"
        )
    return Stored(dtype, tuple(shape), start, stop)


def stamp_of(file: BinaryIO) -> tuple[int, int, int]:
    """Return a file's inode, size and modification time, which change when it is replaced or written to.

    All are zero for a file on the Hub: there is only one with its address.
    """
    try:
        found = os.fstat(file.fileno())
    except UnsupportedOperation:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def located(path: "str | Path | HubFile") -> "str | Path | HubFile":
    """Find the file of an address on the Hub, at one commit. Other paths are returned unchanged.

    Raises:
        ArtifactError: it is neither a path nor an address.
        HubError: the file cannot be found, or not be read.
    """
    if not isinstance(path, str | Path) and not hasattr(path, "download"):
        what = f"a {type(path).__name__}" if isinstance(path, nn.Module) else f"{' '.join(repr(path).split()):.80}"
        raise ArtifactError(f"{what} is no file; expected a path, or an address on the Hub such as hf://user/repo")
    if not is_address(path):
        return path
    from ..hub.files import locate

    return locate(str(path))


def local(path: "str | Path | HubFile") -> str | Path:
    """Return a file on this machine, downloaded into huggingface_hub's cache if it is one of the Hub.

    Raises:
        HubError: it cannot be downloaded.
        ArtifactError: it is no whole safetensors file, by its header and the size that the Hub states.
    """
    path = located(path)
    if isinstance(path, str | Path):
        return path
    if path.cached is None:
        with path.open() as file:
            read_safetensors(file)
    return path.download()


def open_file(path: "str | Path | HubFile") -> BinaryIO:
    """Open `path` for reading bytes. If that fails, an `ArtifactError` says why.

    Of a file on the Hub that is not in the cache, only what is read is fetched.
    """
    path = located(path)
    if not isinstance(path, str | Path):
        return path.open()
    try:
        if Path(path).is_dir():
            raise ArtifactError(f"this is {folder_kind(Path(path))}; expected a file")
        if not Path(path).is_file():
            there = Path(path).exists()
            raise ArtifactError("this is not a file" if there else f"the file does not exist{suggestion(path)}")
        return open(path, "rb")
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}") from error


def what_is(path: str | Path) -> str:
    """Return what a file or folder is, and what takes it."""
    if not is_address(path) and Path(path).is_dir():
        return folder_kind(Path(path))
    with open_file(path) as file:
        if kind := other_kind(file.read(256)):
            return kind
        file.seek(0)
        try:
            header = read_safetensors(file)
        except ArtifactError as error:
            return f"a file that no command takes: {error}"
    if isinstance(header.metadata, dict) and list(header.metadata) == [METADATA]:
        return ARTIFACT
    return safetensors_kind(header.metadata, header.tensors)
