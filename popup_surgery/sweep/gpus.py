"""The GPUs of this machine: their names, and several runs on one of them."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import PopupError
from .grid import Run


def gpus() -> list[str]:
    """Return the name, as in CUDA_VISIBLE_DEVICES, of each GPU that this process sees."""
    import torch

    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]


def environment(run: Run, place: int) -> dict[str, str]:
    """Return the environment of a run's process: the run's threads, and the GPU of its place."""
    found = gpus()
    gpu = {"CUDA_VISIBLE_DEVICES": found[place % len(found)]} if found else {}
    return os.environ | {"OMP_NUM_THREADS": str(run.recipe.training.threads)} | gpu


@contextmanager
def shared() -> Iterator[bool]:
    """Context manager: let processes share a GPU through NVIDIA's MPS. It yields whether MPS was started.

    It is not if it is not installed, or if it runs already.
    """
    program = shutil.which("nvidia-cuda-mps-control") if gpus() else None
    started = program is not None and subprocess.run([program, "-d"], capture_output=True).returncode == 0
    try:
        yield started
    finally:
        if started:
            subprocess.run([str(program)], input=b"quit\n", timeout=30, check=False)


def check_room(runs: Sequence[Run], pack: int, threads: int | None = None) -> None:
    """Raise `PopupError` if a GPU's memory has no room for `pack` of the runs. One of each kind is measured."""
    from .estimate import measure

    for kind in measure(runs, threads):
        if kind.room is not None and kind.room < pack:
            raise PopupError(f"--pack is {pack}; a GPU's memory has room for {kind.room} runs such as {kind.runs[0]}")
