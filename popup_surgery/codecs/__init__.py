"""Codecs between masks and bytes: one file each, registered by name."""

from . import bitpack  # noqa: F401
from .base import CODECS, Codec, get_codec, register_codec

__all__ = ["CODECS", "Codec", "get_codec", "register_codec"]
