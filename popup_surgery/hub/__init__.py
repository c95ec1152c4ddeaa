"""Files on the Hugging Face Hub: their addresses, and how they come here. What they hold is read by `artifact`."""

from .address import Address, is_address, suggestion

__all__ = ["Address", "is_address", "suggestion"]
