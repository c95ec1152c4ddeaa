"""What artifacts a repository on the Hub has."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..hub import Address, is_address
from .remote import Contents, connect, talking
from .summary import Summary
from .target import check_repo, check_revision

AT_ONCE = 8  # files whose headers are read at the same time


@dataclass(frozen=True)
class Listed:
    """An artifact in a repository.

    Attributes:
        path: in the repository.
        address: what `load` and the commands take.
        summary: what the file says.
    """

    path: str
    address: str
    summary: Summary


@dataclass(frozen=True)
class Listing:
    """The artifacts of a repository at one commit, by path, and its other `.safetensors` files."""

    repo: str
    commit: str
    artifacts: tuple[Listed, ...]
    others: tuple[str, ...]

    def text(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        artifacts = [{"path": one.path, "address": one.address} | one.summary.record() for one in self.artifacts]
        return {"repo": self.repo, "commit": self.commit, "artifacts": artifacts, "others": list(self.others)}


def list_repo(repo: str, *, revision: str | None = None, token: str | None = None) -> Listing:
    """List the popup artifacts in a repository on the Hugging Face Hub. Only their headers are fetched, by ranges.

    Args:
        repo: `user/name`, or an address such as `hf://user/name@revision`, which may name a folder or a file.
        revision: a branch, tag, pull request or commit; default: that of the address, or the main branch.
        token: default: the one that `hf auth login` or `HF_TOKEN` gave.

    Raises:
        HubError: there is no such repository or revision, or the Hub cannot be reached.
    """
    asked = Address.parse(repo) if is_address(repo) else Address(repo)
    check_repo(asked.repo)
    check_revision(revision)
    revision = revision or asked.revision
    with talking(asked.repo, revision, doing="read"):
        there = Contents.of(connect(token), asked.repo, revision)
        paths = [p for p in there.weights() if not asked.path or p == asked.path or p.startswith(f"{asked.path}/")]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(there.artifact, paths))
    artifacts = [
        Listed(path, str(Address(asked.repo, revision, path)), Summary.of(artifact))
        for path, artifact in zip(paths, found, strict=True)
        if artifact is not None
    ]
    others = [path for path, artifact in zip(paths, found, strict=True) if artifact is None]
    return Listing(asked.repo, there.commit or "", tuple(artifacts), tuple(others))
