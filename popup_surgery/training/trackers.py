"""Logging of a run to Accelerate's trackers."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import RunError
from .metrics import Epoch, LayerMask, Steps

log = logging.getLogger("popup_surgery")

PROJECT = "popup-surgery"


@contextmanager
def tracked(accelerator: Accelerator, folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: open the trackers that the accelerator was started with.

    Args:
        config: the recipe, by flat keys.
    """
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    named = {"wandb": {"dir": str(folder), "name": folder.name}, "trackio": {"name": folder.name}}
    try:
        accelerator.init_trackers(PROJECT, plain, named)
    except Exception as error:  # a tracker may be damaged in any way
        said = str(error).strip().split("\n")[0] or type(error).__name__
        names = ", ".join(str(getattr(each, "value", each)) for each in accelerator.log_with)
        raise RunError(f"training.trackers: {names} cannot start: {said}") from error
    try:
        yield
    finally:
        for tracker in list(accelerator.trackers):
            with _kept_going(accelerator, tracker):
                tracker.finish()


@contextmanager
def _kept_going(accelerator: Accelerator, tracker: Any) -> Iterator[None]:
    """Context manager: a tracker that fails is given up with a warning, and the run continues without it."""
    try:
        yield
    except Exception as error:  # a full disk, a server that is gone, a fault of its own
        log.warning("the tracker %s has failed, and the run continues without it: %s", tracker.name, error)
        accelerator.trackers.remove(tracker)


def add(accelerator: Accelerator, epoch: Epoch, layers: Iterable[LayerMask], at: int | None = None) -> None:
    """Log an epoch's numbers, and each layer's density and share of changed mask bits.

    Args:
        at: the place on the trackers' axis; the number of the epoch if not given.
    """
    values = {key: value for key, value in epoch.line().items() if value is not None and (key != "epoch" or at)}
    for layer in layers:
        values |= {f"density/{layer.name}": layer.density, f"changed/{layer.name}": layer.changed}
    _log(accelerator, values, epoch.epoch if at is None else at)


def add_steps(accelerator: Accelerator, steps: Steps) -> None:
    """Log the rate and the loss of steps within an epoch."""
    values = {f"step/{key}": value for key, value in steps.line().items() if key in ("lr", "train_loss")}
    _log(accelerator, {key: value for key, value in values.items() if value is not None}, steps.step)


def _log(accelerator: Accelerator, values: Mapping[str, Any], at: int) -> None:
    for tracker in list(accelerator.trackers):
        with _kept_going(accelerator, tracker):
            tracker.log(values, step=at)


def add_table(accelerator: Accelerator, table: Mapping[str, Any]) -> None:
    """Log the final table, as Markdown."""
    text = "\n".join(["| what | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in table.items())])
    for tracker in list(accelerator.trackers):
        with _kept_going(accelerator, tracker):
            if tracker.name == "mlflow":  # its log takes only numbers
                import mlflow

                mlflow.log_text(text, "result.md")
            else:
                tracker.log({"result": text})
