from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .shared import Base, File, a_file, busy, show


def run(
    artifact: Annotated[File, a_file("A popup artifact that train wrote, or an export of it.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    base: Base = None,
) -> None:
    """Print the five most probable classes of each image, according to an artifact's network.

    \b
    $ popup-surgery predict digits.popup.safetensors digit.png
    digit.png  4   98.9 %
               9    0.6 %
               7    0.2 %
               1    0.1 %
               6    0.1 %
    """
    with busy("loading"):
        from ..experiment.evaluate import predict

        found = predict(artifact, images, base=base)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    for path, classes in zip(images, found, strict=True):
        for place, (name, probability) in enumerate(classes):
            table.add_row("" if place else str(path), name, f"{100 * probability:.1f} %")
    show(table)
