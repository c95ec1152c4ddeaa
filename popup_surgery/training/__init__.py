"""Learning a mask: the recipe says how, the data feeds it, the loop does it."""

from .recipe import Recipe

__all__ = ["Recipe"]
