"""Worker processes of a data loader: which signals they obey, and what their death looks like."""

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
    """Within it the death of a loader's worker process is a `DataError`; so are errors that come of it, the `other`.

    torch raises its own from a signal's handler, wherever the process happens to be, also where it handles others.
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
            f"a worker process of the data loader died: {detail}; where memory is short, data.workers=0 does without"
        ) from death


def _report() -> RuntimeError | None:
    """torch's error for a death that showed otherwise; not awaited here, it comes wherever the process is by then."""
    try:
        time.sleep(1)
    except RuntimeError as error:
        return error
    return None


def outlive_signals(worker: int) -> None:
    """Signals that stop a run are sent to all its processes; a worker obeys only the process that it works for."""
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
