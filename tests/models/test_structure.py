"""Whether two networks compute the same: what counts, what does not, and every network against itself."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from popup_surgery import build, convert
from popup_surgery.accelerate_compat import forget_settings
from popup_surgery.models.build import build_uninitialised
from popup_surgery.models.libraries import LIBRARIES, architecture_of, names
from popup_surgery.models.structure import difference
from support import slow_except


class MonteCarlo(nn.Dropout):
    """A dropout that also drops in eval mode."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(input, self.p)


def _call(path: str, method: str, *args: Any) -> Callable[[Any], None]:
    return lambda model: getattr(model.get_submodule(path), method)(*args)


def _set(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def _write(path: str, name: str, value: float) -> Callable[[Any], None]:
    return lambda model: getattr(model.get_submodule(path), name).fill_(value)


def _reorder(path: str, *order: str) -> Callable[[Any], None]:
    def reorder(model: nn.Module) -> None:
        module = model.get_submodule(path)
        children = dict(module._modules)
        for name in order:
            del module._modules[name]
            module._modules[name] = children[name]

    return reorder


def _wrapped(model: Any) -> None:
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda x: forward(x).softmax(-1))


def _autocast(model: Any) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


CHANGES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "pooling": ("timm/resnet18", _set("", "maxpool", nn.Identity()), "maxpool is an Identity, not a MaxPool2d"),
    "pooling's size": ("timm/resnet18", _set("maxpool", "kernel_size", 5), "maxpool.kernel_size is 5, not 3"),
    "global pooling": ("timm/resnet18", _call("", "reset_classifier", 1000, "max"), "is an AdaptiveMaxPool2d"),
    "activation": ("timm/resnet18", _set("layer1.0", "act1", nn.GELU()), "layer1.0.act1 is a GELU, not a ReLU"),
    "slope": ("timm/darknet53", _set("stem.conv1.bn.act", "negative_slope", 0.3), "negative_slope is 0.3, not 0.01"),
    "a function": ("torchvision/googlenet", _set("", "transform_input", True), "transform_input is True, not False"),
    "stride": ("timm/resnet18", _set("layer2.0.conv1", "stride", (1, 1)), "stride is (1, 1), not (2, 2)"),
    "padding": ("timm/resnet18", _set("conv1", "padding", (0, 0)), "conv1.padding is (0, 0), not (3, 3)"),
    "padding's mode": ("timm/resnet18", _set("conv1", "padding_mode", "circular"), "is 'circular', not 'zeros'"),
    "dilation": ("timm/resnet18", _set("layer3.1.conv2", "dilation", (2, 2)), "dilation is (2, 2), not (1, 1)"),
    "eps": ("timm/resnet18", _set("bn1", "eps", 1e-3), "bn1.eps is 0.001, not 1e-05"),
    "heads": ("timm/vit_tiny_patch16_224", _set("blocks.3.attn", "num_heads", 1), "heads is 1, not 3"),
    "scale": ("timm/vit_tiny_patch16_224", _set("blocks.0.attn", "scale", 1.0), "attn.scale is 1.0, not 0.125"),
    "a token's place": ("timm/vit_tiny_patch16_224", _set("", "global_pool", "avg"),  "is 'avg', not 'token'"),
    "a buffer": ("timm/swin_tiny_patch4_window7_224",
                 _write("layers.0.blocks.0.attn", "relative_position_index", 0), "another tensor of shape"),
    "a tensor": ("timm/vit_small_patch16_rope_224", _write("rope", "pos_embed", 1), "another tensor of shape"),
    "forward": ("timm/resnet18", _set("", "forward", lambda x: x), "forward is <lambda>, not ResNet.forward"),
    "a wrapped forward": ("timm/resnet18", _wrapped, "not ResNet.forward"),
    "autocast": ("timm/resnet18", _autocast, "not ResNet.forward"),
    "a part of forward": ("timm/resnet18", _set("", "forward_head", lambda x: x), "forward_head is <lambda>"),
    "dropout in eval mode": ("timm/vgg11", _set("pre_logits", "drop", MonteCarlo()), "is a MonteCarlo, not a Dropout"),
    "order": ("timm/resnet18", _reorder("layer1", "0"), "the layers of layer1 are in another order"),
    "a missing layer": ("timm/resnet18", _set("", "maxpool", None), "maxpool is missing, not a MaxPool2d"),
}  # fmt: skip


