"""Logging of a run to Accelerate's trackers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .metrics import Epoch, LayerMask

PROJECT = "popup-surgery"


@contextmanager
def tracked(accelerator: Accelerator, folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: open the trackers that the accelerator was started with.

    Args:
        config: the recipe, by flat keys.
    """
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    named = {"wandb": {"dir": str(folder), "name": folder.name}, "trackio": {"name": folder.name}}
    accelerator.init_trackers(PROJECT, plain, named)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def add(accelerator: Accelerator, epoch: Epoch, layers: Iterable[LayerMask]) -> None:
    """Log an epoch's numbers, and each layer's density and share of changed mask bits."""
    values = {key: value for key, value in epoch.line().items() if key != "epoch" and value is not None}
    for layer in layers:
        values |= {f"density/{layer.name}": layer.density, f"changed/{layer.name}": layer.changed}
    accelerator.log(values, step=epoch.epoch)


def add_table(accelerator: Accelerator, table: Mapping[str, Any]) -> None:
    """Log the final table, as Markdown."""
    text = "\n".join(["| what | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in table.items())])
    for tracker in accelerator.trackers:
        if tracker.name == "mlflow":  # its log takes only numbers
            import mlflow

            mlflow.log_text(text, "result.md")
        else:
            tracker.log({"result": text})
