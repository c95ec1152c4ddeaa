"""What a measurement depends on beside the network: the processor, and the memory of a process."""

import ctypes
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

_INSTRUCTIONS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
_CPUINFO, _STATUS, _FORGET = Path("/proc/cpuinfo"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(NamedTuple):
    """The resident size of this process in bytes: now, and the largest so far."""

    now: int
    peak: int


def memory(*, trim: bool = False, forget: bool = False) -> Memory | None:
    """Return the memory of this process; None where the system does not tell, as only Linux does.

    Args:
        trim: first return what is free to the system, where the C library can. It keeps some of it for later, more or
            less by chance.
        forget: count the peak from here on, if the system allows that.
    """
    if trim:
        with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
    if forget:
        with suppress(OSError):
            _FORGET.write_text("5")
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M))
    return Memory(1024 * int(found["VmRSS"]), 1024 * int(found["VmHWM"])) if len(found) == 2 else None


def processor() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name, and those of its instructions that matter for products."""
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    names = re.findall(r"^model name\s*: (.+)", text, re.M)
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.M)[:1])))
    found = tuple(name for name in _INSTRUCTIONS if name in flags)
    name = names[0] if names else platform.processor() or platform.machine()
    return name, found or (torch.backends.cpu.get_cpu_capability().lower(),)


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Return how many processes ran or waited in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
