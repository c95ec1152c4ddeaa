"""Time of one training step: dense, with a sort-based mask, and with ours. The three are interleaved in one run.

    python benchmarks/step.py [--pairs 15] [--only conv4] [--output benchmarks/results/step.json]

The sort-based layer implements the paper's text with PyTorch's own operators: sort all |scores| of a layer, write a
mask of zeros and ones in that order, multiply, and pass the gradient through. On a GPU the batch is 256 and the forward
pass runs in bfloat16.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import popup_surgery as ps

K = 0.5


class SortMask(torch.autograd.Function):
    """A mask of the share K of largest scores, found by sorting all of them. The gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        mask = torch.zeros_like(score).flatten()
        order = score.flatten().sort().indices
        mask[order[int((1 - K) * score.numel()) :]] = 1
        return mask.view_as(score)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SortConv(nn.Conv2d):
    score: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * SortMask.apply(self.score.abs())
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SortLinear(nn.Linear):
    score: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * SortMask.apply(self.score.abs()), self.bias)


def with_sort(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.__class__ = SortConv if isinstance(module, nn.Conv2d) else SortLinear
            module.score = nn.Parameter(torch.empty_like(module.weight).uniform_(-0.1, 0.1))
    return model


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Return a function that makes one training step and returns its time in seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)
    gpu = x.is_cuda

    def step() -> float:
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def measure(name: str, batch: int, pairs: int, device: torch.device) -> dict[str, object]:
    """Return the median times of one network's training step, dense, by sorting and ours, interleaved."""
    torch.manual_seed(0)
    make = {
        "dense": lambda: ps.build(name),
        "dense_again": lambda: ps.build(name),
        "sort": lambda: with_sort(ps.build(name)),
        "ours": lambda: ps.convert(ps.build(name), K, scaled=False),
    }
    size, classes = ((224, 224), 1000) if "resnet" in name else ((32, 32), 10)
    x, y = torch.randn(batch, 3, *size, device=device), torch.randint(classes, (batch,), device=device)
    steps = {kind: stepper(build().to(device).train(), x, y) for kind, build in make.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(pairs + 2):
        kinds = list(steps)
        kinds = kinds[round_ % len(kinds) :] + kinds[: round_ % len(kinds)]  # every kind comes first in turn
        for kind in kinds:
            taken = steps[kind]()
            if round_ >= 2:
                seconds[kind].append(taken)
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds[kind], seconds["dense"], strict=True))
        for kind in ("dense_again", "sort", "ours")
    }
    result = {
        "network": name,
        "batch": batch,
        "pairs": pairs,
        "dense_ms": round(1e3 * statistics.median(seconds["dense"]), 2),
        **{f"{kind}_over_dense": round(ratio, 3) for kind, ratio in ratios.items()},
    }
    print(
        f"{name:22} batch {batch:3}  dense {result['dense_ms']:8.1f} ms  dense again × {ratios['dense_again']:.3f}  "
        f"sort × {ratios['sort']:.3f}  ours × {ratios['ours']:.3f}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="measured rounds for each network")
    parser.add_argument("--only", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    nets = [
        ("popup_surgery/conv2", 128),
        ("popup_surgery/conv4", 128),
        ("popup_surgery/conv8", 128),
        ("timm/resnet50", 8),
    ]
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": where, "torch": torch.__version__, "k": K, "steps": (steps := [])}
    for name, batch in nets:
        if not arguments.only or arguments.only in name:
            steps.append(measure(name, 256 if gpu else batch, arguments.pairs, device))
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")  # partial results, in case it is cut off


if __name__ == "__main__":
    main()
