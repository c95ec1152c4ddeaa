from pathlib import Path
from typing import Annotated

import typer

from .shared import new_file, refuse_file, show, size


def run(
    name: Annotated[str | None, typer.Argument(help="Show this recipe; without it all are listed.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Copy it to this file, to change it.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """List the recipes, show one, or copy one.

    \b
    $ popup-surgery recipes digits -o mine.yaml
    wrote mine.yaml, 601 bytes; popup-surgery train mine.yaml runs it
    """
    from ..atomic import write_atomically
    from ..config.catalog import find, is_sweep, shipped
    from ..config.yaml import read_yaml
    from ..errors import PopupError

    if name is None:
        if output is not None:
            raise PopupError(f"-o {output} needs the name of a recipe to copy")
        for each in shipped():
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
    show(f"wrote {output}, {size(output)}; popup-surgery {verb} {output} runs it")
