"""Sections of a recipe that need no other room: a lottery ticket, and where the result goes."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .expected import shown
from .keys import Key

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

REPO = "expected user/name, of letters, digits, '-', '_' and '.', such as me/digits"
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)  # of a recipe and all its sections
_QUIET = Key(affects_result=False, affects_speed=False)


class LotteryTicket(BaseModel):
    """Iterative magnitude pruning with rewinding of a dense network (Frankle and Carbin, 2019).

    Attributes:
        k: share of each layer's weights that is kept in the end.
        rounds: number of prunings, each by the same share. The first comes after `training.epochs` epochs. After each
            pruning, the network is trained for `training.epochs` less `rewind_epoch` epochs.
        rewind_epoch: after each pruning, the remaining weights return to their values after this many epochs of the
            first training; 0 is the start.
    """

    model_config = STRICT

    k: Share
    rounds: Annotated[int, Field(ge=1, le=1000)]
    rewind_epoch: Annotated[int, Field(ge=0)] = 0

    def epochs(self, epochs: int) -> int:
        """Return the epochs of the whole run, if one training has `epochs`."""
        return epochs + self.rounds * (epochs - self.rewind_epoch)


def check_repo(repo: str) -> str:
    """Return the name of a repository on the Hub, `user/name`, or raise a ValueError that says what was expected."""
    if repo.count("/") != 1 or not is_hub_id(repo):
        raise ValueError(REPO)
    return repo


def is_hub_id(name: str) -> bool:
    """Return whether a repository or data set on the Hub may have this name, by the Hub's own rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_path(path: str) -> str:
    """Return an artifact's path in a repository, or raise a ValueError that says what was expected."""
    parts = path.split("/")
    whole = path.isprintable() and "\\" not in path
    if not path.endswith(".safetensors") or not whole or {"", ".", "..", ".git", ".safetensors"} & {*parts}:
        raise ValueError(
            "expected a name that ends in .safetensors, such as a.popup.safetensors or sub/a.popup.safetensors"
        )
    return path


def check_revision(revision: str) -> str:
    """Return the name of a branch, or raise a ValueError that says what was expected."""
    if not re.fullmatch(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*", revision, re.ASCII):
        raise ValueError("expected the name of a branch")
    return revision


def check_license(license: str) -> str:
    """Return an identifier of a license, whose list the Hub has, or raise a ValueError that says what was expected."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError("expected an identifier of the Hub's list, such as apache-2.0 or mit")
    return license


class Hub(BaseModel):
    """Push the artifact to the Hugging Face Hub at the end of the run, with its model card.

    `hub: user/name` is short for a section with `repo` alone. The token is that of `hf auth login` or `HF_TOKEN`. That
    the token may write is checked before the run begins.

    Attributes:
        repo: the repository, `user/name`; it is made if it does not exist.
        path: where the artifact goes in the repository; null for the file's own name. Each run of a sweep goes to a
            file of its own, named after what varies.
        private: make a new repository private.
        revision: the branch; null for the main one.
        license: the model card's license, an identifier of the Hub's list; null to leave the card's.
    """

    model_config = STRICT

    repo: Annotated[str, AfterValidator(check_repo), Field(examples=["me/digits"]), _QUIET]
    path: Annotated[Annotated[str, AfterValidator(check_path)] | None, _QUIET] = None
    private: Annotated[bool, _QUIET] = False
    revision: Annotated[Annotated[str, AfterValidator(check_revision)] | None, _QUIET] = None
    license: Annotated[Annotated[str, AfterValidator(check_license)] | None, _QUIET] = None


def data_title(name: str, permute_seed: int | None) -> str:
    """Return what a data set is called in tables and cards: images whose pixels are permuted are others."""
    return name if permute_seed is None else f"{name}, pixels permuted by seed {permute_seed}"


def hub_section(value: Any) -> Any:
    """Return the section that the short form `hub: user/name` stands for."""
    if not isinstance(value, str):
        return value
    try:
        return {"repo": check_repo(value)}
    except ValueError as error:
        raise ValueError(f"hub is {shown(value)}; {error}, or a section with keys such as repo and private") from None
