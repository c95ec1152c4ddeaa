"""Time of one training step: dense, with a sort-based mask, and with ours. The three are interleaved in one run.

    python benchmarks/step.py [--pairs 15] [--only conv4] [--output benchmarks/results/step.json]

The sort-based layer implements the paper's text with PyTorch's own operators: sort all |scores| of a layer, write a
mask of zeros and ones in that order, multiply, and pass the gradient through. On a GPU the batch of most networks is
256, and the forward pass runs in bfloat16. There, dense and ours are also measured as CUDA graphs, as `training.graph`
captures them.

A second line has nanoseconds a weight: what ours adds to a dense step, and what its parts take on the network's
largest layer, beside a plain copy of as many bytes (12 a weight: score and weight are read, the masked one written).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import popup_surgery as ps
import popup_surgery.learners.base
import popup_surgery.selection
from popup_surgery.experiment.machine import processor
from popup_surgery.malloc import keep_freed_memory
from popup_surgery.selection.pattern import Pattern, select_pattern
from popup_surgery.training.graph import WARM, CudaGraph

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


@dataclass(frozen=True)
class Case:
    """A network, the images of a step, and whether the forward pass runs in bfloat16."""

    name: str
    batch: int
    pixels: int = 32
    bfloat16: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    *(Case(f"popup_surgery/{net}", 128) for net in ("conv2", "conv4", "conv8")),
    Case("timm/resnet50", 8, 224),
    *(Case("timm/resnet18", 32, 64, bfloat16) for bfloat16 in (False, True)),
    *(Case("timm/vit_small_patch16_224", 2, 224, bfloat16) for bfloat16 in (False, True)),
    *(Case("timm/vit_tiny_patch16_224", 8, 224, bfloat16) for bfloat16 in (False, True)),
)
ON_GPU = tuple(replace(case, batch=256, bfloat16=True) for case in CASES[:4])


def stepper(model: nn.Module, x: Tensor, y: Tensor, bfloat16: bool) -> Callable[[], None]:
    """Return a function that makes one training step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that makes the same step as a CUDA graph."""
    graph = CudaGraph()
    for _ in range(WARM):
        graph.run(step)
    graph.capture(step)
    return graph.replay


def timed(work: Callable[[], object], gpu: bool) -> float:
    """Return the seconds that `work` takes."""
    if gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def parts(net: nn.Module, pairs: int) -> dict[str, float]:
    """Return the nanoseconds a weight of the parts of a step, on the largest layer of a converted network."""
    layers: list[Any] = [module for module in net.modules() if hasattr(module, "weight_score")]
    layer = max(layers, key=lambda module: module.weight_score.numel())
    score: Tensor = layer.weight_score
    weight, grad = layer._parameters["weight"], torch.randn_like(score)
    kept = ps.selection.kept_count(score.numel(), K)
    neighbours = Pattern(2, 4, score.shape[1], score[0, 0].numel())
    masked = layer.weight
    mask = ps.selection.select([score], kept).masks[0]
    source, target = (torch.zeros(score.numel() * 3 // 2, device=score.device) for _ in range(2))
    work = {
        "copy": lambda: target.copy_(source),
        "select": lambda: ps.selection.select([score], kept),
        "select_2:4": lambda: select_pattern(score, neighbours),
        "mask": lambda: ps.learners.base.masked(weight, mask),
        "backward": lambda: torch.autograd.grad(masked, score, grad, retain_graph=True),
    }
    taken = {part: [timed(each, score.is_cuda) for _ in range(pairs + 2)][2:] for part, each in work.items()}
    return {part: round(1e9 * statistics.median(found) / score.numel(), 2) for part, found in taken.items()}


def measure(case: Case, pairs: int, device: torch.device) -> dict[str, object]:
    """Return the median times of one network's training step, dense, by sorting and ours, interleaved."""
    torch.manual_seed(0)
    build = partial(ps.build, case.name, **case.arguments)
    make: dict[str, Callable[[], nn.Module]] = {
        "dense": build,
        "dense_again": build,
        "sort": lambda: with_sort(build()),
        "ours": lambda: ps.convert(build(), K, scaled=False),
    }
    x = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    y = torch.randint(10, (case.batch,), device=device)
    if x.is_cuda:
        make |= {f"{kind}_graph": make[kind] for kind in ("dense", "ours")}
    nets = {kind: each().to(device).train() for kind, each in make.items()}
    steps = {kind: stepper(net, x, y, case.bfloat16) for kind, net in nets.items()}
    steps |= {kind: captured(step) for kind, step in steps.items() if kind.endswith("_graph")}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(pairs + 2):
        kinds = list(steps)
        kinds = kinds[round_ % len(kinds) :] + kinds[: round_ % len(kinds)]  # every kind comes first in turn
        for kind in kinds:
            taken = timed(steps[kind], x.is_cuda)
            if round_ >= 2:
                seconds[kind].append(taken)
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds[kind], seconds["dense"], strict=True))
        for kind in steps
        if kind != "dense"
    }
    weights = sum(score.numel() for name, score in nets["ours"].named_parameters() if name.endswith("_score"))
    added = statistics.median(a - b for a, b in zip(seconds["ours"], seconds["dense"], strict=True))
    nanoseconds = {"added": round(1e9 * added / weights, 2), **parts(nets["ours"], pairs)}
    precision = "bfloat16" if case.bfloat16 else "float32"
    result = {
        "network": case.name,
        "batch": case.batch,
        "pixels": case.pixels,
        "precision": precision,
        "weights": weights,
        "pairs": pairs,
        "dense_ms": round(1e3 * statistics.median(seconds["dense"]), 2),
        **{f"{kind}_over_dense": round(ratio, 3) for kind, ratio in ratios.items()},
        "nanoseconds_a_weight": nanoseconds,
    }
    print(
        f"{case.name:32} batch {case.batch:3} {precision:8}  dense {result['dense_ms']:8.1f} ms  "
        f"{'  '.join(f'{kind} × {ratio:.3f}' for kind, ratio in ratios.items()).replace('_', ' ')}\n"
        f"    ns a weight: {'  '.join(f'{part} {value}' for part, value in nanoseconds.items())}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="measured rounds for each network")
    parser.add_argument("--only", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    arguments = parser.parse_args()
    keep_freed_memory()  # as the training command does
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    where = torch.cuda.get_device_name() if gpu else f"{processor()[0]}, {torch.get_num_threads()} threads"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": where, "torch": torch.__version__, "k": K, "steps": (steps := [])}
    for case in ON_GPU if gpu else CASES:
        if not arguments.only or arguments.only in case.name:
            steps.append(measure(case, arguments.pairs, device))
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")  # partial results, in case it is cut off


if __name__ == "__main__":
    main()
