"""Masks of a plain network's weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class WeightMasks:
    """Bool masks of parameters, by name. Weights outside them stay 0.

    They do so even if the optimiser changes weights whose gradient is 0. A mask may be changed in place between steps.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors = {name: mask.to(device, copy=True) for name, mask in masks.items()}
        self.weights = {name: model.get_parameter(name) for name in masks}

    def apply_during(self, optimizer: Optimizer) -> None:
        """Keep the weights outside the masks 0 through each step of `optimizer`."""
        for weight, mask in self:
            weight.register_hook(mask.mul)  # keeps the other weights out of the gradient norm
        if self.tensors:
            optimizer.register_step_post_hook(self.zero)

    @torch.no_grad()
    def zero(self, *_: Any) -> None:
        """Set the weights outside their masks to 0."""
        for weight, mask in self:
            weight.mul_(mask)

    def __iter__(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Iterate over each weight with its mask."""
        return ((weight, self.tensors[name]) for name, weight in self.weights.items())
