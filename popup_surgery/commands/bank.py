import json
from pathlib import Path
from typing import Annotated

import typer

from .shared import Base, busy, progress, show


def run(
    folder: Annotated[
        str, typer.Argument(help="A folder of popup artifacts, or of runs' folders; or a repository, hf://user/repo.")
    ],
    base: Base = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
    how: Annotated[
        str | None, typer.Option(help="How to find a task: one_step, halving or each. Default: halving if possible.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="data.key=value, for all files: another data set; repeatable.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> int:
    """Put all masks of a folder or repository on one network, and evaluate each, with and without its task's name.

    The exit status is 1 if a file is damaged or is for another network or base than the first.

    \b
    $ popup-surgery bank tasks
    task    kept    accuracy  not told  task found  images  data
    digits  50.0 %  98.3 %    98.3 %    100.0 %     359     digits
    turned  50.0 %  97.8 %    97.5 %    99.7 %      359     digits
    mean    50.0 %  98.1 %    97.9 %    99.9 %
    """
    with busy("loading"):
        from ..bank.files import files_of
        from ..bank.inference import HOW
        from ..errors import unknown
        from ..experiment.tasks import evaluate_tasks

        if how is not None and how not in HOW:
            raise unknown("--how", how, HOW)
        files = files_of(folder)
    table = evaluate_tasks(
        files, base=base, data_dir=data_dir, overrides=set_ or [], how=how, strict=False, progress=progress
    )
    if json_:
        print(json.dumps(table.to_json(), indent=2))
    else:
        show(str(table))
    return 0 if table.fits else 1
