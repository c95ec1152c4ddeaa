from pathlib import Path
from typing import Annotated

import typer

from .shared import new_file, refuse_file, show, size


def run(
    name: Annotated[str | None, typer.Argument(help="Recipe to show; default: list all.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Copy the recipe to this file, to change it.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """List the recipes and sweeps, show one, or copy one.

    \b
    $ popup-surgery recipes digits -o mine.yaml
    wrote mine.yaml, 601 bytes; run it with popup-surgery train mine.yaml
    """
    from ..atomic import write_atomically
    from ..config.catalog import find, is_sweep, shipped, shipped_sweeps
    from ..config.yaml import read_yaml
    from ..errors import PopupError

    if name is None:
        if output is not None:
            raise PopupError(f"-o {output} needs a recipe to copy; expected its name, such as digits")
        for each in shipped() + shipped_sweeps():
            show(each)
        return
    refuse_file(name, "recipe")
    file = find(name)
    if output is not None:
        new_file(output, force, (".yaml", ".yml"), reads=[file])
    text = file.read_bytes()
    if output is None:
        print(text.decode(), end="")
        return
    write_atomically(output, text)
    verb = "sweep" if is_sweep(read_yaml(file)) else "train"
    show(f"wrote {output}, {size(output)}; run it with popup-surgery {verb} {output}")
