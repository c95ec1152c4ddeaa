"""Recipes: the keys, their types and defaults, and the files that come with the package."""

from .schema import Recipe

__all__ = ["Recipe"]
