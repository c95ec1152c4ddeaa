"""The processes of a run: how they find each other, and the numerical settings they share."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from ..accelerate_compat import forget_settings
from ..config.schema import Training
from ..errors import RunError
from ..torch_compat import NOT_DETERMINISTIC

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def join_slurm() -> None:
    """Set the variables that PyTorch reads from SLURM's, if `srun` started this process among others."""
    # a batch script has SLURM_NTASKS too; only a job step has its own number of tasks
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))


def _first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: `gpu[003-006,9],cpu1` → `gpu003`."""
    prefix, numbers = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups(default="")  # type: ignore[union-attr]
    return prefix + numbers


def start(training: Training, folder: Path | None = None) -> Accelerator:
    """Return the accelerator of a run in `folder`: device, precision, processes and trackers.

    Raises:
        RunError: the device does not support the precision, a tracker is not installed, or the processes are of a
            kind that the loop does not support.
    """
    join_slurm()
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in training.trackers:
        if name not in installed:
            raise RunError(f"training.trackers names {name}, which is not installed; run pip install {name}")
    forget_settings()  # an earlier run in this process may have used another precision
    # each process keeps its own batch-norm statistics until the network is evaluated or saved
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # unless told otherwise, Accelerate joins only processes on GPUs
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=_PRECISIONS[training.precision], kwargs_handlers=[ddp],
            log_with=list(training.trackers) or None, project_dir=folder,
        )  # fmt: skip
    except ImportError as error:
        raise RunError(f"Accelerate cannot start: {error}") from error
    except ValueError as error:
        raise RunError(
            f"training.precision is {training.precision!r}, which this device does not have: {error}"
        ) from error
    if training.precision == "float16" and accelerator.device.type == "cpu":  # Accelerate ignores this silently
        raise RunError("training.precision is 'float16', which trains only on GPUs; expected float32 or bfloat16")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise RunError(f"the run was started with {kind}; expected one process, or data-parallel ones on CPUs or GPUs")
    if training.sync_batchnorm and kind == "MULTI_CPU":
        raise RunError(
            "training.sync_batchnorm is true; expected false, because PyTorch shares batch statistics only between GPUs"
        )
    return accelerator


def leave() -> None:
    """Leave the process group, so that no process waits for one that has ended."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def numerics(training: Training) -> Iterator[None]:
    """Context manager: use deterministic algorithms if the recipe asks for them, else the fastest ones.

    Raises:
        RunError: an operator of the network has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(training.deterministic or before[0])
    torch.backends.cudnn.benchmark = not training.deterministic
    try:
        yield
    except RuntimeError as error:
        if training.deterministic and NOT_DETERMINISTIC in str(error):
            raise RunError(
                f"training.deterministic is true; expected false for this network: {str(error).split('. ')[0]}"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
