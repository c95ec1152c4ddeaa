"""The processes of a run: how they find each other, and the numerical settings they share."""

import logging
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
from .sharding import join_shards

log = logging.getLogger("popup_surgery")

_PRECISIONS = {"float32": "no", "tf32": "no", "bfloat16": "bf16", "float16": "fp16"}
_EXPECTED = "expected one process, data-parallel ones on CPUs or GPUs, or FSDP2"


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
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise RunError(f"the run was started with DeepSpeed; {_EXPECTED}, which spreads more than ZeRO-1 and 2 do")
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
    if training.precision in ("float16", "tf32") and accelerator.device.type == "cpu":  # would be ignored
        raise RunError(
            f"training.precision is {training.precision!r}, which trains only on GPUs; expected float32 or bfloat16"
        )
    join_shards(accelerator, training)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise RunError(f"the run was started with {kind}; {_EXPECTED}")
    if training.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise RunError(
            "training.sync_batchnorm is true; expected false, because PyTorch shares batch statistics only between GPUs"
        )
    return accelerator


def leave() -> None:
    """Leave the process group, so that no process waits for one that has ended."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def numerics(training: Training) -> Iterator[int]:
    """Context manager: the recipe's number of threads, and TF32 and deterministic algorithms if it asks for them.

    It yields the number of threads that the process had.

    Raises:
        RunError: an operator of the network has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    threads, products = torch.get_num_threads(), None
    if training.precision == "tf32":
        products = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # convolutions have it by PyTorch's default
    torch.set_num_threads(training.threads)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(training.deterministic or before[0])
    torch.backends.cudnn.benchmark = not training.deterministic
    try:
        yield threads
    except RuntimeError as error:
        if training.deterministic and NOT_DETERMINISTIC in str(error):
            raise RunError(
                f"training.deterministic is true; expected false for this network: {str(error).split('. ')[0]}"
            ) from error
        raise
    finally:
        torch.set_num_threads(threads)
        if products is not None:
            torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def warn_of_other_threads(training: Training, accelerator: Accelerator) -> None:
    """Warn if the user has asked for another number of threads than the recipe, in a way that does not count."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    # launchers of several processes set the variable themselves, and results on GPUs do not depend on it
    counts = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if counts and asked.isdecimal() and int(asked) != training.threads:
        log.warning(
            "OMP_NUM_THREADS is %s, which does not count: the result depends on the number of threads, so the recipe "
            "sets it; training.threads is %d",
            asked,
            training.threads,
        )


def resume_threads(recorded: int | None, before: int, training: Training, accelerator: Accelerator) -> None:
    """Go on with the number of threads that a run began with.

    Args:
        recorded: the number in the checkpoint; None in one of version 0.1.0, where the process's own number counted.
        before: the number that this process had.
    """
    threads = before if recorded is None else recorded
    torch.set_num_threads(threads)
    if threads != training.threads and accelerator.is_main_process and accelerator.device.type == "cpu":
        log.warning(
            "%s, on which its result depends; training.threads=%d is for a new run",
            f"the checkpoint does not say how many threads the run had; it resumes with this process's {threads}"
            if recorded is None
            else f"the run began with {threads} threads and resumes with as many",
            training.threads,
        )
