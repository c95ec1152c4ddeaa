from typing import Annotated

import typer

from .shared import File, a_file, busy


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    repo: Annotated[
        str | None, typer.Option(help="The repository user/name that the lines which load the file name.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="The card's license, from the Hub's list, such as apache-2.0.")
    ] = None,
) -> None:
    """Print the model card of an artifact, as push writes it into a new repository. Nothing is sent.

    \b
    $ popup-surgery card digits.popup.safetensors --repo me/digits | head -n 4
    ---
    library_name: popup-surgery
    metrics:
    - accuracy
    """
    with busy("reading"):
        from ..sharing.card import model_card

        text = model_card(artifact, repo, license=license_)
    print(text, end="")  # with nothing that a terminal would take for more than text
