"""A run's folder: which process owns it, what is in it, and where the run resumes."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..atomic import check_writable, write_atomically
from ..config.keys import as_recorded, flat, select
from ..config.schema import Recipe
from ..config.yaml import read_yaml, to_yaml
from ..errors import PopupError, RunError
from . import checkpoint
from .checkpoint import Checkpoint
from .metrics import Epoch, Steps

log = logging.getLogger("popup_surgery")


class Kind(StrEnum):
    """What a run produces."""

    ARTIFACT = "a popup artifact"
    WEIGHTS = "dense weights"
    MASKED_WEIGHTS = "dense weights, and the masks that say which of them take part"


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder.
        recipe: the recipe of the run.
        kind: what the run produces.
        stem: how the names of the result files begin.

    Attributes:
        final: the artifact or the weights; once this file exists, the run is finished.
        scores: the file of scores, which `training.keep_scores` asks for.
        masks: the file of masks beside dense weights, if there is one.
        pictures: the files of the pictures that the run draws.
    """

    def __init__(self, path: Path, recipe: Recipe, kind: Kind, stem: str) -> None:
        self.path, self.recipe, self.kind, self.stem = path, recipe, kind, stem
        self.final = path / (f"{stem}.popup.safetensors" if kind is Kind.ARTIFACT else f"{stem}.safetensors")
        self.masks = path / f"{stem}.masks.safetensors" if kind is Kind.MASKED_WEIGHTS else None
        self.scores = path / f"{stem}.scores.safetensors"
        self.pictures = [path / name for name in ("curve.png", "masks.png")[: 1 if kind is Kind.WEIGHTS else 2]]
        self.checkpoints = path / "checkpoints"

    @property
    def _results(self) -> list[Path]:
        """The files that the run ends with."""
        scores = self.scores if self.recipe.training.keep_scores else None
        return [file for file in (*self.pictures, self.masks, scores, self.final) if file is not None]

    @property
    def finished(self) -> bool:
        """Whether the run in this folder is finished."""
        return os.path.exists(self.final)  # also where the name is too long

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """Context manager: lock the folder for this process. If the process dies, the lock is free again.

        Raises:
            RunError: another process has it; it has a run and `resume` is not given; its run has another recipe or
                name.
            PopupError: the folder cannot be written.
        """
        new = not os.path.exists(self.path)
        lock = FileLock(self.path / "lock", timeout=0)
        try:
            self._check_files(resume)
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(f"another process runs in {self.path}; wait for it, or choose another folder") from None
        except OSError as error:
            raise PopupError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            for file in self._results:
                check_writable(file)
            yield
        finally:
            (self.path / "lock").unlink(missing_ok=True)  # before the release: afterwards it may be another process's
            lock.release()
            if new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _check_files(self, resume: bool) -> None:
        """Raise `RunError` if the folder's files rule out this run, as `claimed` describes."""
        results = [file.name for file in self._results]
        there = [name for name in ("recipe.yaml", "metrics.jsonl", *results) if os.path.exists(self.path / name)]
        if there and not resume:
            raise RunError(
                f"{self.path} holds a run already; resume it with --resume, choose another folder with --output, or "
                "remove it"
            )
        if "recipe.yaml" in there:
            self.check_recipe()
        elif there:
            raise RunError(
                f"{self.path} has {there[0]} but no recipe.yaml; expected the folder of a run, or an empty one"
            )
        others = [file.name for file in self.path.glob("*.safetensors") if file.name not in results]
        if "metrics.jsonl" in there and others and not self.checkpoints.exists():
            raise RunError(
                f"{self.path} holds a finished run with the file {min(others)}, and this run would write "
                f"{self.final.name}; choose another folder with --output"
            )

    def begin(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or start a new run by writing its recipe and return None.

        Raises:
            RunError: all checkpoints are damaged, or the newest undamaged one is of another recipe.
        """
        for left in self.path.rglob(".*.part"):  # from a process that was killed while writing
            left.unlink(missing_ok=True)
        paths = list(checkpoint.newest_first(self.checkpoints)) if self.checkpoints.exists() else []
        for number, path in enumerate(paths):
            try:
                whole = checkpoint.read(path)
            except RunError as error:
                log.warning("%s; trying the checkpoint before it", error)
                continue
            self._check_same(path, whole.state["recipe"])  # recipe.yaml may have been edited since
            for damaged in paths[:number]:
                checkpoint.discard(damaged)
            self._write_metrics([Epoch(**line) for line in whole.state["history"]], whole.state["step"])
            return whole
        if paths:
            raise RunError(f"all checkpoints in {self.checkpoints} are damaged; remove {self.path} to start again")
        path, text = self.path / "recipe.yaml", to_yaml(self.recipe.dump())
        there = path.exists() and as_recorded(Recipe.parse(read_yaml(path), str(path)))
        if there != self.recipe:  # a user's own file that says the same stays as it is
            write_atomically(path, text.encode())
        self._write_metrics([], 0)
        return None

    def write_checkpoint(self, step: int, taken: Checkpoint) -> None:
        """Write the checkpoint of `step`, with the recipe in it."""
        taken.state["recipe"] = self.recipe.dump()
        checkpoint.write(self.checkpoints, step, taken)

    def add(self, numbers: Epoch | Steps) -> None:
        """Append a line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(numbers.line()) + "\n")
        except OSError as error:
            raise PopupError(f"{self.path}/metrics.jsonl cannot be written: {error.strerror}") from error

    def finish(self) -> None:
        """Remove what only an unfinished run needs: its checkpoints."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of epochs in metrics.jsonl."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "step" not in line]

    def _write_metrics(self, epochs: Sequence[Epoch], step: int) -> None:
        """Write metrics.jsonl with these epochs, and what it has of steps up to `step`."""
        lines = [(line["epoch"], line["step"], line) for line in self._steps() if line["step"] <= step]
        lines += [(epoch.epoch, math.inf, epoch.line()) for epoch in epochs]
        text = "".join(json.dumps(line) + "\n" for *_, line in sorted(lines, key=lambda place: place[:2]))
        write_atomically(self.path / "metrics.jsonl", text.encode())

    def _steps(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of steps in metrics.jsonl, if it is there. A killed process may have left a part of one."""
        with suppress(OSError, ValueError):
            for text in (self.path / "metrics.jsonl").read_text().splitlines():
                if "step" in (line := json.loads(text)):
                    yield line

    def check_recipe(self) -> None:
        """Check that the run in the folder has the same recipe; keys that do not affect the result may differ.

        Raises:
            RunError: it has another one; the message names the keys that differ.
        """
        self._check_same(self.path / "recipe.yaml", read_yaml(self.path / "recipe.yaml"))

    def _check_same(self, source: Path, values: dict[str, Any]) -> None:
        """Raise `RunError` if the recipe `values`, read from `source`, differs in a key that affects the result."""
        recipes = as_recorded(Recipe.parse(values, str(source))), self.recipe
        before, now = (flat(select(recipe, lambda setting: setting.key.affects_result)) for recipe in recipes)
        differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differ:
            key = differ[0]
            more = f", and {', '.join(differ[1:])}" if differ[1:] else ""
            raise RunError(
                f"the run in {self.path} is of another recipe: {key} is {before.get(key)!r} there and "
                f"{now.get(key)!r} here{more}"
            )
