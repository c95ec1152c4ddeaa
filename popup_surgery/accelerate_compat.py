"""Every private name of Accelerate that the package uses, under a public name. `tests/test_compat.py` tests each."""

from accelerate.state import AcceleratorState


def forget_settings() -> None:
    """Let the next `Accelerator` of this process use another precision than the one before. The processes stay joined.

    Accelerate keeps one state per process and refuses a second precision in it. Tried on Accelerate 1.15.
    """
    AcceleratorState._reset_state()
