"""The generators of Python, NumPy and PyTorch, started together."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def ambient_seed(entropy: list[int], gpu: bool = True) -> Iterator[None]:
    """Within it the generators of Python, NumPy and PyTorch start from `entropy`; after it they are as before."""
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
    """Start the generators of Python, NumPy and PyTorch from `entropy`; those of GPUs too, unless told otherwise."""
    first, second, third = map(int, np.random.SeedSequence(entropy).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    # where no GPU is in use, manual_seed writes down the whole stack, for a tenth of an image's time
    (torch.manual_seed if gpu else torch.default_generator.manual_seed)(third)
