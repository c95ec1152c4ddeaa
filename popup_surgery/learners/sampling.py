"""Which network a learner that samples shows: another at each read, one that has a name, or the most probable."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# of the process and not of a thread: autograd recomputes checkpointed forwards in threads of its own
_name: str | None = None
_as_saved = False


@contextmanager
def sampled(*name: int) -> Iterator[None]:
    """Within it a learner that samples shows one and the same sample, wherever it is read.

    The sample is a function of `name`, one integer or several, of the weight's stream name, the scores and the kind of
    device: processes that agree on those agree on it. Other learners take no notice.
    """
    global _name
    before, _name = _name, "/".join(map(str, name))
    try:
        yield
    finally:
        _name = before


@contextmanager
def as_saved() -> Iterator[None]:
    """Within it such a learner shows the network that a file would hold, instead of another one at each read."""
    global _as_saved
    before, _as_saved = _as_saved, True
    try:
        yield
    finally:
        _as_saved = before


def named(held: int | None) -> str | None:
    """The name of the sample that is shown now; None where none is.

    Args:
        held: the sample that a file would hold; None for the most probable network.
    """
    return str(held) if _name is None and _as_saved and held is not None else _name


def noise(like: Tensor, stream: str, held: int | None) -> Tensor | None:
    """Uniform noise in 0 … 1, float32 of the shape of `like`, for a sample of the weight with that stream name.

    Of the sample shown now, or drawn from PyTorch's own generator; None where the most probable network is shown.
    """
    name = named(held)
    if name is None:
        return None if _as_saved else torch.rand_like(like)
    digest = hashlib.blake2b(f"{name}/{stream}".encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(like.shape, generator=generator, device=like.device)
