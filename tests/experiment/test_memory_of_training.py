"""What a process does with memory that it has freed."""

import subprocess
import sys

import pytest

FREES = """
import torch
from popup_surgery import malloc
from popup_surgery.experiment.machine import memory
for what in {what}:
    getattr(malloc, what + "_freed_memory")()
large = torch.ones(64 << 20)
held = memory().now
del large
print(held - memory().now)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process")
@pytest.mark.parametrize(("what", "kept"), [(["keep"], True), ([], False), (["keep", "return"], False)])
def test_freed_memory_stays_with_a_training_process_alone(what: list[str], kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", FREES.format(what=what)], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1 << 20) is kept
