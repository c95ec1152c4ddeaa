"""Codecs between masks and bytes: one file each, registered by name."""

from typing import Any

from ..plugins import load_entry_points
from . import bitpack, pattern_coded, range_coded  # noqa: F401
from .base import CODECS, Codec, get_codec, register_codec

__all__ = ["CODECS", "Codec", "get_codec", "register_codec"]


def _take(name: str, found: Any) -> None:
    if isinstance(found, Codec) and found.name not in CODECS:
        register_codec(found)


load_entry_points("codecs", _take)
