"""What a process does with memory that it has freed."""

import subprocess
import sys

import pytest

FREES = """
import torch
from popup_surgery import malloc
from popup_surgery.experiment.machine import memory
for change in (lambda: None, malloc.keep_freed_memory, malloc.return_freed_memory):
    change()
    large = torch.ones(64 << 20)
    held = memory().now
    del large
    print(held - memory().now > 200 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process")
def test_freed_memory_stays_with_a_training_process_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
