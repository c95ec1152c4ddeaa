"""Open whatever file has a network: an artifact, dense weights, an ONNX file."""

from pathlib import Path

from ..artifact import Artifact
from ..artifact.container import open_file
from ..artifact.kinds import is_onnx
from ..artifact.reader import naming
from ..errors import ArtifactError
from ..exporting.onnx_file import OnnxFile
from .dense import Dense, open_dense

Opened = Artifact | Dense | OnnxFile


def open_result(source: str | Path | Opened) -> Opened:
    """Open a popup artifact, or dense weights or an ONNX file that this library wrote. The file is treated as hostile.

    Raises:
        ArtifactError: the file is none of these. The message says what it is.
    """
    if isinstance(source, Opened):
        return source
    try:
        return Artifact.open(source)
    except ArtifactError:
        if _is_onnx(source):
            return OnnxFile.open(source)
        if (found := open_dense(source)) is None:
            raise
        return found


def _is_onnx(path: str | Path) -> bool:
    with naming(path), open_file(path) as file:
        return is_onnx(file.read(16))
