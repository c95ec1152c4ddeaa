import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .shared import busy, progress, show, size

if TYPE_CHECKING:
    from ..training.loop import Epoch


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (popup-surgery recipes lists them), or a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of any recipe key; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder; runs/<recipe> if not given.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The data set's folder, in place of data.root.")] = None,
) -> None:
    """Learn a mask as a recipe says; write recipe.yaml, metrics.jsonl, curve.png and the artifact.

    \b
    $ popup-surgery train digits --set training.epochs=2
    epoch 1/2  loss 1.743  training 40.68 %  accuracy 76.88 %  3,608 images/s
    epoch 2/2  loss 0.530  training 84.63 %  accuracy 91.64 %  5,003 images/s
    accuracy      91.64 % of the validation images
    kept          11,784 of 23,568 weights (50.0 %)
    file          runs/digits/digits.popup.safetensors, 6,900 bytes
    time          3.0 s
    speed         4,305 images/s in training
    """
    began = time.perf_counter()
    with busy("starting"):
        from .. import run as runs
        from ..training import Recipe

        loaded = Recipe.load(recipe, set_ or [])
    epochs = loaded.training.epochs

    def line(epoch: "Epoch") -> None:
        show(
            f"epoch {epoch.epoch}/{epochs}  loss {epoch.train_loss:.3f}  training {epoch.train_accuracy:.2%}  "
            f"accuracy {epoch.accuracy:.2%}  {epoch.images_per_second:,.0f} images/s".replace("%", " %")
        )

    result = runs.train(
        recipe, overrides=set_ or (), output=output, data_dir=data_dir, progress=progress, after_epoch=line
    )
    speed = sum(e.images_per_second * e.seconds for e in result.history) / sum(e.seconds for e in result.history)
    table = Table.grid(padding=(0, 6, 0, 0))
    table.add_row("accuracy", f"{100 * result.accuracy:.2f} % of the validation images")
    table.add_row("kept", f"{result.kept:,} of {result.weights:,} weights ({100 * result.kept / result.weights:.1f} %)")
    table.add_row("file", f"{result.file}, {size(result.file)}")
    table.add_row("time", f"{time.perf_counter() - began:.1f} s")
    table.add_row("speed", f"{speed:,.0f} images/s in training")
    show(table)
