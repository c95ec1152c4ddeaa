import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shared import Base, File, a_file, busy, progress, show


def run(
    artifact: Annotated[File, a_file("A popup artifact, or dense weights or an ONNX file of a run or an export.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="data.key=value, in place of the value in the file; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    base: Base = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the accuracy of a file's network on the data set that it was trained on, or on another.

    \b
    $ popup-surgery evaluate digits.popup.safetensors
    98.33 % of 359 validation images of digits
    """
    with busy("loading"):
        from ..experiment.evaluate import evaluate, recorded_data
        from ..experiment.opened import open_result

        opened = open_result(artifact)
        data = recorded_data(opened, set_ or [])
    result = evaluate(opened, data=data, data_dir=data_dir, base=base, progress=progress)
    if json_:
        print(json.dumps(asdict(result), indent=2))
        return
    show(f"{100 * result.accuracy:.2f} % of {result.images:,} validation images of {result.data}")
