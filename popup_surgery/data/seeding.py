"""Seed the generators of Python, NumPy and PyTorch together."""

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def ambient_seed(entropy: list[int], gpu: bool = True) -> Iterator[None]:
    """Context manager: seed the generators of Python, NumPy and PyTorch from `entropy`, and restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if gpu and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        seed_generators(entropy, gpu)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_generators(entropy: list[int], gpu: bool = True) -> None:
    """Seed the generators of Python, NumPy and PyTorch from `entropy`, and those of GPUs unless `gpu` is False."""
    first, second, third = map(int, np.random.SeedSequence(entropy).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    # when no GPU is in use, manual_seed records the whole stack, which takes a tenth of an image's time
    (torch.manual_seed if gpu else torch.default_generator.manual_seed)(third)


@contextmanager
def host_generators() -> Iterator[Callable[[], bool]]:
    """Context manager: restore the host's generators afterwards. It yields a function: whether one of them drew."""

    def states() -> tuple[Any, Any, Tensor]:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    before = states()

    def drew() -> bool:
        now = states()
        return pickle.dumps(before[:2]) != pickle.dumps(now[:2]) or not torch.equal(before[2], now[2])

    try:
        yield drew
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
