import os
from pathlib import Path
from typing import Annotated

import typer

from .shared import new_file, progress, show


def run(
    libraries: Annotated[
        list[str] | None, typer.Argument(help="timm, torchvision or popup_surgery; default: all.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for zoo.json and zoo.md.")] = Path("."),
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of processes; default: one for each CPU core.")
    ] = os.cpu_count() or 1,
    force: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """List what conversion would mask in every network of a library, without allocating any of them.

    \b
    $ popup-surgery zoo popup_surgery
    6 networks, 0 refused, 0 with less than 99 % of their weights masked
    wrote zoo.json and zoo.md
    """
    from ..analysis.coverage import all_names, as_json, as_markdown, survey
    from ..atomic import write_atomically
    from ..errors import PopupError, unknown
    from ..models.libraries import LIBRARIES

    if not os.path.isdir(output):
        raise PopupError(f"{output} is not a folder; expected one for zoo.json and zoo.md")
    files = [new_file(output / name, force) for name in ("zoo.json", "zoo.md")]
    libraries = list(dict.fromkeys(libraries or LIBRARIES))
    for library in libraries:
        if library not in LIBRARIES:
            raise unknown("library", library, LIBRARIES)
    names = all_names(libraries)
    rows = []
    with progress(len(names), "planning") as advance:
        for row in survey(names, jobs):
            rows.append(row)
            advance()
    for file, text in zip(files, (as_json(rows, libraries), as_markdown(rows, libraries)), strict=True):
        write_atomically(file, text.encode())
    refused = sum(bool(row.refused) for row in rows)
    below = sum(not row.refused and row.of_weights < 0.99 for row in rows)
    show(f"{len(rows)} networks, {refused} refused, {below} with less than 99 % of their weights masked")
    show(f"wrote {files[0]} and {files[1]}")
