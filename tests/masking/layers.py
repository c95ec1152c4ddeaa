"""Layers and small networks of every kind, and what their masks should be by a stable sort."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from popup_surgery import convert
from popup_surgery.learners import LEARNERS
from popup_surgery.masking.layer import is_masked
from popup_surgery.selection import kept_count
from support import slow_except, top

K = 0.4


class Block(nn.Module):
    """A network with a weight-standardised convolution, which reads its weight twice, and a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = StdConv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "StdConv2d": (lambda: StdConv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
}


every_layer = pytest.mark.parametrize("kind", slow_except(LAYERS, ["Linear", "Conv2d", "ConvTranspose1d", "StdConv2d"]))


every_learner = pytest.mark.parametrize("learner", LEARNERS)


def make(kind: str, learner: str = "edge_popup", **settings: Any) -> tuple[Any, Tensor]:
    build, shape = LAYERS[kind]
    k = K if LEARNERS[learner].takes_k else None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layer: Any = convert(build(), k, learner=learner, **settings)
    if LEARNERS[learner].starts_whole:  # scores on both sides of the threshold
        scores = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(2))
        layer.weight_score.data.copy_(0.01 * scores)
    return layer, x


def trains(learner: str) -> bool:
    return LEARNERS[learner].trains


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def sequential() -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def layers_of(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if is_masked(module)]


def raw(layer: Any) -> Any:
    return layer._parameters["weight"]


def right(layer: Any, k: float = K) -> Tensor:
    """The weight that the layer should have by its scores as they are now."""
    score = layer.weight_score.detach().clone()
    return torch.where(top([score], kept_count(score.numel(), k))[0], raw(layer).detach(), 0.0)


def right_globally(net: nn.Module, k: float = K) -> list[Tensor]:
    found = layers_of(net)
    scores = [layer.weight_score.detach().clone() for layer in found]
    chosen = top(scores, kept_count(sum(score.numel() for score in scores), k))
    return [torch.where(mask, raw(layer).detach(), 0.0) for mask, layer in zip(chosen, found, strict=True)]


def reverse(score: Tensor) -> Tensor:
    """Other scores of the same shape, of which others are the largest."""
    flat = score.detach().clone().reshape(-1)
    flat[flat.abs().argsort()] = flat[flat.abs().argsort(descending=True)]
    return flat.view(score.shape).contiguous()


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    optimizer.zero_grad()
    net(images(seed)).square().sum().backward()
    optimizer.step()


def check_ten_steps(
    net: Any,
    right: Callable[[list[Tensor]], list[Tensor]],
    values: Callable[[Tensor, Tensor], Tensor] = lambda weight, mask: weight,
) -> None:
    """Compare a converted `sequential` with plain PyTorch: w_eff = v · m, ∂L/∂s = ∂L/∂w_eff · v · sign(s).

    Args:
        right: the masks m for the scores of all layers.
        values: v, constant in the backward pass, from a weight and its mask.
    """
    weights = [raw(layer).detach() for layer in layers_of(net)]
    scores = [layer.weight_score.detach().clone().requires_grad_() for layer in layers_of(net)]
    settings: Any = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3}
    mine = torch.optim.SGD([layer.weight_score for layer in layers_of(net)], **settings)
    theirs = torch.optim.SGD(scores, **settings)
    first = right(scores)
    for step in range(10):
        for optimizer in (mine, theirs):
            optimizer.zero_grad()
        net(images(step)).square().mean().backward()
        conv, linear = (
            values(w, m) * (m.float() + s.abs() - s.abs().detach())
            for w, m, s in zip(weights, right(scores), scores, strict=True)
        )
        features = nn.functional.conv2d(images(step), conv).relu().flatten(1)
        nn.functional.linear(features, linear).square().mean().backward()
        mine.step()
        theirs.step()
    for layer, score, mask in zip(layers_of(net), scores, right(scores), strict=True):
        torch.testing.assert_close(layer.weight_score.detach(), score.detach())
        assert torch.equal(layer.weight != 0, mask)
    assert any(not torch.equal(*pair) for pair in zip(first, right(scores), strict=True))


def with_scores(net: Any, seed: int) -> Any:
    """The same network with scores drawn from a seed."""
    for key, score in net.named_parameters():
        if key.endswith("_score"):
            score.data.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(seed)))
    return net
