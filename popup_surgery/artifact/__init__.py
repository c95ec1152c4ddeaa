"""The popup artifact: a seed and one bit per weight in a safetensors file. Format: docs/artifact-format.md."""

from .manifest import Manifest
from .reader import inspect
from .restore import load
from .verification import Verification, verify
from .warm_start import start_from, stored_masks
from .writer import save

__all__ = ["Manifest", "Verification", "inspect", "load", "save", "start_from", "stored_masks", "verify"]
