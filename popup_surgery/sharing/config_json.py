"""The config.json of a repository, by which the Hub counts downloads: the artifacts that are in it.

All of it is under one key, so that the config.json of another library keeps its own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PopupError
from .metadata import LIBRARY, Metadata
from .summary import Summary

KEY = "popup_surgery"


@dataclass(frozen=True)
class Recorded:
    """One artifact of a repository, as config.json has it.

    Attributes:
        summary: what the file says.
        file_sha256: digest of the whole file.
        picture: path of its picture; empty if there is none.
    """

    summary: Summary
    file_sha256: str
    picture: str


@dataclass(frozen=True)
class Config:
    """A config.json.

    Attributes:
        artifacts: by path.
        card: the metadata that was last written into the model card.
        others: the keys of somebody else.
    """

    artifacts: Mapping[str, Recorded] = field(default_factory=dict)
    card: Metadata = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str | None, what: str = "config.json") -> "Config":
        """Read a config.json; None if there is none. What is under our key and not ours is left out.

        Raises:
            PopupError: it is not a JSON object.
        """
        if text is None:
            return cls(others={"library_name": LIBRARY})
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PopupError(f"{what} is not JSON ({error}); mend it, or remove it and push again") from None
        if not isinstance(values, dict):
            raise PopupError(f"{what} is not a JSON object; mend it, or remove it and push again")
        own = values.pop(KEY, None)
        own = own if isinstance(own, dict) else {}
        entries, card = own.get("artifacts"), own.get("card")
        found = {path: _recorded(entry) for path, entry in (entries if isinstance(entries, dict) else {}).items()}
        known = {path: one for path, one in found.items() if one is not None}
        return cls(known, card if isinstance(card, dict) else {}, values)

    def text(self) -> str:
        """Return the config.json."""
        entries = {
            path: one.summary.record() | {"file_sha256": one.file_sha256, "picture": one.picture}
            for path, one in sorted(self.artifacts.items())
        }
        return json.dumps({**self.others, KEY: {"artifacts": entries, "card": self.card}}, indent=2) + "\n"


def _recorded(entry: Any) -> Recorded | None:
    summary = Summary.read(entry)
    if summary is None:
        return None
    digest, picture = entry.get("file_sha256"), entry.get("picture")
    return Recorded(summary, digest if isinstance(digest, str) else "", picture if isinstance(picture, str) else "")
