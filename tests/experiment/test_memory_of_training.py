"""What a process does with memory that it has freed."""

import subprocess
import sys

import pytest

KEEPS = """
import torch
from popup_surgery.experiment.machine import keep_freed_memory, memory
if {keep}:
    keep_freed_memory()
large = torch.ones(64 << 20)
held = memory().now
del large
print(held - memory().now)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_stays_with_a_training_process_alone(keep):
    done = subprocess.run([sys.executable, "-c", KEEPS.format(keep=keep)], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1 << 20) is keep