@pytest.mark.parametrize("change", slow_except(CHANGES, ["autocast", "order", "a missing layer"]))
def test_what_changes_the_output_differs(change: str) -> None:
    name, mutate, words = CHANGES[change]
    model, reference = build(name), build(name)
    assert difference(model, reference) is None
    with torch.no_grad():
        mutate(model)
    found = difference(model, reference)
    assert found is not None
    assert words in found
    assert difference(convert(model), reference) == found  # masked layers count as what they were


def _without_drop_path(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = nn.Identity()


def _drop(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.drop_rate = 0.5


def _prepared(model: nn.Module) -> None:
    forget_settings()  # of other tests
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert accelerator.prepare(model) is model
    forget_settings()
    model._modules["layer1"] = add_hook_to_module(model.get_submodule("layer1"), ModelHook())


def _cast(model: nn.Module) -> None:
    model.half().float()


def _synchronise(model: Any) -> None:
    model.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(model.bn1)


def _pass(model: nn.Module) -> None:
    model.eval()(torch.zeros(1, 3, 224, 224))


NEUTRAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "rates": ("timm/vit_tiny_patch16_224", _drop),
    "drop path": ("timm/convnext_atto", _without_drop_path),
    "checkpointing": ("timm/vit_tiny_patch16_224", _call("", "set_grad_checkpointing", True)),
    "fused attention": ("timm/vit_tiny_patch16_224", _set("blocks.0.attn", "fused_attn", False)),
    "a hook": ("timm/resnet18", _call("layer1", "register_forward_hook", print)),
    "training": ("timm/resnet18", _call("", "train")),
    "in place": ("timm/resnet18", _set("layer1.0", "act1", nn.ReLU())),
    "an index of the last pass": ("timm/convit_tiny", _pass),
    "a cache": ("timm/levit_128s", _pass),
    "compiled": ("timm/resnet18", _call("", "compile")),
    "channels last": ("timm/resnet18", lambda model: model.to(memory_format=torch.channels_last)),
    "momentum": ("timm/resnet18", _set("bn1", "momentum", 0.9)),
    "Accelerate": ("timm/resnet18", _prepared),
    "a cast": ("timm/swin_tiny_patch4_window7_224", _cast),
    "synchronised norms": ("timm/resnet18", _synchronise),
    "a note": ("timm/resnet18", _set("", "my_note", "of the user")),
    "frozen": ("timm/resnet18", _call("", "requires_grad_", False)),
}


@pytest.mark.parametrize("change", slow_except(NEUTRAL, ["a note", "frozen"]))
def test_what_matters_only_in_training_does_not_differ(change: str) -> None:
    name, mutate = NEUTRAL[change]
    model = build(name, drop_path_rate=0.2) if change == "drop path" else build(name)
    mutate(model)
    assert difference(model, build(name)) is None
    assert difference(convert(model), build(name)) is None


def test_synchronised_norms_of_timm() -> None:
    model = timm.layers.convert_sync_batchnorm(build("timm/efficientnet_b0"))
    assert difference(model, build("timm/efficientnet_b0")) is None


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_network_equals_itself(library: str) -> None:
    found = {}
    for name in names(library):
        described = architecture_of(f"{library}/{name}")
        one, two = (build_uninitialised(described)[0] for _ in range(2))
        found[name] = difference(one, two)
    assert {name: differs for name, differs in found.items() if differs} == {}
