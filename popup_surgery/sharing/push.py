"""Push an artifact to a repository on the Hugging Face Hub: the file, its picture, the model card and config.json."""

import hashlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from random import SystemRandom
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from ..artifact import Artifact, save
from ..artifact.container import open_file, stamp_of
from ..artifact.reader import naming
from ..errors import ArtifactError, HubError, PopupError
from ..hub import Address
from .card import Card, name_of, picture_of, renew
from .config_json import Config, Recorded
from .escape import clean
from .metadata import metadata, to_yaml
from .picture import draw_picture
from .remote import CARD, CONFIG, Contents, check_ready, connect, quiet_bars, talking
from .sanity_table import SanityTable
from .section import loading, section
from .summary import Summary
from .target import Target, check_repo

random = SystemRandom().random  # the state of Python's own is the user's
ATTEMPTS = 8  # at a commit, while others commit too
PAUSE = 0.5  # seconds before the second attempt; each later one waits longer


@dataclass(frozen=True)
class Pushed:
    """What was pushed.

    Attributes:
        repo, path: the repository `user/name`, and the artifact's path in it.
        revision: the branch or pull request that has it; None for the main branch.
        commit: the commit's hash.
        url: a page of the Hub: the pull request, if it was asked for, or the commit.
        lines: the lines of Python that load it.
        replaced: whether the path had another artifact, which the Hub keeps in earlier commits.
    """

    repo: str
    path: str
    revision: str | None
    commit: str
    url: str
    lines: str
    replaced: bool = False

    @property
    def address(self) -> str:
        """The address that `load` and the commands take: `hf://user/name/path`."""
        return str(Address(self.repo, self.revision, self.path))


@dataclass(frozen=True)
class _New:
    """What is pushed: an artifact that was read and checked, its bytes, its picture and its sanity table."""

    artifact: Artifact
    data: bytes
    picture: bytes
    sanity: SanityTable | None

    @classmethod
    def of(cls, artifact: Artifact, folder: Path) -> "_New":
        if artifact.container is None:  # one in memory
            artifact.write(folder / "artifact.safetensors")
            artifact = Artifact.open(folder / "artifact.safetensors")
        assert artifact.container is not None
        draw_picture(artifact, folder / "picture.png")  # reads and checks all of it
        picture = (folder / "picture.png").read_bytes()
        if artifact.remote is not None:
            return cls(artifact, artifact.remote.download().read_bytes(), picture, None)
        with naming(artifact.path), open_file(artifact.path) as file:
            data = file.read()
            if stamp_of(file) != artifact.container.stamp:
                raise ArtifactError("the file changed while it was being read; try again")
        return cls(artifact, data, picture, SanityTable.beside(Path(artifact.path), Summary.of(artifact).sha256))


def push_to_hub(
    file: str | Path | Artifact | nn.Module,
    repo: str,
    *,
    path_in_repo: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    message: str | None = None,
    provenance: dict[str, Any] | None = None,
) -> Pushed:
    """Push a popup artifact to a repository on the Hugging Face Hub, which may hold several.

    One commit has the file, a picture of its mask, the model card (README.md) and config.json. The repository is made
    if it does not exist. A model card that is there keeps all that its owner wrote: only the part between two marks is
    renewed, and the metadata that an earlier push wrote. If somebody else commits at the same time, the push is made
    again on top of that commit. Endpoint, token and proxies are those of `huggingface_hub`.

    Args:
        file: a popup artifact, as a file or open; or a network that `convert` returned, which is saved first.
        repo: the repository, `user/name`.
        path_in_repo: where the artifact goes; a name that ends in `.safetensors`. Default: the file's own name. A
            network needs it.
        private: make a new repository private. A repository that is public is refused if it is true.
        revision: the branch, which is made if it does not exist; default: the main branch.
        token: a token that may write; default: the one that `hf auth login` or `HF_TOKEN` gave.
        create_pr: open a pull request instead of a commit to the branch.
        license: an identifier of the Hub's list of licenses, for the card; default: what the card has.
        message: the commit's title.
        provenance: for a network, as for `save`.

    Returns:
        Where it is, and the lines that load it.

    Raises:
        ArtifactError: the file is no popup artifact, or damaged; or the network is not converted.
        HubError: the name is none of a repository; there is no token, or it may not write; the Hub cannot be reached or
            refuses.
        PopupError: the path is not possible, or would replace a file that is no artifact; the card or config.json that
            is there cannot be understood. Nothing was pushed.
    """
    check_repo(repo)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(file, nn.Module):
            if path_in_repo is None:
                raise PopupError("a network's file has no name; pass path_in_repo, such as 'digits.popup.safetensors'")
            target = Target.of(repo, path_in_repo, revision, create_pr, private, license)
            save(file, Path(folder) / PurePosixPath(target.path).name, provenance=provenance)
            file = Path(folder) / PurePosixPath(target.path).name
        elif provenance is not None:
            raise PopupError("provenance is for a network; a file has its own already")
        artifact = Artifact.open(file)
        target = Target.of(repo, path_in_repo or name_of(artifact), revision, create_pr, private, license)
        check_ready(repo, token)
        return _Push(target, _New.of(artifact, Path(folder)), token, message).run()


