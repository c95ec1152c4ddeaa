"""The popup artifact: a seed and one bit per weight in a safetensors file. Format: docs/artifact-format.md."""

from .file import Artifact, inspect, load, masks, repack, stored_masks
from .manifest import Manifest
from .verification import Verification, verify
from .warm_start import start_from
from .writer import save

__all__ = [
    "Artifact",
    "Manifest",
    "Verification",
    "inspect",
    "load",
    "masks",
    "repack",
    "save",
    "start_from",
    "stored_masks",
    "verify",
]
