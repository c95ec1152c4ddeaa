"""The paper's networks, and networks of the libraries by name."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import popup_surgery
from popup_surgery import Architecture, ConversionError, UnknownName, build
from popup_surgery.models.architecture import KWARGS, check_kwargs, describe, input_size
from popup_surgery.models.libraries import names, resolve
from popup_surgery.models.paper_nets import NETS, ConvNet, conv2, conv4, conv6, conv8, fc

WEIGHTS = {"conv2": 4_300_992, "conv4": 2_425_024, "conv6": 2_261_184, "conv8": 5_275_840, "fc": 266_200}
CONVS = {
    "conv2": [64, 64],
    "conv4": [64, 64, 128, 128],
    "conv6": [64, 64, 128, 128, 256, 256],
    "conv8": [64, 64, 128, 128, 256, 256, 512, 512],
    "fc": [],
}


def meta(make: Callable[..., nn.Module], **kwargs: Any) -> Any:
    with torch.device("meta"):
        return make(**kwargs)


def convs_of(net: nn.Module) -> list[nn.Conv2d]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def linears_of(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


# the paper's networks --------------------------------------------------------------------------------------------


def test_every_network_is_here() -> None:
    paper = {"conv2": conv2, "conv4": conv4, "conv6": conv6, "conv8": conv8, "fc": fc}
    assert {name: NETS[name] for name in WEIGHTS} == paper
    assert set(NETS) == {*WEIGHTS, "cifar_resnet18", "fc_bn"}


def test_resnet18_for_small_images() -> None:
    net = NETS["cifar_resnet18"](num_classes=7, in_chans=1, img_size=(16, 24))
    assert net(torch.zeros(2, 1, 16, 24)).shape == (2, 7)
    assert input_size(net) == (1, 16, 24)
    assert net.conv1.stride == (1, 1)
    plain = meta(NETS["cifar_resnet18"])
    weights = [p.numel() for name, p in plain.named_parameters() if p.dim() > 1]
    assert sum(weights) == 11_164_352
    assert plain.input_size == (3, 32, 32)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_table_1(name: str) -> None:
    net = meta(NETS[name])
    assert sum(parameter.numel() for parameter in net.parameters()) == WEIGHTS[name]
    assert [conv.out_channels for conv in convs_of(net)] == CONVS[name]
    assert [linear.out_features for linear in linears_of(net)] == ([300, 100, 10] if name == "fc" else [256, 256, 10])


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_bias_no_norm_relu_and_pools(name: str) -> None:
    net: Any = meta(NETS[name])
    layers = [m for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Sequential)]
    assert {type(layer) for layer in layers} <= {nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear}
    assert all(layer.bias is None for layer in convs_of(net) + linears_of(net))
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.stride == (1, 1) for c in convs_of(net))
    kinds = [type(layer).__name__ for layer in net.features]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"] * (len(CONVS[name]) // 2)
    assert all(pool.kernel_size == pool.stride == 2 for pool in net.features if isinstance(pool, nn.MaxPool2d))
    assert [type(layer).__name__ for layer in net.classifier] == ["Flatten", *["Linear", "ReLU"] * 2, "Linear"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("width", [0.1, 0.5, 1.5, 2])
def test_width_scales_all_but_the_input_and_the_classes(name: str, width: float) -> None:
    net = meta(NETS[name], width=width)
    assert [conv.out_channels for conv in convs_of(net)] == [round(c * width) for c in CONVS[name]]
    hidden = [300, 100] if name == "fc" else [256, 256]
    assert [linear.out_features for linear in linears_of(net)] == [*(round(h * width) for h in hidden), 10]
    first = convs_of(net)[0].in_channels if CONVS[name] else linears_of(net)[0].in_features
    assert first == (784 if name == "fc" else 3)


def test_the_least_width_leaves_one_channel() -> None:
    net = conv4(width=1e-6)
    assert {conv.out_channels for conv in convs_of(net)} == {1}
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("chans", "size", "classes"), [(3, 32, 10), (1, 28, 7), (2, (16, 24), 10), (3, [17, 31], 1)])
def test_forward(name: str, chans: int, size: int | list[Any] | tuple[Any, ...], classes: int) -> None:
    make: Any = NETS[name]
    net = make(num_classes=classes, in_chans=chans, img_size=size, width=0.1)
    height, breadth = (size, size) if isinstance(size, int) else size
    assert net(torch.randn(3, chans, height, breadth)).shape == (3, classes)
    assert net.input_size == input_size(net) == (chans, height, breadth)
    assert linears_of(net)[-1].in_features == round((100 if name == "fc" else 256) * 0.1)


@pytest.mark.parametrize(("name", "least"), [("conv2", 2), ("conv4", 4), ("conv6", 8), ("conv8", 16), ("fc", 1)])
def test_img_size_must_survive_the_pools(name: str, least: int) -> None:
    assert meta(NETS[name], img_size=least, width=0.1).input_size[1:] == (least, least)
    if least > 1:
        with pytest.raises(ConversionError, match=rf"img_size is {least - 1}; .*at least {least} pixels"):
            NETS[name](img_size=least - 1)
        with pytest.raises(ConversionError, match=rf"img_size is .*{least - 1}.*at least {least} pixels"):
            NETS[name](img_size=(64, least - 1))


def test_defaults_are_those_of_the_paper() -> None:
    assert meta(conv8).input_size == (3, 32, 32)
    assert meta(fc).input_size == (1, 28, 28)


# build -----------------------------------------------------------------------------------------------------------


def test_build_ours() -> None:
    net = build("popup_surgery/conv4", width=0.25, num_classes=7, img_size=(16, 24))
    assert isinstance(net, ConvNet)
    assert net(torch.zeros(1, 3, 16, 24)).shape == (1, 7)
    kwargs = {"width": 0.25, "num_classes": 7, "img_size": [16, 24]}
    assert describe(net) == Architecture("popup_surgery", "conv4", kwargs, popup_surgery.__version__)
    assert input_size(net) == (3, 16, 24)


def test_build_timm() -> None:
    net = meta(build, name="timm/resnet18", num_classes=10, in_chans=1)
    assert type(net) is timm.models.ResNet
    assert net.fc.out_features == 10
    assert net.conv1.in_channels == 1
    assert describe(net) == Architecture("timm", "resnet18", {"num_classes": 10, "in_chans": 1}, timm.__version__)
    assert input_size(net) == (1, 224, 224)


def test_build_torchvision() -> None:
    net: Any = meta(build, name="torchvision/resnet18", num_classes=10)
    assert type(net) is torchvision.models.ResNet
    assert net.fc.out_features == 10
    assert describe(net) == Architecture("torchvision", "resnet18", {"num_classes": 10}, torchvision.__version__)
    assert input_size(net) is None


def test_build_torchvision_without_downloading_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("build downloads nothing")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    net = meta(build, name="torchvision/lraspp_mobilenet_v3_large", num_classes=3)
    assert describe(net).name == "lraspp_mobilenet_v3_large"


def test_bare_names_are_ours_then_timm_then_torchvision() -> None:
    assert resolve("conv4") == ("popup_surgery", "conv4")
    assert resolve("resnet50") == ("timm", "resnet50")
    assert resolve("torchvision/resnet50") == ("torchvision", "resnet50")
    assert resolve("raft_small") == ("torchvision", "raft_small")
    assert names("popup_surgery") == list(NETS)
    assert describe(meta(build, name="fc")).library == "popup_surgery"


def test_img_size_is_the_input_size() -> None:
    assert input_size(meta(build, name="timm/vit_tiny_patch16_224", img_size=32)) == (3, 32, 32)
    assert input_size(meta(build, name="timm/vit_tiny_patch16_224", img_size=(32, 48), in_chans=2)) == (2, 32, 48)
    assert input_size(meta(timm.create_model, model_name="resnet18")) == (3, 224, 224)
    assert input_size(nn.Linear(2, 3)) is None


def test_a_network_that_nobody_built_is_custom() -> None:
    assert describe(nn.Linear(2, 3)) == Architecture("custom", "Linear")


def test_names_of_the_layers_which_streams_and_files_depend_on() -> None:
    layers = ["features.0", "features.2", "classifier.1", "classifier.3", "classifier.5"]
    assert list(build("conv2", width=0.1).state_dict()) == [f"{name}.weight" for name in layers]


# bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet5O", r"unknown architecture 'resnet5O'.*resnet50"),
        ("resnet5000", r"unknown architecture 'resnet5000'.*resnet"),
        ("torchvision/resnet5O", r"unknown architecture 'resnet5O'.*resnet50"),
        ("popup_surgery/conv5", r"unknown architecture 'conv5'.*conv[2468]"),
        ("tim/resnet50", r"unknown library 'tim'.*timm"),
        ("a/b/resnet50", r"unknown library 'a/b'"),
        ("/resnet50", r"unknown library ''"),
        ("", r"unknown architecture ''"),
    ],
)
def test_unknown_names_list_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message) as caught:
        build(name)
    assert len(str(caught.value).rpartition(":")[2].split(", ")) <= 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_clases": 3}, r"cannot record the argument 'num_clases'.*num_classes"),
        ({"pretrained": True}, r"conv4 has no pretrained weights"),
        ({"num_classes": -1}, r"num_classes is -1; expected an integer from 0"),
        ({"num_classes": True}, r"num_classes is True; expected an integer"),
        ({"num_classes": 2.0}, r"num_classes is 2\.0; expected an integer"),
        ({"num_classes": 10**7}, r"num_classes is 10000000; expected"),
        ({"in_chans": 0}, r"in_chans is 0; expected an integer from 1"),
        ({"img_size": (32, 32, 32)}, r"img_size is \(32, 32, 32\); expected one or two integers"),
        ({"img_size": 0}, r"img_size is 0; expected"),
        ({"img_size": "32"}, r"img_size is '32'; expected"),
        ({"width": 0}, r"width is 0; expected a number above 0"),
        ({"width": float("nan")}, r"width is nan; expected a number above 0"),
        ({"width": True}, r"width is True; expected a number"),
        ({"width": 65}, r"width is 65; expected .* up to 64"),
        ({"drop_rate": 1.5}, r"drop_rate is 1\.5; expected a number from 0 to 1"),
        ({"output_stride": 12}, r"output_stride is 12; expected 8, 16 or 32"),
        ({"global_pool": "Avg!"}, r"global_pool is 'Avg!'; expected a string of letters"),
    ],
)
def test_bad_arguments_name_the_argument_the_value_and_what_was_expected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        build("conv4", **kwargs)


def test_arguments_within_bounds_are_taken() -> None:
    check_kwargs({"num_classes": 0, "in_chans": 1, "img_size": [8, 9], "patch_size": 4, "global_pool": "", "width": 64})
    check_kwargs({"drop_rate": 0, "drop_path_rate": 1.0, "output_stride": 8})
    assert {"num_classes", "in_chans", "img_size", "width"} <= set(KWARGS)


def test_an_argument_that_the_network_does_not_take() -> None:
    with pytest.raises(ConversionError, match=r"popup_surgery/conv4 cannot be built with patch_size=4: .*patch_size"):
        build("conv4", patch_size=4)
    with pytest.raises(ConversionError, match=r"timm/resnet18 cannot be built with width=2: .*width"):
        build("timm/resnet18", width=2)
    with pytest.raises(ConversionError, match=r"img_size is 1; 2 pooling layers need at least 4 pixels"):
        build("conv4", img_size=1)
