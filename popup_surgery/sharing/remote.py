"""What is in a repository on the Hub at one commit."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, constants, get_token
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..artifact import Artifact
from ..errors import ArtifactError, HubError
from ..hub import Address
from ..hub.faults import LOG_IN, explained
from ..hub.files import CALLER, HubFile

CARD, CONFIG = "README.md", "config.json"
TEXT = 10 << 20  # bytes of a card or a config.json; the Hub itself shows fewer
WEIGHTS = ".safetensors"


def connect(token: str | None = None) -> HfApi:
    """Return the Hub's client, with a token in place of that of `huggingface_hub`."""
    return HfApi(token=token, library_name=CALLER["library_name"], library_version=CALLER["library_version"])


def check_ready(repo: str, token: str | None) -> None:
    """Raise `HubError` if nothing can be pushed from here: there is no token, or the network is turned off."""
    if constants.is_offline_mode():
        raise HubError(f"{repo}: HF_HUB_OFFLINE forbids to push; unset it, and try again")
    if token is None and get_token() is None:
        raise HubError(f"{repo}: to push, the Hub needs a token; {LOG_IN}")


@dataclass(frozen=True)
class Stored:
    """A file of a repository: its size in bytes, its SHA-256 if it is a large file, else empty, and git's digest."""

    size: int
    sha256: str
    etag: str


@dataclass(frozen=True)
class Contents:
    """The files of a repository at one commit, by path.

    Attributes:
        commit: the commit's hash; None if the repository is empty.
    """

    api: HfApi
    repo: str
    commit: str | None
    files: dict[str, Stored] = field(repr=False)

    @classmethod
    def of(cls, api: HfApi, repo: str, revision: str | None = None) -> "Contents":
        """Ask the Hub for what a revision has. Errors are those of `huggingface_hub`."""
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            each.rfilename: Stored(each.size or 0, each.lfs.sha256 if each.lfs else "", each.blob_id or "")
            for each in info.siblings or []
        }
        return cls(api, repo, info.sha, files)

    def text(self, path: str) -> str | None:
        """Return the text of a small file; None if it is not there.

        Raises:
            HubError: it is not UTF-8, or too long.
        """
        if path not in self.files:
            return None
        if self.files[path].size > TEXT:
            raise HubError(f"{self.repo}: {path} has {self.files[path].size:,} bytes; expected at most {TEXT:,}")
        file = self.api.hf_hub_download(self.repo, path, revision=self.commit)
        try:
            return Path(file).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise HubError(f"{self.repo}: {path} is not UTF-8; mend it first") from None

    def weights(self) -> list[str]:
        """Return the paths of the files that may be artifacts."""
        return sorted(path for path in self.files if path.endswith(WEIGHTS))

    def artifact(self, path: str) -> Artifact | None:
        """Open a file, whose header is fetched by ranges; None if it is no artifact, or a damaged one."""
        stored, address = self.files[path], Address(self.repo, self.commit, path)
        file = HubFile(str(address), address, stored.size, stored.sha256 or stored.etag)
        if self.api.token is not None:
            file = _WithToken(str(address), address, stored.size, None, token=str(self.api.token))
        try:
            return Artifact.open(file)
        except ArtifactError:
            return None


@dataclass(eq=False)
class _WithToken(HubFile):
    """A file that is read with another token than that of `huggingface_hub`."""

    token: str = field(default="", repr=False)

    def front(self, stop: int) -> bytes:
        stop = min(stop, self.size or 0)
        if stop > len(self._front):
            path = f"{self.address.repo}@{self.address.revision}/{self.address.path}"
            with HfFileSystem(token=self.token, skip_instance_cache=True).open(path, "rb", cache_type="none") as file:
                file.seek(len(self._front))
                self._front += file.read(stop - len(self._front))
        return bytes(self._front[:stop])


@contextmanager
def talking(repo: str, revision: str | None = None, doing: str = "write") -> Iterator[None]:
    """Context manager: one sentence for whatever goes wrong between here and a repository."""
    with explained(Address(repo, revision), repo, doing=doing):
        yield


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Context manager: no progress bars of `huggingface_hub` where stderr is no terminal, but a log."""
    if sys.stderr.isatty() or are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
