"""What a network returns: the answers of a classifier, the answers of auxiliary heads, or something else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from ..data.seeding import ambient_seed
from ..errors import DataError
from ..models.architecture import describe

Size = tuple[int, int, int]
REMEDY = "; set data.input_size to a size that it takes"

AUXILIARY: dict[type, float] = {GoogLeNetOutputs: 0.3, InceptionOutputs: 0.4}
"""Weight of the loss of each auxiliary head, by what the network returns in training.

Sources: Szegedy et al., "Going Deeper with Convolutions", 2015, section 5; PyTorch's tutorial on finetuning
torchvision's models, for Inception v3."""


def heads(output: Any) -> list[tuple[Tensor, float]]:
    """Return the logits in what a network returned in training, each with the weight of its loss; its own come first.

    Logits are float [images, classes].
    """
    weight = AUXILIARY.get(type(output))
    if weight is None:
        return [(output, 1.0)]
    first, *others = output
    return [(first, 1.0), *((other, weight) for other in others if other is not None)]


def logits_of(model: nn.Module, images: Tensor, remedy: str = "") -> Tensor:
    """Return the logits of a network in eval mode, [images, classes]; it stays in that mode.

    Raises:
        DataError: it does not take these images, or returns something else; with the `remedy`.
    """
    output = _returned(model.eval(), images, "does not take", remedy)
    _width(model, output, len(images), "")
    return output


def answers(model: nn.Module, size: Size) -> int:
    """Return the number of classes of a network, and leave it in eval mode.

    Raises:
        DataError: it does not take images of `size`, or returns something else than logits for each image.
    """
    device = next(model.parameters()).device
    return logits_of(model, torch.zeros(1, *size, device=device), REMEDY).shape[1]


def fewest_images(model: nn.Module, size: Size, classes: int) -> int:
    """Return the number of images that a network needs at a time to train: 2 if it has batch norms over 1 × 1 maps.

    It is tried; its buffers and its mode stay what they were.

    Raises:
        DataError: it does not train on images of `size`, or returns something in training that has no known loss.
    """
    device = next(model.parameters()).device
    with untouched(model), ambient_seed([0]):
        model.train()
        images = torch.randn(2, *size, device=device)
        for output, _ in heads(_returned(model, images, "does not train on", REMEDY)):
            if (found := _width(model, output, 2, " in training")) != classes:
                raise DataError(f"{_name(model)} returns {found} logits in training and {classes} otherwise")
        try:
            with torch.no_grad():
                model(images[:1])
        except Exception:  # torch raises a plain ValueError; other norms may raise another error
            return 2
    return 1


def _returned(model: nn.Module, images: Tensor, what: str, remedy: str) -> Any:
    try:
        with torch.no_grad():
            return model(images)
    except Exception as error:  # a library's network may raise anything
        shape = " × ".join(map(str, images.shape[1:]))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the network {what} images of {shape}{remedy}: {reason}") from error


def _width(model: nn.Module, output: Any, images: int, when: str) -> int:
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == images:
        return output.shape[1]
    found = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        found += f" of {', '.join(map(str, output))}"
    if isinstance(output, Tensor):
        found = f"a tensor of {' × '.join(map(str, output.shape))}"
    raise DataError(
        f"{_name(model)} returns {found}{when}; popup-surgery trains and evaluates networks that classify images, "
        f"whose output is a tensor of images × classes"
    )


def _name(model: nn.Module) -> str:
    architecture = describe(model)
    return f"{architecture.library}/{architecture.name}"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Context manager: give the buffers and the mode of each module back at the end."""
    before = [
        (module, module.training, [(name, buffer, buffer.clone()) for name, buffer in _buffers(module)])
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, mode, buffers in before:
                module.training = mode
                for name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
