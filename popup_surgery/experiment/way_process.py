"""One way to run a file's network, in a process of its own, which tells how much memory and time it takes.

The two sides talk in lines of JSON. The first describes the network, and is answered by the memory that it takes. Each
further one is a number of inputs, and is answered by the seconds of a pass.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import Artifact, load
from ..artifact.probe import probe_input
from ..errors import PopupError
from ..exporting.needed import needed
from ..exporting.onnx_file import OnnxNetwork
from ..exporting.program import outputs_of
from ..models.build import build_meta
from ..plugins import load_plugins, loaded_plugins
from .machine import memory

TURN = 0.1  # seconds: a turn of a way has as many passes as fit, and at least one
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from popup_surgery.experiment import way_process as way; "
    "way.answer()"
)


class WayProcess:
    """The process of one way. It begins to import at once; `open` tells it what to run. It ends with the `with` block.

    Args:
        errors: file for whatever it writes on stderr.
    """

    def __init__(self, errors: Path) -> None:
        with errors.open("w") as file:
            # a session of its own: a Ctrl-C reaches this process alone, which then ends that one
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
            )  # fmt: skip
        self._errors = errors

    def __enter__(self) -> "WayProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def open(
        self, file: Path, way: str, shape: Sequence[int], batches: Sequence[int], threads: int, outputs: Path, base: str
    ) -> dict[str, Any]:
        """Open the network, run it once with each number of inputs, and return the memory that this took.

        Args:
            file: the artifact or the ONNX file.
            way: `pytorch`, `pytorch_packed`, or `onnx` for any ONNX file.
            shape: of one input, without the batch.
            batches: numbers of inputs, in ascending order.
            outputs: the outputs for the least of them are written here, as NumPy does.
            base: file of the pretrained weights under the mask, or empty.

        Returns:
            `held`: bytes by which the process has grown once the first pass is over and free memory was returned, or
            None where the system does not tell; `peaks`: for each number of inputs the bytes by which its peak has
            grown.

        Raises:
            PopupError: the network cannot be opened or run.
        """
        order = {
            "file": str(file), "way": way, "shape": [*shape], "batches": [*batches], "threads": threads,
            "outputs": str(outputs), "base": base, "plugins": [*loaded_plugins()],
        }  # fmt: skip
        found: dict[str, Any] = self._ask(order)
        return {"held": found["held"], "peaks": {int(batch): peak for batch, peak in found["peaks"].items()}}

    def seconds(self, batch: int) -> float:
        """Return the seconds of a pass with that many inputs.

        Raises:
            PopupError: it failed.
        """
        return float(self._ask(batch))

    def _ask(self, question: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            last = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
            how = f"was ended by signal {-code}, as happens where memory runs out" if code < 0 else "ended"
            raise PopupError(": ".join([f"its process {how}", *last]))
        found = json.loads(line)
        if "refused" in found:
            raise PopupError(found["refused"])
        return found["answer"]


def answer() -> None:
    """Answer the questions of a `WayProcess` on stdin, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing which a library prints stands among the answers
    network, inputs = nn.Module(), dict[int, Tensor]()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if isinstance(question, dict):
                network, inputs, found = _opened(**question)
                _tell(answers, answer=found)
            else:
                _tell(answers, answer=_seconds(network, inputs[question]))
        except PopupError as error:
            _tell(answers, refused=str(error))
        except Exception as error:  # a network and a runtime may raise anything
            _tell(answers, refused=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _tell(answers: TextIO, **line: Any) -> None:
    print(json.dumps(line), file=answers, flush=True)


def _opened(
    file: str,
    way: str,
    shape: list[int],
    batches: list[int],
    threads: int,
    outputs: str,
    base: str,
    plugins: list[str],
) -> tuple[nn.Module, dict[int, Tensor], dict[str, Any]]:
    """Return a network, its inputs by their number, and the memory that it took. See `WayProcess.open`."""
    torch.set_num_threads(threads)
    load_plugins(plugins)
    if way == "onnx":
        needed("onnxruntime")
    else:
        build_meta(Artifact.open(file).manifest.architecture)  # imports the library
    inputs = {batch: probe_input(0, (batch, *shape)) for batch in batches}
    before = memory(trim=True, forget=True)
    network = OnnxNetwork(file) if way == "onnx" else load(file, base=base or None, packed=way == "pytorch_packed")
    inputs = {batch: given.to(_dtype(network)) for batch, given in inputs.items()}
    held, peaks = None, dict.fromkeys(batches)
    for batch, given in inputs.items():
        found = outputs_of(network, given)[0]
        if batch == batches[0]:
            np.save(outputs, found.float().numpy())
        del found
        if before is not None and (now := memory(trim=held is None)) is not None:
            held = now.now - before.now if held is None else held
            peaks[batch] = now.peak - before.peak
    return network, inputs, {"held": held, "peaks": peaks}


def _dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's inputs."""
    if isinstance(network, OnnxNetwork):
        return torch.float64 if network.session.get_inputs()[0].type == "tensor(double)" else torch.float32
    tensors = (*network.parameters(), *network.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _seconds(network: nn.Module, inputs: Tensor) -> float:
    with torch.inference_mode():
        began, count = time.perf_counter(), 0
        while True:
            network(inputs)
            count += 1
            if (taken := time.perf_counter() - began) >= TURN:
                return taken / count
