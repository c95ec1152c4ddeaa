"""An ONNX file that this library wrote, run by ONNX Runtime."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact.about import About, read_about
from ..artifact.container import HEADER_LIMIT, open_file, what_is
from ..artifact.kinds import is_onnx
from ..artifact.reader import naming
from ..errors import ArtifactError, ConversionError
from .needed import needed

ABOUT = "popup_surgery_export"  # key of the metadata of an ONNX file
METADATA_PROPS = 14  # this field's number in onnx.proto
FIELDS = 10_000  # of one message; a model has some for its graph and opsets, and one for each key of the metadata
FLOATS = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """An ONNX file that `export` wrote, from `OnnxFile.open(path)`.

    Attributes:
        path: the file's path, as given.
        manifest: what the file says about its network.
    """

    path: str | Path
    manifest: About = field(repr=False)
    _network: "OnnxNetwork" = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, shown: str | Path | None = None) -> "OnnxFile":
        """Open a file in ONNX Runtime.

        Args:
            path: a file on this machine.
            shown: what messages call it, if not `path`.

        Raises:
            ArtifactError: `export` did not write it, or it is damaged.
            PopupError: ONNX Runtime is missing or too old.
        """
        shown = path if shown is None else shown
        with naming(shown):
            with open_file(path) as file:
                if not is_onnx(file.read(16)):
                    raise ArtifactError(f"this is not an ONNX file: {what_is(path)}")
                text = _metadata(file).get(ABOUT)
            if text is None:
                raise ArtifactError("popup-surgery export did not write this ONNX file; expected one that it wrote")
            about = read_about(text, ABOUT)
            network = OnnxNetwork(str(path))  # ONNX Runtime sees only files that say they are this library's
        return cls(shown, about, network)

    def network(self, *, base: object = None) -> nn.Module:
        """Return the network, which runs on the CPU. Raises `ArtifactError` if there is a `base`."""
        if base is not None:
            raise ArtifactError(f"{self.path}: a base was given, and an ONNX file has all of its weights")
        return self._network


class OnnxNetwork(nn.Module):
    """A network in ONNX Runtime that takes and returns torch's tensors. It has one input, and runs on the CPU."""

    def __init__(self, source: str | bytes) -> None:
        super().__init__()
        self.session = open_session(source)
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # code asks a network's parameters for a device
        given = self.session.get_inputs()
        if len(given) != 1:
            raise ArtifactError(f"the ONNX graph has {len(given)} inputs; expected one")
        self.input_name, sizes, self.dtype = given[0].name, given[0].shape[1:], FLOATS.get(given[0].type)
        self.input_size = tuple(sizes) if len(sizes) == 3 and all(type(size) is int for size in sizes) else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the first output, on the device of `inputs`; an `ArtifactError` if it has not one row for each."""
        output = self.outputs(inputs)[0]
        if not output.ndim or len(output) != len(inputs):
            raise ArtifactError(
                f"the ONNX graph returns {' × '.join(map(str, output.shape)) or 'one number'} for {len(inputs)} inputs"
            )
        return output.to(inputs.device)

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return all outputs. Raises `ArtifactError` if ONNX Runtime does not take the inputs, or fails."""
        if self.dtype is not None and inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        try:
            found = self.session.run(None, {self.input_name: inputs.detach().cpu().numpy()})
            return [torch.from_numpy(np.asarray(each, order="C")) for each in found]
        except Exception as error:  # the runtime's errors have no class of their own, and it may return text
            shape = " × ".join(map(str, inputs.shape))
            why = " ".join(str(error).split())[:300]
            raise ArtifactError(f"ONNX Runtime cannot run it on an input of {shape}: {why}") from error


def written(contents: bytes) -> OnnxNetwork:
    """Return the network in an ONNX file that is about to be written.

    Raises:
        ConversionError: ONNX Runtime does not take it.
    """
    try:
        return OnnxNetwork(contents)
    except ArtifactError as error:
        raise ConversionError(f"nothing was written: {error}") from error


def open_session(source: str | bytes) -> Any:
    """Return ONNX Runtime's session of a file or its bytes, on the CPU, with as many threads as torch uses.

    Raises:
        ArtifactError: the runtime does not take it.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # the runtime's errors have no class of their own
        why = " ".join(str(error).split())[:300]
        raise ArtifactError(f"ONNX Runtime {runtime.__version__} cannot open it: {why}") from error


def described(about: About, classes: list[str], preparation: dict[str, Any] | None) -> dict[str, str]:
    """Return the metadata of an ONNX file.

    Args:
        classes: names of the outputs, if the file has them.
        preparation: how an image becomes the input, if it is known.
    """
    metadata = {ABOUT: about.text()}
    if classes:
        metadata["classes"] = json.dumps(classes, ensure_ascii=False)
    if preparation is not None:
        metadata["preparation"] = json.dumps(preparation)
    return metadata


def _metadata(file: BinaryIO) -> dict[str, str]:
    """Read the metadata of an ONNX file alone: no graph, and no weights.

    Raises:
        ArtifactError: the file is damaged, or has more metadata than the header of an artifact may have.
    """
    found = {}
    for start, stop in _messages(file, 0, file.seek(0, os.SEEK_END), METADATA_PROPS):
        if stop - start > HEADER_LIMIT:
            raise ArtifactError(f"its metadata has {stop - start:,} bytes; expected at most {HEADER_LIMIT:,}")
        pair = []
        for field_number in (1, 2):  # key, value
            texts = [_text(file, *place) for place in _messages(file, start, stop, field_number)]
            pair.append(texts[-1] if texts else "")
        found[pair[0]] = pair[1]
    return found


def _text(file: BinaryIO, start: int, stop: int) -> str:
    file.seek(start)
    return file.read(stop - start).decode(errors="replace")


def _messages(file: BinaryIO, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Yield where the texts and messages with one number are among the fields of a protobuf message.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    place = start
    for _ in range(FIELDS):
        if place == stop:
            return
        file.seek(place)
        tag = _varint(file)
        kind = tag & 7
        if kind == 0:
            _varint(file)
        length = {0: 0, 1: 8, 2: 0, 5: 4}.get(kind, -1) if kind != 2 else _varint(file)
        begin = file.tell()
        place = begin + length
        if length < 0 or place > stop:
            raise ArtifactError("this ONNX file is damaged, or cut off")
        if kind == 2 and tag >> 3 == wanted:
            yield begin, place
    raise ArtifactError(f"this is no ONNX file of popup-surgery: a part of it has more than {FIELDS:,} fields")


def _varint(file: BinaryIO) -> int:
    """Read one of protobuf's numbers: 7 bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ArtifactError("this ONNX file is damaged, or cut off")
