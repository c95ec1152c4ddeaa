from typing import Annotated

import typer

from .shared import File, a_file, busy, show


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    repo: Annotated[str, typer.Argument(help="The repository, user/name. It is made if it does not exist.")],
    path_in_repo: Annotated[
        str | None, typer.Option(help="Where the file goes in the repository; default: its own name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; it is made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="The card's license, from the Hub's list, such as apache-2.0.")
    ] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Title of the commit.")] = None,
) -> None:
    """Push an artifact to the Hugging Face Hub, with a model card, a picture of its mask and config.json.

    A card that is there keeps what its owner wrote. The token is that of `hf auth login` or of HF_TOKEN.

    \b
    $ popup-surgery push digits.popup.safetensors me/digits
    pushed https://huggingface.co/me/digits/commit/0123456789abcdef0123456789abcdef01234567
    import torch, popup_surgery as ps
    network = ps.load("hf://me/digits/digits.popup.safetensors")
    scores = network(torch.zeros(1, 1, 8, 8))
    """
    with busy("reading"):
        from ..sharing.push import push_to_hub
    pushed = push_to_hub(
        artifact, repo, path_in_repo=path_in_repo, private=private or None, revision=revision, create_pr=create_pr,
        license=license_, message=message,
    )  # fmt: skip
    what = f", in place of the {pushed.path} that was there" if pushed.replaced else ""
    show(f"pushed {pushed.url}{what}", pushed.lines)
