"""Walks over a network that may be wrapped or converted."""

from collections.abc import Iterator

from torch import nn

from ..torch_compat import compiled_module
from .state import MaskedParam, slots_of


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and `torch.compile` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


def masked_weights(core: nn.Module) -> Iterator[tuple[str, nn.Module, str, MaskedParam]]:
    """Each masked weight once: its first `state_dict` key, its layer, its parameter's name and its slot."""
    seen = set()
    for prefix, module in core.named_modules():
        for name, slot in slots_of(module).items():
            if id(module._parameters[name]) not in seen:
                seen.add(id(module._parameters[name]))
                yield f"{prefix}.{name}" if prefix else name, module, name, slot
