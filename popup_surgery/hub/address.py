"""Addresses of files on the Hub, such as `hf://user/repo@revision/name.popup.safetensors`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from ..errors import HubError

PREFIX = "hf://"
EXPECTED = "expected hf://user/repo, hf://user/repo/file or hf://user/repo@revision/file"
_COMMIT = re.compile("[0-9a-f]{40}")
_SPECIAL = re.compile(r"refs/(pr/\d+|convert/[\w.-]+)")  # revisions whose slashes are written as they are


@dataclass(frozen=True)
class Address:
    """A model repository on the Hub, or a file in it.

    Attributes:
        repo: `user/name`.
        revision: a branch, a tag, a ref such as `refs/pr/1`, or a commit. None: the branch `main`.
        path: the file's path in the repository; empty for the repository's only artifact.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address as huggingface_hub's file system does; a slash in a revision is written %2F.

        Raises:
            HubError: it is no address of a model repository or of a file in one.
        """
        from huggingface_hub.errors import HfUriError
        from huggingface_hub.utils import parse_hf_uri

        try:
            found = parse_hf_uri(text)
        except HfUriError:
            raise HubError(f"{text} is no address of a repository on the Hub; {EXPECTED}") from None
        if found.type != "model":
            raise HubError(f"{text} is the address of a {found.type}; expected a model repository: hf://user/repo")
        parts = found.path_in_repo.split("/") if found.path_in_repo else []
        if {".", "..", ""} & {*parts, *(found.revision or "main").split("/")} or any("\\" in part for part in parts):
            raise HubError(f"{text} has a path with '.', '..' or '\\'; {EXPECTED}")
        return cls(found.id, found.revision, "/".join(parts))

    @property
    def name(self) -> str:
        """The file's name, or the repository's if the address names no file."""
        return (self.path or self.repo).rpartition("/")[2]

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision or "") is not None

    def __str__(self) -> str:
        revision = self.revision or ""
        if not _SPECIAL.fullmatch(revision):
            revision = quote(revision, safe="")
        return f"{PREFIX}{self.repo}{'@' * bool(revision)}{revision}{'/' * bool(self.path)}{self.path}"


def is_address(source: object) -> bool:
    """Return whether a file is given by its address on the Hub. A Path is not: it has lost a slash."""
    return isinstance(source, str) and source.startswith(PREFIX)


def suggestion(path: str | Path) -> str:
    """Return the clause to add to "the file does not exist" if an address on the Hub was probably meant."""
    text = str(path)
    if text.startswith("hf:"):
        rest = re.sub("^hf:/*", "", text)
        return f"; for a file on the Hub write {PREFIX}{rest}, as text and not as a Path"
    if match := re.match(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/(models/)?([^/?#]+/[^/?#]+)(.*)", text):
        rest = re.sub(r"[?#].*", "", match.group(3)).rstrip("/")
        place = re.fullmatch(r"/(?:blob|resolve|raw|tree)/([^/]+)(?:/(.+))?", rest)
        revision, inner = (unquote(place.group(1)), unquote(place.group(2) or "")) if place else ("main", "")
        address = Address(match.group(2), None if revision == "main" else revision, inner)
        return f"; for this file on the Hub write {address}"
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?(/.+\.safetensors)?", text) and not text.startswith(".")
    first, second = [*text.split("/"), ""][:2]
    if looks and not second.endswith(".safetensors") and not os.path.exists(first):
        return f"; for a file on the Hub write {PREFIX}{text}"
    return ""
