"""The signals that ask a process to stop: the first is noted, and further ones change nothing."""

import atexit
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [number for name in ("SIGTERM", "SIGINT", "SIGUSR1") if (number := getattr(signal, name, None))]

_ends_with_stop = False  # whether this process is a command, which ends once it was stopped


@contextmanager
def asked_to_stop(tell: Callable[[int], None] = lambda number: None) -> Iterator[Callable[[], bool]]:
    """Context manager: yield a function that is true once SIGTERM, SIGINT or SIGUSR1 has come.

    Further signals change nothing, in a command until its process has ended. Outside the main thread no signal is
    caught.

    Args:
        tell: called with the first signal.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) == 1:
            tell(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(seen)
    finally:
        if seen and _ends_with_stop:
            _pass_over()
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context manager: SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does, so that nothing temporary stays."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def command() -> Iterator[None]:
    """Context manager: once a stop is under way, this process ends, and no signal has an effect any more."""
    global _ends_with_stop
    _ends_with_stop = True
    try:
        yield
    finally:
        _ends_with_stop = False


def _pass_over() -> None:
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)  # unlike SIG_IGN, no new process inherits it
    atexit.register(_ignore)  # at its end the interpreter gives handlers in Python up


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
