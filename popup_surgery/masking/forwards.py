"""Which converted network runs a forward in this thread. The hooks that conversion leaves on its root note it."""

import threading
from typing import Any

from torch import nn


class Forward:
    """One forward of a root.

    Attributes:
        outer: the forward of another network that it is part of.
        made: what `together` has made for it; None before the first read of a masked weight.
    """

    made: Any = None

    def __init__(self, root: nn.Module, outer: "Forward | None") -> None:
        self.root, self.outer = root, outer


class _Running(threading.local):
    forward: Forward | None = None


_running = _Running()


def current() -> Forward | None:
    """Return the forward that this thread runs; None outside of any."""
    return _running.forward


def begin(root: nn.Module) -> None:
    """Note that a forward of `root` begins. If a network that contains `root` is running, its forward stays current."""
    outer = _running.forward
    if outer is not None and outer.root is root:  # it was interrupted, or calls itself
        outer = outer.outer
    if outer is None or all(module is not root for module in outer.root.modules()):
        _running.forward = Forward(root, outer)


def end(root: nn.Module) -> None:
    """Note that the forward of `root` is over."""
    if _running.forward is not None and _running.forward.root is root:
        _running.forward = _running.forward.outer
