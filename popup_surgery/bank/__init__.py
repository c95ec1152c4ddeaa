"""Many masks on one network: hold them at a bit a weight, switch between them in place, and find out which one fits."""

from .bank import MaskBank, Memory
from .inference import Inference

__all__ = ["Inference", "MaskBank", "Memory"]
