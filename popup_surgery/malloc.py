"""What the C library does with memory that this process frees: it is kept, or returned to the system.

Only glibc can be told; elsewhere nothing changes.
"""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt


def keep_freed_memory() -> None:
    """Keep the memory that this process frees for its next large tensors.

    Otherwise glibc returns each to the system and gets it again at the next step, page by page, which takes up to a
    third of a small network's time on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        set_to = ctypes.CDLL(None).mallopt
        for limit in (1 << 30, 1 << 25):  # earlier versions take no more than 32 MB
            if set_to(_MMAP_THRESHOLD, limit):
                break
        set_to(_TRIM_THRESHOLD, (1 << 31) - 1)
        set_to(_TOP_PAD, 1 << 26)


def return_freed_memory() -> None:
    """Return the memory that this process frees to the system at once, for a process that is to need little.

    Otherwise glibc keeps what it sees freed, such as each gathered layer of a network in shards.
    """
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        for name, limit in ((_MMAP_THRESHOLD, 1 << 18), (_TRIM_THRESHOLD, 1 << 17), (_TOP_PAD, 0)):
            libc.mallopt(name, limit)
        libc.malloc_trim(0)
