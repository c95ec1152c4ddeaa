"""Networks by name: described, built with and without their initialisation, and with pretrained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import popup_surgery as ps
from popup_surgery import ConversionError, UnknownName, bake, build, convert, masks, plan
from popup_surgery.models.architecture import Origin, describe, origin_of
from popup_surgery.models.skip_init import Blank
from support import slow_except

# building by name


@pytest.mark.parametrize(
    "name",
    slow_except(["timm/resnet18", "torchvision/vit_b_16", "timm/convnext_atto", "conv4", "timm/levit_128s"], ["conv4"]),
)
def test_a_name_converts_as_the_built_network_does(name: str) -> None:
    named, built = convert(name, 0.4, seed=3), convert(build(name), 0.4, seed=3)
    ours, theirs = named.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert describe(named) == describe(built)
    buffers = dict(built.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in named.named_buffers())


def test_a_description_converts_too() -> None:
    model: Any = convert(ps.Architecture("timm", "resnet18", {"num_classes": 3}), 0.4)
    assert model.fc.out_features == 3
    assert masks(model)["fc.weight"].shape == (3, 512)
    with pytest.raises(UnknownName, match="unknown architecture 'resnet81'"):
        convert("resnet81")


def test_what_stays_random_is_initialised_under_the_seed() -> None:
    name = "timm/vit_dwee_patch16_reg1_gap_256"
    left = [other.key for other in plan(build(name)).rest if other.treatment.action == "left"]
    assert any("lambda_q1" in key for key in left)
    state = torch.get_rng_state()
    one = convert(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves torch's own generator alone
    torch.manual_seed(5)
    again, other = convert(name, seed=1), convert(name, seed=2)
    for key in left:
        assert torch.equal(one.get_parameter(key), again.get_parameter(key))
    key = next(key for key in left if "lambda_q1" in key)
    assert not torch.equal(one.get_parameter(key), other.get_parameter(key))
    assert one.get_parameter(key).std() == pytest.approx(0.1, rel=0.5)


def test_an_excluded_layer_is_initialised() -> None:
    model: Any = convert("timm/resnet18", exclude="fc")
    weight: Any = model.fc.weight
    assert weight.std() == pytest.approx(1 / (3 * 512) ** 0.5, rel=0.1)
    assert not weight.requires_grad


def test_blank_skips_random_filling_and_nothing_else() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512)
            self.head = nn.Linear(512, 4)
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            self.head.weight.data.mul_(1e-3)
            self.ones = nn.Parameter(torch.ones(3))
            nn.init.constant_(self.fc.bias, 0.5)
            self.token = nn.Parameter(torch.randn(4) * 0 + 2)
            self.reset = nn.Parameter(torch.empty(5))
            nn.init.normal_(self.reset)
            nn.init.zeros_(self.reset)
            self.register_buffer("index", torch.arange(6), persistent=False)
            self.register_buffer("noise", torch.empty(4).normal_())

    torch.manual_seed(0)
    with Blank() as blank:
        net: Any = Net()
    blanks = {name for name, parameter in net.named_parameters() if blank.is_blank(parameter)}
    assert blanks == {"fc.weight", "head.weight", "head.bias"}
    assert net.ones.eq(1).all()
    assert net.fc.bias.eq(0.5).all()
    assert net.token.eq(2).all()
    assert net.reset.eq(0).all()
    assert net.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert net.noise.std() > 0.1


def test_a_pretrained_scheme_by_name_needs_weights_that_exist() -> None:
    with pytest.raises(ConversionError, match="popup_surgery/conv4 has no pretrained weights"):
        convert("conv4", scheme="pretrained")
    with pytest.raises(ConversionError, match="popup_surgery/conv4 has no pretrained weights"):
        convert("conv4", scheme={"*": "pretrained"})


def test_loading_builds_without_initialising(tmp_path: Path) -> None:
    ps.save(convert("timm/resnet18"), tmp_path / "r.popup.safetensors")
    state = torch.get_rng_state()
    ps.load(tmp_path / "r.popup.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_baking_a_pretrained_network_forgets_its_base() -> None:
    model = bake(convert(build("timm/test_resnet")))
    assert origin_of(model) == Origin(describe(model))
