"""Where the runs of a sweep take place: in processes on this machine, or on a Ray cluster."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from ..atomic import write_atomically
from ..config.yaml import to_yaml
from ..errors import PopupError, Stopped
from ..experiment.train import train
from ..plugins import loaded_plugins, restore_plugins
from .gpus import check_room, environment, gpus, shared
from .grid import Run
from .results import State

log = logging.getLogger("popup_surgery")

PAUSE = 0.1  # seconds between two checks of the running processes
RETRIES = 3  # on Ray: of a run whose node or process died
PATIENCE = 300  # seconds that a retry waits for the process before it, which may live on a disconnected node

Event = tuple[Run, State, str]
Events = Generator[Event | None, None, None]
Stop = Callable[[], bool]


class Engine(Protocol):
    """Executes the runs of a sweep. A run has the same threads anywhere, because results on CPUs depend on them."""

    def ready(self) -> AbstractContextManager[object]:
        """Context manager: make the engine ready for `run`.

        Raises:
            PopupError: the engine is not available.
        """

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        """Run all of `runs` in their folders in `output`, and yield events.

        An event is a run, its new state and an error message, empty if there is none. None is yielded regularly
        in between. Once `stop` returns true no further run starts, and those that are running end with a checkpoint.
        """


@dataclass(frozen=True)
class Local:
    """Engine: processes on this machine, each an ordinary `popup-surgery train`.

    Attributes:
        jobs: runs at a time; if not given, `pack` for each GPU, or without GPUs as many as have a core for each thread.
            GPUs are assigned to them in turn.
        threads: threads of each run, in place of its `training.threads`.
        admit: called before a run starts; it returns false to refuse the run. A refused run is tried again when a place
            is free. Runs refused while nothing runs stay waiting.
        pack: runs at a time on each GPU, which they share through NVIDIA's MPS where it is installed. With "auto", a
            trial at the start of a sweep finds the number.
    """

    jobs: int | None = None
    threads: int | None = None
    admit: Callable[[Run], bool] = lambda run: True
    pack: int | Literal["auto"] = 1

    def places(self, runs: Sequence[Run]) -> int:
        """Return the number of `runs` at a time. `pack` "auto" counts as 1; see `packed`."""
        most = self.threads or max((run.recipe.training.threads for run in runs), default=1)
        pack = 1 if self.pack == "auto" else self.pack
        return self.jobs or pack * len(gpus()) or max(1, (os.cpu_count() or 1) // most)

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext() if self.pack == 1 else shared()

    def packed(self, runs: Sequence[Run], stop: Stop = lambda: False) -> "Local":
        """Return this engine with a number as `pack`, which a trial of `runs` finds if it is "auto".

        Raises:
            PopupError: a GPU's memory has no room for `pack` of the runs.
        """
        if self.pack == 1:
            return self
        if not gpus():
            log.warning("--pack is %s, and this machine has no GPU: it has no effect", self.pack)
            return replace(self, pack=1)
        if self.pack != "auto":
            check_room(runs, self.pack, self.threads)
            return self
        from .trial import best_pack

        return replace(self, pack=best_pack(runs, self.threads, stop))

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        """As `Engine.run`.

        Raises:
            PopupError: as for `packed`.
        """
        return _LocalRuns(self.packed(runs, stop), runs, output, stop).events()


class _LocalRuns:
    """The runs of a `Local` sweep: those that wait, and the process in each occupied place."""

    def __init__(self, engine: Local, runs: Sequence[Run], output: Path, stop: Stop) -> None:
        self.engine, self.output, self.stop = engine, output, stop
        self.waiting = [run.with_threads(engine.threads) for run in runs]
        self.running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
        self.told = False  # whether the processes have been asked to stop
        self.places = range(engine.places(runs))

    def events(self) -> Events:
        """Run everything, and yield the events of `Engine.run`."""
        for run in self.waiting:
            if _in_use(run, self.output):
                log.warning("another process runs in %s; waiting for it", run.folder(self.output).path)
        try:
            while self.running or (not self.stop() and self._more_to_come()):
                if self.stop():
                    self._tell()
                else:
                    yield from self._fill_places()
                yield from self._ended()
                yield None
                time.sleep(PAUSE)
        finally:
            for _, child in self.running.values():
                child.kill()
                child.wait()

    def _more_to_come(self) -> bool:
        """Return whether a waiting run can start, or waits for another process."""
        return any(_in_use(run, self.output) or self.engine.admit(run) for run in self.waiting)

    def _next(self) -> Run | None:
        """Return the first run that may start now."""
        return next((run for run in self.waiting if not _in_use(run, self.output) and self.engine.admit(run)), None)

    def _fill_places(self) -> Iterator[Event]:
        """Start waiting runs in the free places, and yield their events."""
        for place in [place for place in self.places if place not in self.running]:
            run = self._next()
            if run is None:
                return
            self.waiting.remove(run)
            try:
                if run.folder(self.output).finished:  # by the process that this run waited for
                    yield run, State.FINISHED, ""
                else:
                    self.running[place] = run, start_run(run, self.output, environment(run, place))
                    yield run, State.RUNNING, ""
            except PopupError as error:
                yield run, State.FAILED, str(error)

    def _tell(self) -> None:
        """Ask the processes to stop, once."""
        if not self.told:
            self.told = True
            for _, child in self.running.values():
                child.send_signal(signal.SIGTERM)

    def _ended(self) -> Iterator[Event]:
        for place, (run, child) in list(self.running.items()):
            if child.poll() is not None:
                del self.running[place]
                yield _outcome(run, self.output, child.returncode, self.stop())


@dataclass(frozen=True)
class OnRay:
    """Engine: tasks on a Ray cluster.

    Each run is one task with a CPU for each thread and `gpus_per_run` GPUs, wherever Ray finds room for it. A run whose
    node dies continues on another one.

    If a node sees the sweep's folder, the run trains in its own folder there and resumes from its checkpoint. Otherwise
    it trains in a folder on the node, and its files are copied back when it is finished.

    Attributes:
        address: as for `ray.init`; if not given, the cluster of this machine, or a new one for this sweep.
        gpus_per_run: GPUs of each run; if not given, 1, or 0 in a cluster without GPUs.
        threads: threads and CPUs of each run, in place of its `training.threads`.
    """

    address: str | None = None
    gpus_per_run: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if (gpus := self.gpus_per_run) and not (1e-4 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
            raise PopupError(f"--gpus-per-run is {gpus:g}; expected a share of a GPU from 0.0001, or an integer")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context manager: connect to the cluster, or start one; a connection that is there already is used.

        Raises:
            PopupError: Ray is not installed, or there is no such cluster.
        """
        try:
            import ray
        except ImportError:
            raise PopupError(
                "--on ray needs Ray, which is not installed; run pip install 'popup-surgery[ray]'"
            ) from None
        if ray.is_initialized():
            yield
            return
        address = self.address or os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if found := re.fullmatch(r"(?:ray://)?(\S+):(\d+)", address or ""):
                socket.create_connection((found[1], int(found[2])), timeout=10).close()  # Ray itself tries for minutes
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, OverflowError, RuntimeError, ValueError, ImportError) as error:
            raise PopupError(
                f"no Ray cluster can be reached at {address or 'this machine'}: {_first_line(error)}"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        """As `Engine.run`; each run is a Ray task."""
        import ray

        runs = [run.with_threads(self.threads) for run in runs]
        tasks = {
            threads: ray.remote(**self._needs(threads))(_on_node)
            for threads in {run.recipe.training.threads for run in runs}
        }
        output, told = output.absolute(), False
        for left in output.glob(".shared-*"):  # left by a sweep that was killed
            left.unlink()
        handle, marker = tempfile.mkstemp(prefix=".shared-", dir=output)
        os.close(handle)
        pending: dict[Any, Run] = {}
        try:
            for run in runs:
                try:
                    path = _prepare(run, output)
                    task = tasks[run.recipe.training.threads]
                    pending[task.remote(_yaml(run), str(path), marker, os.getcwd(), loaded_plugins())] = run
                except PopupError as error:
                    yield run, State.FAILED, str(error)
            while pending:
                if stop() and not told:
                    told = True
                    for reference in pending:
                        ray.cancel(reference)
                for reference in ray.wait(list(pending), timeout=PAUSE)[0]:
                    yield _returned(pending.pop(reference), output, reference, stop())
                yield None
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            Path(marker).unlink(missing_ok=True)

    def _needs(self, threads: int) -> dict[str, Any]:
        """Return the options of the Ray task of a run with `threads`; warn if no node has room for one."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.gpus_per_run
        if gpus is None:
            gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus for node in nodes):
            log.warning(
                "no node of the cluster has the %d CPUs and %g GPUs that a run needs; waiting for one", threads, gpus
            )
        return {
            "num_cpus": threads,
            "num_gpus": round(gpus, 4),
            "max_retries": RETRIES,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }


def _prepare(run: Run, output: Path) -> Path:
    """Write the run's current recipe to its folder, and return the folder.

    Keys that do not affect the result may differ from the recipe that was there.
    """
    folder = run.folder(output)
    if (folder.path / "recipe.yaml").exists():
        folder.check_recipe()
    try:
        folder.path.mkdir(exist_ok=True)
    except OSError as error:
        raise PopupError(f"{folder.path} cannot be written: {error.strerror}") from error
    write_atomically(folder.path / "recipe.yaml", _yaml(run).encode())
    return folder.path


def start_run(run: Run, output: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a process `popup-surgery train` in the run's folder in `output`. It resumes from any checkpoint there."""
    path = _prepare(run, output)
    command = [sys.executable, "-m", "popup_surgery", "train", f"{path}/recipe.yaml", "-o", str(path), "--resume"]
    command += [word for plugin in loaded_plugins() for word in ("--import", plugin)]
    with open(path / "log.txt", "wb") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


def _yaml(run: Run) -> str:
    return to_yaml(run.recipe.dump())


def _in_use(run: Run, output: Path) -> bool:
    """Return whether a process runs in the run's folder, for example one of a sweep that was killed."""
    lock = run.folder(output).path / "lock"
    try:
        if lock.exists():
            with FileLock(lock, timeout=0):
                pass
    except Timeout:
        return True
    return False


def _outcome(run: Run, output: Path, status: int, stopping: bool) -> Event:
    """Return the event of a process that ended with `status`; the error of a failed one is the log's last line."""
    if status == 0:
        return run, State.FINISHED, ""
    if status == Stopped.status or stopping:
        return run, State.STOPPED, ""
    said = (run.folder(output).path / "log.txt").read_text(errors="replace").strip().split("\n")[-1]
    ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return run, State.FAILED, said.removeprefix("error: ") if status > 0 and said else ended


def _on_node(
    recipe: str, path: str, marker: str, directory: str, plugins: Mapping[str, bytes]
) -> dict[str, bytes] | None:
    """Train one run on a node of a cluster. Returns its files by name, none if the node sees the sweep's folder."""
    if os.path.isdir(directory):
        os.chdir(directory)  # a recipe may have relative paths
    restore_plugins(plugins)
    shared = os.path.exists(marker)
    with nullcontext(path) if shared else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not shared:
            (folder / "recipe.yaml").write_text(recipe)
        with suppress(Timeout), FileLock(folder / "lock", timeout=PATIENCE):
            pass
        train(folder / "recipe.yaml", output=folder, resume=True)
        files = [] if shared else [file for file in folder.rglob("*") if file.is_file() and file.name != "lock"]
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _returned(run: Run, output: Path, reference: Any, stopping: bool) -> Event:
    """Return the event of a task that has ended, and write the files that it returned.

    The final file comes last, because a run with this file counts as finished.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    folder = run.folder(output)
    try:
        files: dict[str, bytes] = ray.get(reference)
        for name, data in sorted(files.items(), key=lambda item: item[0] == folder.final.name):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.path / name, data)
        return run, State.FINISHED, ""
    except RayTaskError as error:
        if isinstance(error.cause, Stopped) or stopping:
            return run, State.STOPPED, ""
        if isinstance(error.cause, PopupError):
            return run, State.FAILED, str(error.cause)
        write_atomically(folder.path / "log.txt", str(error).encode())
        return run, State.FAILED, f"{type(error.cause).__name__}: {_first_line(error.cause)}"
    except TaskCancelledError:
        return run, State.STOPPED, ""
    except (RayError, PopupError) as error:
        return run, State.STOPPED if stopping else State.FAILED, _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
