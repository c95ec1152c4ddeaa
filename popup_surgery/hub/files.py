"""Files of the Hub: found at one commit, read by ranges, and downloaded into huggingface_hub's cache."""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from .. import __version__
from ..atomic import write_atomically
from ..errors import HubError, PopupError, listed
from .address import Address
from .faults import explained

log = logging.getLogger("popup_surgery")

CALLER: dict[str, Any] = {"library_name": "popup_surgery", "library_version": __version__}
ARTIFACT = ".popup.safetensors"
TRIES = 3  # for the body of a range; huggingface_hub itself tries again what fails before


@dataclass(eq=False)
class HubFile:
    """One file of the Hub at one commit, from `locate`.

    Attributes:
        shown: the address as it was given, for messages.
        address: the address with the commit and the file's path, which names the same bytes forever.
        size: the number of bytes that the Hub states; None if the file is in the cache already.
        etag: the Hub's digest of the file: SHA-256 of a large file, git's of another; None in the cache.
        cached: the file in huggingface_hub's cache, once it is there.
    """

    shown: str
    address: Address
    size: int | None = None
    etag: str | None = None
    cached: Path | None = None
    revision: str = "main"
    _front: bytearray = field(default_factory=bytearray, repr=False)

    def __str__(self) -> str:
        return self.shown

    def open(self) -> BinaryIO:
        """Open the file for reading bytes: from the cache, or else from the Hub, which sends only what is read."""
        return open(self.cached, "rb") if self.cached is not None else cast(BinaryIO, Ranges(self))

    def front(self, stop: int) -> bytes:
        """Return the first bytes, up to `stop`. Each is asked for once."""
        stop = min(stop, self.size or 0)
        if stop > len(self._front):
            with explained(self.address, self):
                self._front += _range(self.address, len(self._front), stop)
        return bytes(self._front[:stop])

    def download(self) -> Path:
        """Return the file in huggingface_hub's cache, downloaded if it is not there: never more bytes than stated.

        Raises:
            HubError: the download failed, or what arrived is not what the Hub stated. Then it is not in the cache.
        """
        if self.cached is None:
            assert self.size is not None
            with explained(self.address, self):
                path = Path(
                    hf_hub_download(
                        self.address.repo,
                        self.address.path,
                        revision=self.address.revision,
                        tqdm_class=_at_most(self),
                        **CALLER,
                    )
                )
                if path.stat().st_size != self.size or not _has_digest(path, self.etag or "", self.size):
                    _forget(path)
                    raise HubError(f"{self}: the download is not the file that the Hub stated before; try again")
                _record(self.address, self.revision)
            self.cached = path
            _count(self.address)
        return self.cached


class Ranges(io.RawIOBase):
    """A file on the Hub that can be read from its beginning; each read is one request for those bytes."""

    def __init__(self, file: HubFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size or 0}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._at + size if size >= 0 else self._file.size or 0
        data = self._file.front(stop)[self._at :]
        self._at += len(data)
        return data


def locate(text: str) -> HubFile:
    """Find a file of the Hub, and pin it to a commit: the revision's newest now, or else the one in the cache.

    Raises:
        HubError: there is no such repository, revision or file, or none that may be read; the Hub cannot be reached
            and the cache has not the file; or the repository has several artifacts and the address names none.
    """
    asked = Address.parse(text)
    if asked.pinned and asked.path and (path := _cached(asked)) is not None:
        return HubFile(text, asked, cached=path)
    with explained(asked, text):
        try:
            return _ask(text, asked, patient=False)
        except (RevisionNotFoundError, RemoteEntryNotFoundError, HubError):
            raise
        except Exception as error:
            if (found := _from_cache(text, asked)) is not None:
                return found
            if not _passes(error):
                raise
        return _ask(text, asked, patient=True)


def artifacts(text: str) -> list[Address]:
    """Return the addresses of a repository's artifacts, in alphabetical order. `text` names no file.

    Raises:
        HubError: there is no such repository or revision, or none that may be read; it has no artifact; or the Hub
            cannot be reached and the cache has nothing of it.
    """
    asked = Address.parse(text)
    if asked.path:
        raise HubError(f"{text} names a file; expected a repository: {replace(asked, path='')}")
    with explained(asked, text):
        try:
            _, paths = _list(text, asked)
        except RevisionNotFoundError:
            raise
        except Exception:
            if (found := _snapshot(asked)) is None:
                raise
            _, paths = found
    return [replace(asked, path=path) for path in _artifacts(text, asked, paths)]


