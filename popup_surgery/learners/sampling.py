"""The network that a sampling learner shows: a new sample at each read, a named one, or the most probable network."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# per process, not per thread: autograd recomputes checkpointed forwards in its own threads
_name: str | None = None
_as_saved = False


@contextmanager
def sampled(*name: int) -> Iterator[None]:
    """Context manager: a learner that samples shows the same sample at every read.

    The sample is a function of `name`, the weight's stream name, the scores and the type of device. Processes that
    agree on these get the same sample. Other learners are not affected.

    Args:
        name: one integer or several, which name the sample.
    """
    global _name
    before, _name = _name, "/".join(map(str, name))
    try:
        yield
    finally:
        _name = before


@contextmanager
def as_saved() -> Iterator[None]:
    """Context manager: a learner that samples shows the network that a file would store, not a new one at each read."""
    global _as_saved
    before, _as_saved = _as_saved, True
    try:
        yield
    finally:
        _as_saved = before


def named(held: int | None) -> str | None:
    """Return the name of the sample that is shown now; None if there is none.

    Args:
        held: the sample that a file would store; None for the most probable network.
    """
    return str(held) if _name is None and _as_saved and held is not None else _name


def noise(like: Tensor, stream: str, held: int | None) -> Tensor | None:
    """Return uniform noise in 0 … 1, float32 of the shape of `like`, for a sample of the weight called `stream`.

    The noise belongs to the sample shown now, or comes from PyTorch's own generator. It is None if the most probable
    network is shown.
    """
    name = named(held)
    if name is None:
        return None if _as_saved else torch.rand_like(like)
    digest = hashlib.blake2b(f"{name}/{stream}".encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(like.shape, generator=generator, device=like.device)
