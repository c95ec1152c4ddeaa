"""What a file that is no popup artifact says about its network: how it is built, and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ArtifactError
from ..models.architecture import Architecture
from .strict_json import canonical, parse


@dataclass(frozen=True)
class About:
    """How a network is built, and how it was made, as a file of dense weights or an ONNX file says it."""

    architecture: Architecture
    provenance: Mapping[str, Any]

    def text(self) -> str:
        """Return the description as `read_about` takes it."""
        return canonical({"architecture": asdict(self.architecture), "provenance": dict(self.provenance)})


def read_about(text: Any, key: str) -> About:
    """Read the description in a file's metadata, which has it under `key`.

    Raises:
        ArtifactError: it is no such text.
    """
    values = parse(text, f"the metadata {key}") if isinstance(text, str) else None
    values = values if isinstance(values, dict) else {}
    found, provenance = values.get("architecture"), values.get("provenance")
    if not isinstance(found, dict) or not isinstance(provenance, dict):
        raise ArtifactError(f"the metadata {key} has no architecture or no provenance")
    texts = [found.get(part) for part in ("library", "name", "version")]
    if not all(isinstance(value, str) for value in texts) or not isinstance(found.get("kwargs"), dict):
        raise ArtifactError(f"the metadata {key} has an architecture of {json.dumps(found)[:60]}")
    library, name, version = map(str, texts)
    return About(Architecture(library, name, found["kwargs"], version), provenance)
