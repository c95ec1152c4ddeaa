"""Recipes: the keys, their types and defaults, and where the shipped files are."""

from .schema import Recipe

__all__ = ["Recipe"]
