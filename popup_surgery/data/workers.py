"""Worker processes of a data loader: which signals they obey, and how their death is reported."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError
from ..torch_compat import DIED_SENDING, WORKER_DIED


@contextmanager
def worker_deaths(*other: type[Exception]) -> Iterator[None]:
    """Context manager: raise `DataError` if a worker process of a loader dies, or for an error of a type in `other`.

    The types in `other` are those that a worker's death can cause. torch raises its own error from a signal handler,
    wherever the process is at that moment, even while it handles another error.
    """
    try:
        yield
    except Exception as error:
        death: BaseException | None = error
        while death is not None and not str(death).startswith(WORKER_DIED):
            death = death.__cause__ or death.__context__
        if death is None:
            if not isinstance(error, other) and not re.match(DIED_SENDING, str(error)):
                raise
            death = _report() or error
        detail = " ".join(str(death).split()).rstrip(".") or type(death).__name__
        raise DataError(
            f"a worker process of the data loader died: {detail}; if memory is short, set data.workers to 0"
        ) from death


def _report() -> RuntimeError | None:
    """Return torch's own error for a death that showed as another error; None if it does not come.

    If this function did not wait for it, torch would raise it later, wherever the process is by then.
    """
    try:
        time.sleep(1)
    except RuntimeError as error:
        return error
    return None


def outlive_signals(worker: int) -> None:
    """Make a worker ignore signals that stop a run, unless they come from its parent process.

    Such signals are sent to all processes of a run. `worker` is the worker's number.
    """
    for name in {"SIGINT", "SIGUSR1"} & vars(signal).keys():
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