def check_push(
    repo: str,
    *,
    path_in_repo: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> None:
    """Check, long before a push, that it can be made: the names, the token, and its rights.

    Args:
        repo, path_in_repo, private, revision, license, token: as for `push_to_hub`.

    Raises:
        HubError: it cannot; or the Hub cannot be asked.
    """  # fmt: skip
    target = Target.of(repo, path_in_repo or "a.safetensors", revision, False, private, license)
    check_ready(repo, token)
    api = connect(token)
    with talking(repo, revision):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"{repo}: the token of {user.get('name')} may only read; use one that may write")
        if license is not None:
            _validate(repo, license)
        try:
            private_there = api.repo_info(repo).private
        except RepositoryNotFoundError:  # the push makes it
            mine = [user.get("name"), *(each.get("name") for each in user.get("orgs") or [])]
            if repo.partition("/")[0] not in mine:
                raise HubError(
                    f"there is no repository {repo}, and {mine[0]} can make none there; expected {mine[0]}/…"
                ) from None
            return
        api.auth_check(repo, write=True)
    _check_private(target, private_there)


def _validate(repo: str, license: str) -> None:
    """Ask the Hub whether it knows a license."""
    try:
        ModelCard(f"---\n{to_yaml({'license': license})}\n---\n").validate()
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        raise HubError(f"{repo}: the Hub refuses the license {license}; expected an identifier of its list") from error


def _check_private(target: Target, private: bool | None) -> None:
    if target.private and not private:
        raise HubError(
            f"{target.repo} exists and is public, and the push is to be private; make it private in its settings on "
            "the Hub, or choose another repository"
        )


