"""Open whatever file has a network: an artifact, dense weights, an ONNX file."""

from pathlib import Path

from ..artifact import Artifact
from ..artifact.container import located, open_file
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
        HubError: the file is on the Hub, and cannot be read.
    """
    if isinstance(source, Opened):
        return source
    file = located(source)
    try:
        return Artifact.open(file)
    except ArtifactError:
        with naming(file), open_file(file) as start:
            onnx = is_onnx(start.read(16))
        if onnx:
            return OnnxFile.open(file if isinstance(file, str | Path) else file.download(), shown=source)
        if (found := open_dense(file)) is None:
            raise
        return found
