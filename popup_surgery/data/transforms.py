"""From an image to a normalised tensor."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Data
from ..errors import DataError

DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise:
    """Convert uint8 images [..., channels, height, width] to float32, mean about 0, std about 1; keep other dtypes."""

    def __init__(self, config: Data, input_size: tuple[int, int, int], device: torch.device) -> None:
        mean, std = mean_std(config, input_size[0])
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return images.float().sub_(self.mean).div_(self.std)


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
