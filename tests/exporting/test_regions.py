"""Which convolutions become int8: those that save more than the borders of their region cost."""

import onnx
import pytest
import torch
from torch import Tensor, nn

from popup_surgery.exporting.program import trace
from popup_surgery.exporting.regions import Regions
from popup_surgery.exporting.to_onnx import to_onnx, to_proto


def worth(model: nn.Module, *size: int) -> list[str]:
    """Return the convolutions of a network that become int8, by name."""
    graph = to_proto(to_onnx(trace(model.eval(), torch.randn(1, *size)), "images", ["logits"]))
    convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    return sorted(Regions(graph).worth(convolutions))


def pointwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1)


@pytest.mark.slow
def test_size_decides_for_a_convolution_alone() -> None:
    assert worth(pointwise(16, 64), 16, 14, 14) == []
    assert worth(pointwise(64, 64), 64, 28, 28) == ["node_conv2d"]
    assert worth(nn.Conv2d(3, 32, 3, padding=1), 3, 64, 64) == []  # many places of the kernel, few multiply-adds


def test_convolutions_that_follow_each_other_share_their_borders() -> None:
    small = nn.Sequential(pointwise(32, 32), nn.ReLU(), pointwise(32, 32), nn.ReLU(), pointwise(32, 32))
    assert worth(small, 32, 28, 28) == ["0", "2", "4"]
    apart = nn.Sequential(pointwise(32, 32), nn.GELU(), pointwise(32, 32), nn.GELU(), pointwise(32, 32))
    assert worth(apart, 32, 28, 28) == []


class Residual(nn.Module):
    """A sum of two branches, and a branch that goes through float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pointwise(128, 128), pointwise(128, 128)
        self.small = pointwise(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return x * self.small(x).sigmoid()


@pytest.mark.slow
def test_the_end_of_a_region_stays_if_it_saves_nothing() -> None:
    assert worth(Residual(), 128, 14, 14) == ["first", "second"]


@pytest.mark.slow
def test_the_sum_of_two_branches_is_inside() -> None:
    graph = to_proto(to_onnx(trace(Residual().eval(), torch.randn(1, 128, 14, 14)), "images", ["logits"]))
    kinds = {node.name: node.op_type for node in graph.graph.node}
    assert isinstance(graph, onnx.ModelProto)
    assert sorted(kinds[name] for name in Regions(graph).between({"first", "second"})) == ["Add", "Relu", "Relu"]
    assert [kinds[name] for name in Regions(graph).between({"second"})] == []
