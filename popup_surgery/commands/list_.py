import json
from typing import Annotated

import typer
from rich.table import Table

from .shared import amount, busy, show


def run(
    repo: Annotated[str, typer.Argument(help="The repository: user/name, or hf://user/name@revision.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag, pull request or commit.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all that the headers say as JSON.")] = False,
) -> None:
    """List the artifacts in a repository on the Hugging Face Hub. Only their headers are fetched.

    \b
    $ popup-surgery list me/digits
    file                      network              kept                     accuracy  data    size
    digits.popup.safetensors  popup_surgery/conv2  11,784 of 23,568 (50.0%)  98.33%    digits  7,026 bytes
    popup-surgery inspect hf://me/digits/digits.popup.safetensors tells more of one
    """
    with busy("asking the Hub"):
        from ..sharing.listing import list_repo

        found = list_repo(repo, revision=revision)
    if json_:
        print(json.dumps(found.text(), indent=2, sort_keys=True))
        return
    table = Table(
        "file", "network", "kept", "accuracy", "data", "size", box=None, header_style="", padding=(0, 2, 0, 0)
    )
    for one in found.artifacts:
        said = one.summary
        share = f" ({said.kept / said.weights:.1%})" if said.weights else ""
        accuracy = "" if said.accuracy is None else f"{said.accuracy:.2%}"
        kept = f"{said.kept:,} of {said.weights:,}{share}"
        table.add_row(one.path, said.name, kept, accuracy, said.data, amount(said.size))
    if found.artifacts:
        show(table)
        show(f"popup-surgery inspect {found.artifacts[0].address} tells more of one")
    else:
        show(f"{found.repo} has no popup artifact")
    if found.others:
        show(f"{len(found.others)} other .safetensors files are no popup artifacts, such as {found.others[0]}")
