"""Where a push goes, checked before anything is sent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import sections
from ..config.expected import shown
from ..errors import HubError


@dataclass(frozen=True)
class Target:
    """A path in a repository on the Hub, and how a push gets there. `license` is None to leave the card's."""

    repo: str
    path: str
    revision: str | None
    create_pr: bool
    private: bool | None
    license: str | None

    @classmethod
    def of(
        cls,
        repo: str,
        path: str,
        revision: str | None = None,
        create_pr: bool = False,
        private: bool | None = None,
        license: str | None = None,
    ) -> "Target":
        """Check the parts of a target. Nothing is sent.

        Raises:
            HubError: one of them is not possible.
        """
        check_repo(repo)
        check_path(path)
        check_revision(revision)
        check_license(license)
        return cls(repo, path, revision, create_pr, private, license)

    @property
    def shown(self) -> str | None:
        """The revision that the card's lines name: a pull request is merged, so it is none."""
        return None if self.create_pr else self.revision


def check_repo(repo: object) -> None:
    """Raise `HubError` unless `repo` is `user/name`."""
    _check("the repository", repo, sections.check_repo)


def check_path(path: str) -> None:
    """Raise `HubError` unless an artifact may have this path in a repository."""
    _check("the path in the repository", path, sections.check_path)


def check_revision(revision: str | None) -> None:
    """Raise `HubError` unless a branch may have this name."""
    _check("the revision", revision, sections.check_revision)


def check_license(license: str | None) -> None:
    """Raise `HubError` unless it can be an identifier of a license."""
    _check("the license", license, sections.check_license)


def _check(what: str, value: Any, check: Callable[[str], str]) -> None:
    """Raise `HubError` unless a value passes the check of the recipe key for it, or is None and may be."""
    if value is None and check is not sections.check_repo:
        return
    try:
        check(value if isinstance(value, str) else "")
    except ValueError as error:
        raise HubError(f"{what} is {shown(value)}; {error}") from None
