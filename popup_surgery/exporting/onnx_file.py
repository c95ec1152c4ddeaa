"""An ONNX file that this library wrote, run by ONNX Runtime."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact.about import About, read_about
from ..artifact.container import open_file, what_is
from ..artifact.kinds import is_onnx
from ..artifact.reader import naming
from ..errors import ArtifactError
from .needed import needed

ABOUT = "popup_surgery_export"  # key of the metadata of an ONNX file


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
            network = OnnxNetwork(str(path))
            text = network.session.get_modelmeta().custom_metadata_map.get(ABOUT)
            if text is None:
                raise ArtifactError("popup-surgery export did not write this ONNX file; expected one that it wrote")
            about = read_about(text, ABOUT)
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
        self.input_name, sizes = given[0].name, given[0].shape[1:]
        self.input_size = tuple(sizes) if len(sizes) == 3 and all(type(size) is int for size in sizes) else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the first output, on the device of `inputs`."""
        return self.outputs(inputs)[0].to(inputs.device)

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return all outputs."""
        found = self.session.run(None, {self.input_name: inputs.detach().cpu().numpy()})
        return [torch.from_numpy(np.ascontiguousarray(each)) for each in found]


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
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
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