class _Push:
    """One push, attempt after attempt."""

    def __init__(self, target: Target, new: _New, token: str | None, message: str | None) -> None:
        self.target, self.new, self.message = target, new, message
        self.api = connect(token)
        self.summary = Summary.of(new.artifact)
        self.picture = picture_of(target.path)
        self.replaced = False

    def run(self) -> Pushed:
        """Push. See `push_to_hub`."""
        target = self.target
        with talking(target.repo, target.revision), quiet_bars():
            self._prepare()
            for attempt in range(ATTEMPTS):
                time.sleep(PAUSE * attempt * (0.5 + random()))
                there = Contents.of(self.api, target.repo, target.revision)
                try:
                    return self._pushed(self._commit(there))
                except HfHubHTTPError as error:
                    if error.response.status_code not in (409, 412):
                        raise
        raise HubError(f"{target.repo}: others committed at the same time, {ATTEMPTS} times; push again")

    def _prepare(self) -> None:
        """Make the repository and the branch if they do not exist."""
        target = self.target
        try:
            private = self.api.repo_info(target.repo).private
        except RepositoryNotFoundError:
            if target.create_pr:
                raise
            self.api.create_repo(target.repo, private=target.private, exist_ok=True)
            private = target.private
        _check_private(target, private)
        if target.revision is not None and not target.create_pr:
            try:
                self.api.repo_info(target.repo, revision=target.revision)
            except RevisionNotFoundError:
                self.api.create_branch(target.repo, branch=target.revision, exist_ok=True)

    def _commit(self, there: Contents) -> CommitInfo:
        """Make the one commit, on top of what is there."""
        target, files = self.target, self._files(there)
        verb = "Update" if target.path in there.files else "Add"
        digest = hashlib.sha256(self.new.data).hexdigest()
        self.replaced = target.path in there.files and there.files[target.path].sha256 != digest
        try:
            return self.api.create_commit(
                target.repo,
                [CommitOperationAdd(path, data) for path, data in files.items()],
                commit_message=self.message or f"{verb} {target.path}",
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=there.commit,
            )
        except ValueError as error:
            if isinstance(error, OSError):
                raise
            told = " ".join(clean(error, 1000).split())
            raise HubError(f"{target.repo}: the Hub refuses the card: {told}") from error

    def _files(self, there: Contents) -> dict[str, bytes]:
        """Return the files of the commit by path."""
        target, new = self.target, self.new
        card_there, config_there = there.text(CARD), there.text(CONFIG)
        config = Config.read(config_there, f"{target.repo}: {CONFIG}")
        written = Card.read((card_there or "").replace("\r\n", "\n"), f"{target.repo}: {CARD}").sections
        self._check_room(config, there)
        recorded, sections = self._others(config, written, there)
        digest = hashlib.sha256(new.data).hexdigest()
        recorded[target.path] = Recorded(self.summary, digest, self.picture)
        sections[target.path] = section(
            target.path, new.artifact.manifest, self.summary, repo=target.repo, revision=target.shown,
            picture=self.picture, sanity=new.sanity,
        )  # fmt: skip
        license = target.license or config.card.get("license")
        name = target.repo.partition("/")[2]
        now = metadata({path: one.summary for path, one in sorted(recorded.items())}, name, license)
        card = renew(
            card_there, sections, config.card, now, name=name, license=target.license, what=f"{target.repo}: {CARD}"
        )
        config = Config(recorded, now, config.others)
        return {
            target.path: new.data,
            self.picture: new.picture,
            CARD: card.encode(),
            CONFIG: config.text().encode(),
        }

    def _check_room(self, config: Config, there: Contents) -> None:
        """Raise `PopupError` if the push would replace a file that no push wrote."""
        target = self.target
        unknown = target.path in there.files and target.path not in config.artifacts
        if unknown and there.artifact(target.path) is None:
            raise PopupError(
                f"{target.repo} has another {target.path}, which is not a popup artifact; choose another path in the "
                "repository"
            )
        ours = {one.picture for one in config.artifacts.values()}
        if self.picture in there.files and self.picture not in ours:
            raise PopupError(
                f"{target.repo} has a file {self.picture}, where the mask's picture would go; choose another path in "
                "the repository"
            )

    def _others(
        self, config: Config, written: Mapping[str, str], there: Contents
    ) -> tuple[dict[str, Recorded], dict[str, str]]:
        """Return the record and the section of each other artifact that is there now."""
        recorded: dict[str, Recorded] = {}
        sections: dict[str, str] = {}
        for path in there.weights():
            known = config.artifacts.get(path)
            if path == self.target.path:
                continue
            if known and known.file_sha256 == there.files[path].sha256 and path in written:
                recorded[path], sections[path] = known, written[path]
                continue
            if (found := there.artifact(path)) is None:
                continue  # dense weights or the like
            picture = known.picture if known is not None and known.picture in there.files else ""
            summary = Summary.of(found)
            recorded[path] = Recorded(summary, there.files[path].sha256, picture)
            sections[path] = section(
                path, found.manifest, summary, repo=self.target.repo, revision=self.target.shown,
                picture=picture or None,
            )  # fmt: skip
        return recorded, sections

    def _pushed(self, commit: CommitInfo) -> Pushed:
        target = self.target
        revision = commit.pr_revision or target.revision
        lines = loading(target.path, self.new.artifact.manifest, self.summary, target.repo, revision)[0]
        url = commit.pr_url or commit.commit_url
        return Pushed(target.repo, target.path, revision, commit.oid, url, lines, self.replaced)
