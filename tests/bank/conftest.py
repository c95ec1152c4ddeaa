"""Fixtures: masks of a small network of timm's, on a seed and on pretrained weights."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from popup_surgery import build, convert, save

NAME = "timm/test_resnet"

Make = Callable[..., Path]


def trained(model: nn.Module, seed: int, size: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Give a converted network other scores and statistics, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("_score"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.train()
    dtype = next(p.dtype for name, p in model.named_parameters() if not name.endswith("_score"))
    model(torch.randn(8, *size, generator=generator).to(dtype))
    return model


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of `NAME`, as if they were pretrained."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(build(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Make:
    """`make("cars", classes=7, seed=3, …)`: a file of masks, on the seed or, with `pretrained=True`, on `weights`."""
    made: dict[str, Path] = {}

    def make(
        name: str,
        classes: int = 10,
        seed: int = 3,
        k: float | None = 0.5,
        dtype: torch.dtype = torch.float32,
        pretrained: bool = False,
        encoding: str = "bitpack",
        network: str = NAME,
        **settings: Any,
    ) -> Path:
        key = repr((name, classes, seed, k, dtype, pretrained, encoding, network, sorted(settings.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("masks") / f"{name}.popup.safetensors"
            model = build(network, num_classes=classes, pretrained=weights if pretrained else False).to(dtype)
            settings = {"scheme": "pretrained", **settings} if pretrained else settings
            convert(model, k, seed=seed, **settings)
            save(trained(model, zlib.crc32(key.encode())), path, encoding=encoding)
            made[key] = path
        return made[key]

    return make