def _list(text: str, asked: Address) -> tuple[str, list[str]]:
    """Ask the Hub for a revision's commit and files."""
    info = HfApi(**CALLER).model_info(asked.repo, revision=asked.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return _commit(text, info.sha), [each.rfilename for each in info.siblings or []]


def _ask(text: str, asked: Address, patient: bool) -> HubFile:
    """Ask the Hub for a file's commit, size and digest; `patient`: with huggingface_hub's pauses and repetitions."""
    address = asked
    if not address.path:
        commit, paths = _list(text, asked)
        address = replace(asked, revision=commit, path=_only(text, asked, paths))
    url = hf_hub_url(address.repo, address.path, revision=address.revision)
    told = get_hf_file_metadata(url, retry_on_errors=patient, **CALLER)
    address = replace(address, revision=_commit(text, told.commit_hash))
    if told.size is None or told.etag is None:
        raise HubError(f"{text}: the Hub does not state the file's size and digest; check HF_ENDPOINT")
    revision = asked.revision or "main"
    cached = _cached(address)
    if cached is not None:
        _record(address, revision)
        return HubFile(text, address, cached=cached, revision=revision)
    return HubFile(text, address, told.size, told.etag, revision=revision)


def _commit(text: str, found: str | None) -> str:
    """Return a commit that the Hub named, which becomes a part of paths."""
    if re.fullmatch("[0-9a-f]{40}", found or "") is None:
        raise HubError(f"{text}: {constants.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT")
    return cast(str, found)


def _artifacts(text: str, asked: Address, paths: Iterable[str]) -> list[str]:
    """Return the artifacts among the files of a repository; if none is called so, its safetensors files."""
    files = sorted(path for path in paths if path.endswith(".safetensors"))
    found = [path for path in files if path.endswith(ARTIFACT)] or files
    if not found:
        raise HubError(f"{text}: {asked.repo} has no artifact; expected a file whose name ends in {ARTIFACT}")
    return found


def _only(text: str, asked: Address, paths: Iterable[str]) -> str:
    """Return the only artifact among the files of a repository."""
    found = _artifacts(text, asked, paths)
    if len(found) > 1:
        raise HubError(
            f"{text}: {asked.repo} has {len(found)} artifacts; name one, such as {replace(asked, path=found[0])}, of "
            f"{listed(found, 50)}"
        )
    return found[0]


def _passes(error: Exception) -> bool:
    """Return whether an error may be over after a pause."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return any(cls.__module__.startswith("httpx") for cls in type(error).__mro__)


def _range(address: Address, start: int, stop: int) -> bytes:
    """Return the bytes of a file from `start` to `stop`, and read no more than those, whatever the server sends."""
    url = hf_hub_url(address.repo, address.path, revision=address.revision)
    headers = build_hf_headers(**CALLER) | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    failure: Exception | None = None
    for _ in range(TRIES):
        data = bytearray()
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start  # a server that knows no ranges sends all
            try:  # an error that leaves the context would be taken for one of the request
                for piece in response.iter_raw():
                    data += piece
                    if len(data) >= skipped + stop - start:
                        break
            except Exception as error:
                failure = error
                continue
        if len(data) >= skipped + stop - start:
            return bytes(data[skipped : skipped + stop - start])
        failure = EOFError()
    assert failure is not None
    raise failure


def _at_most(file: HubFile) -> type[tqdm]:
    """Return a progress bar that ends a download of more bytes than stated. It is told before they are written."""
    size = cast(int, file.size)

    class Limit(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.network = str(kwargs.get("name")).endswith(".transfer")  # Xet's packed chunks
            self.seen = int(kwargs.get("initial") or 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += int(n or 0)
            if self.seen > size and not self.network:
                raise HubError(f"{file}: more than the {size:,} bytes arrive that the Hub stated; try again later")
            return super().update(n)

    return Limit


def _has_digest(path: Path, etag: str, size: int) -> bool:
    """Return whether a file has the digest that its etag is: SHA-256 of a large file, or git's of another."""
    if len(etag) == 64:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
    if len(etag) == 40:
        return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == etag
    return True


def _forget(path: Path) -> None:
    """Remove a file from the cache: the link of its name, and what it links to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _folder(repo: str) -> Path:
    """The folder of a repository in huggingface_hub's cache, whose layout its documentation describes."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _count(address: Address) -> None:
    """Ask for the head of the repository's config.json, by which the Hub counts a download."""
    url = hf_hub_url(address.repo, constants.CONFIG_NAME, revision=address.revision)
    with suppress(Exception):  # the repository may have none
        get_hf_file_metadata(url, retry_on_errors=False, **CALLER)


def _record(address: Address, revision: str) -> None:
    """Record in the cache which commit a branch or a tag was, as huggingface_hub does: for when the Hub is away."""
    file = _folder(address.repo) / "refs" / revision
    commit = cast(str, address.revision)
    if revision != commit and not (file.is_file() and file.read_text() == commit):
        with suppress(OSError, PopupError):  # the cache may be read-only
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, commit.encode())


def _cached(address: Address) -> Path | None:
    """Return a file at a commit that is in the cache."""
    found = try_to_load_from_cache(address.repo, address.path, revision=address.revision)
    return Path(found) if isinstance(found, str) else None


def _from_cache(text: str, asked: Address) -> HubFile | None:
    """Return what an address named when the Hub was last asked, if the file is in the cache.

    A file of the main branch may be there from an earlier commit, where another was asked for since.
    """
    revision, found = asked.revision or "main", _snapshot(asked)
    if found is not None:
        commit, paths = found
        address = replace(asked, revision=commit, path=asked.path or _only(text, asked, paths))
        if (cached := _cached(address)) is not None:
            return HubFile(text, address, cached=cached, revision=revision)
    if asked.revision is not None or not asked.path:
        return None
    earlier = sorted((_folder(asked.repo) / "snapshots").glob("*"), key=lambda folder: folder.stat().st_mtime)
    for folder in reversed(earlier):
        address = replace(asked, revision=folder.name)
        if address.pinned and (cached := _cached(address)) is not None:
            log.warning("%s is read from the cache, as it was in the commit %s", text, folder.name)
            return HubFile(text, address, cached=cached, revision=revision)
    return None


def _snapshot(asked: Address) -> tuple[str, list[str]] | None:
    """Return a revision's commit and the safetensors files of it that are in the cache; None if there are none."""
    commit = asked.revision or "main"
    if not asked.pinned:
        ref = _folder(asked.repo) / "refs" / commit
        if not ref.is_file():
            return None
        commit = ref.read_text().strip()
    snapshot = _folder(asked.repo) / "snapshots" / commit
    paths = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.safetensors")]
    return (commit, paths) if paths else None
