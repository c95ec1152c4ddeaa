"""From an image to the network's input."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Data
from ..errors import DataError
from ..weights.streams import words

DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise:
    """Convert images [..., channels, height, width] to the network's input: the last step, whatever the data set.

    uint8 becomes float32, mean about 0, std about 1; other dtypes stay. Then `data.permute_seed` permutes the pixels.
    """

    def __init__(self, config: Data, input_size: tuple[int, int, int], device: torch.device) -> None:
        channels, height, width = input_size
        mean, std = mean_std(config, channels)
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (mean, std))
        self.order: Tensor | None = None
        if config.permute_seed is not None:
            self.order = pixel_order(config.permute_seed, height, width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().sub_(self.mean).div_(self.std)
        if self.order is not None:
            images = images.flatten(-2)[..., self.order].view(images.shape)
        return images


def pixel_order(seed: int, height: int, width: int) -> Tensor:
    """Return which pixel of an image each pixel of the input is: int64 [height · width], both in row-major order.

    It is the order of random words: section 4 of docs/artifact-format.md.
    """
    drawn = words(seed, "pixels", f"{height}x{width}").random_raw(height * width)
    return torch.from_numpy(np.argsort(drawn, kind="stable"))


class ToBytes:
    """Convert a PIL image to uint8 [channels, height, width], as validation and prediction see it everywhere.

    Resize and centre-crop it, unless it has the network's size and `data.same_size` is not `crop`.
    """

    def __init__(self, config: Data, input_size: tuple[int, int, int]) -> None:
        self.size, self.keep = input_size[1:], config.same_size != "crop"
        self.resize = timm_transform(config, input_size, crop_pct=config.crop_pct, normalize=False)

    def __call__(self, image: Any) -> Tensor:
        if self.keep and image.size == self.size[::-1]:
            pixels = np.array(image)
            return torch.from_numpy(pixels.reshape(*self.size, -1)).permute(2, 0, 1)
        return self.resize(image)


def timm_transform(config: Data, input_size: tuple[int, int, int], **arguments: Any) -> Any:
    """Return `create_transform` of timm for a data section. `DataError` if timm does not take its values."""
    from timm.data import create_transform

    try:
        return create_transform(input_size, interpolation=config.interpolation, **arguments)
    except Exception as error:
        raise DataError(
            f"timm cannot make transforms of data.interpolation={config.interpolation!r}, "
            f"data.auto_augment={config.auto_augment!r} and the like: {error!r}"
        ) from error


def mean_std(config: Data, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation for images scaled to 0 … 1: the recipe's, or the usual ones."""
    mean = config.mean or (DEFAULT_MEAN if channels == 3 else [0.5] * channels)
    std = config.std or (DEFAULT_STD if channels == 3 else [0.5] * channels)
    return tuple(mean), tuple(std)
