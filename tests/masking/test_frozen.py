"""Layers that came frozen, and lazy ones."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import ConversionError, NothingToConvert, bake, convert, load, masks, plan, save
from support import equal_states


class Distribution(nn.Module):
    """YOLO's DFL: a convolution whose weights are 0 … 15 turns a distribution into its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.softmax(1))


def detector() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "dfl": Distribution()})


def test_a_frozen_layer_stays_as_it_is_and_the_plan_and_the_log_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = plan(detector(), 0.5)
    assert [weight.key for weight in planned.masked] == ["body.weight"]
    line = next(line for line in str(planned).splitlines() if line.split()[:1] == ["dfl.conv.weight"])
    assert "stays, frozen" in line
    assert "came frozen, and include does not name it" in line
    for others in ("frozen", "train"):
        net: Any = convert(detector(), 0.5, others=others)
        assert torch.equal(net["dfl"].conv.weight.view(-1), torch.arange(16.0))
        assert not net["dfl"].conv.weight.requires_grad, "nor is it trained"
        assert type(net["dfl"].conv) is nn.Conv2d
    assert "(seed 0): body.weight" in caplog.text
    assert "left as they came, frozen: dfl.conv.weight; name a layer in include to mask it" in caplog.text
    caplog.clear()
    convert(net, 0.5)  # completes nothing, and says nothing
    assert not caplog.text
    net = convert(detector(), 0.5)
    save(net, tmp_path / "net")
    assert equal_states(load(tmp_path / "net", detector()), bake(net))
    net["head"] = nn.Conv2d(1, 4, 1)
    net["head"].requires_grad_(False)  # as of timm's methods, which make new layers in the image of masked ones
    convert(net)
    assert list(masks(net)) == ["body.weight", "head.weight"]
    assert torch.equal(net["dfl"].conv.weight.view(-1), torch.arange(16.0))
    save(net, tmp_path / "net")


@pytest.mark.parametrize("include", ["*", "dfl", "dfl.conv", ["body", "dfl.*"]])
def test_include_masks_a_frozen_layer(include: Any) -> None:
    net = convert(detector(), 0.5, include=include)
    assert "dfl.conv.weight" in masks(net)


def test_include_of_others_leaves_it() -> None:
    assert list(masks(convert(detector(), 0.5, include="body"))) == ["body.weight"]


@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "pretrained"])
def test_a_network_that_is_frozen_as_a_whole_is_converted_as_one_that_is_not(scheme: str) -> None:
    net, other = detector().requires_grad_(False), detector()
    other["dfl"].requires_grad_(True)
    assert plan(net, scheme=scheme) == plan(other, scheme=scheme)
    assert equal_states(convert(net, scheme=scheme), convert(other, scheme=scheme))
    assert net["dfl"].conv.weight_score.requires_grad


@pytest.mark.parametrize("part", ["norm", "norm.bias"])
def test_frozen_norms_make_no_network_frozen_as_a_whole(part: str) -> None:
    net = detector()
    for name, parameter in net.named_parameters():
        if name.startswith(part):
            parameter.requires_grad_(False)
    assert list(masks(convert(net))) == ["body.weight"]


def test_a_frozen_part_keeps_its_values_and_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    """Of a network with a frozen backbone only what was to be trained is converted, and the log names the rest."""
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    net(torch.randn(8, 3, 6, 6) + 3)
    net[:2].requires_grad_(False)
    net[0].bias.data.fill_(2)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    convert(net, others="train")
    assert list(masks(net)) == ["3.weight"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items() if key[0] in "01")
    assert "left as they came, frozen: 0.weight, 0.bias, 1.weight, 1.bias" in caplog.text


def test_fixed_positions_and_embeddings_that_came_frozen_stay() -> None:
    net: Any = nn.ModuleDict({"words": nn.Embedding.from_pretrained(torch.ones(5, 4)), "head": nn.Linear(4, 3)})
    net.pos_embed = nn.Parameter(torch.full((1, 7, 4), 2.0), requires_grad=False)
    convert(net)
    assert net.pos_embed.eq(2).all()
    assert net["words"].weight.eq(1).all()


def test_a_frozen_bias_of_a_masked_layer_is_that_of_a_masked_layer() -> None:
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    convert(layer)
    assert not layer.bias.any()


def test_what_a_conversion_froze_did_not_come_frozen() -> None:
    net: Any = nn.ModuleDict({"part": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    convert(net["part"], exclude="1")
    assert not net["part"][1].weight.requires_grad
    convert(net)
    assert list(masks(net)) == ["part.0.weight", "part.1.weight", "head.weight"]


def test_nothing_is_left_but_frozen_layers() -> None:
    with pytest.raises(
        NothingToConvert, match=r"exclude='body' leaves only layers that came frozen: dfl\.conv; include"
    ):
        plan(detector(), exclude="body")


def test_the_log_names_the_layers_that_lost_their_weights(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "popup_surgery")
    convert(nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))))
    assert "weights of 12 layers with random ones (seed 0): 0.weight, 1.weight" in caplog.text
    assert "9.weight and 2 more" in caplog.text


# lazy

LAZY = [name for name in dir(nn) if name.startswith("Lazy")]


def lazy(name: str) -> Callable[[], nn.Module]:
    sizes = ([] if "Norm" in name else [4]) + ([3] if "Conv" in name else [])
    return lambda: getattr(nn, name)(*sizes)


def lazy_parameter() -> nn.Module:
    module = nn.Module()
    module.scale = nn.UninitializedParameter()
    return module


def lazy_buffer() -> nn.Module:
    module = nn.Module()
    module.register_buffer("scale", nn.UninitializedBuffer())
    return module


def loaded() -> nn.Module:
    """A lazy layer that has got its shape from a checkpoint. Its first forward would still change its class."""
    layer = nn.LazyLinear(4)
    layer.load_state_dict(nn.Linear(3, 4).state_dict())
    return layer


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    "kind", [*map(lazy, LAZY), lazy_parameter, lazy_buffer, loaded], ids=[*LAZY, "p", "b", "loaded"]
)
@pytest.mark.parametrize("verb", [plan, convert])
def test_whatever_is_lazy_is_refused_with_one_sentence(kind: Callable[[], nn.Module], verb: Callable[..., Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind())
    for options in ({}, {"exclude": "1"}, {"include": "0"}):
        with pytest.raises(
            ConversionError, match=r"^1 is lazy and has no shape yet; pass one batch through the network first$"
        ):
            verb(net, **options)
    assert type(net[0]) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_network_is_converted_after_a_batch() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))
    net(torch.randn(2, 3, 6, 6))
    assert list(masks(convert(net))) == ["0.weight", "3.weight"]
