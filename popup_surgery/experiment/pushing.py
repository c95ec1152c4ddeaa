"""Push a run's artifact to the Hub at the end of the run, as the recipe's section `hub` says."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.sections import Hub
from ..errors import PopupError
from ..training.run_folder import RunFolder

log = logging.getLogger("popup_surgery")

if TYPE_CHECKING:
    from ..sharing.push import Pushed


def check_hub(hub: Hub | None) -> None:
    """Check, before a run, that its artifact can be pushed at the end: the token and its rights.

    Raises:
        HubError: it cannot; or the Hub cannot be asked.
    """
    if hub is None:
        return
    from ..sharing.push import check_push

    check_push(hub.repo, path_in_repo=hub.path, private=hub.private or None, revision=hub.revision, license=hub.license)


def push_result(run: RunFolder) -> "Pushed | None":
    """Push the artifact of a finished run. If that fails, warn how to push it by hand, and return None."""
    hub = run.recipe.hub
    if hub is None:
        return None
    from ..sharing.push import push_to_hub

    try:
        return push_to_hub(
            run.final, hub.repo, path_in_repo=hub.path, private=hub.private or None, revision=hub.revision,
            license=hub.license,
        )  # fmt: skip
    except PopupError as error:
        log.warning(
            "the run in %s is finished, but its file was not pushed: %s; push it by hand: %s",
            run.path, error, by_hand(run.final, hub),
        )  # fmt: skip
        return None


def by_hand(file: Path, hub: Hub) -> str:
    """Return the command that does what the end of the run would have done."""
    options = [("--path-in-repo", hub.path), ("--revision", hub.revision), ("--license", hub.license)]
    given = [part for option, value in options if value is not None for part in (option, value)]
    return shlex.join(["popup-surgery", "push", str(file), hub.repo, *given, *(["--private"] if hub.private else [])])
