"""When the scores of a layer, or of all layers together, are ranked."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from masking.layers import (
    Block,
    K,
    images,
    layers_of,
    make,
    pickled,
    raw,
    reverse,
    right,
    right_globally,
    sequential,
    step,
)
from popup_surgery import bake, convert, masks
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import kept_count
from support import Scope

pytestmark = pytest.mark.usefixtures("one_sample")


# the ranking contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_training_step_ranks_each_layer_once(optimizer: type, rankings: list[int]) -> None:
    net = convert(Block(), K)
    assert len(rankings) == 0
    stepping = optimizer([layer.weight_score for layer in layers_of(net)], lr=0.1)
    for seed in range(4):
        rankings.clear()
        step(net, stepping, seed)
        assert len(rankings) == 3  # also the layer that reads its weight twice, and the one used twice


def test_reads_without_a_change_rank_no_more(rankings: list[int]) -> None:
    net = convert(Block(), K)
    for layer in layers_of(net):
        for _ in range(4):
            assert layer.weight.dtype == torch.float32
    net(images())
    masks(net)
    bake(net)
    assert len(rankings) == 3


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_evaluation_after_training_ranks_no_more(scope: Scope, rankings: list[int]) -> None:
    net = convert(Block(), K, scope=scope)
    stepping = torch.optim.SGD([layer.weight_score for layer in layers_of(net)], lr=0.1)
    step(net, stepping)
    step(net, stepping)
    net.eval()
    rankings.clear()
    with torch.no_grad():
        net(images(1))
    assert len(rankings) == (1 if scope == "global" else 3)  # the last step changed the scores
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            net(images(2))
    net.train()
    net(images(3))
    net.half().float()
    net.to("cpu")
    net(images(3))
    assert len(rankings) == (1 if scope == "global" else 3)


def test_a_weight_change_needs_no_ranking(rankings: list[int]) -> None:
    layer, _ = make("Linear")
    assert layer.weight.any()
    raw(layer).data.mul_(2)
    assert torch.equal(layer.weight, right(layer))
    assert len(rankings) == 1


def optimizers() -> Iterator[Any]:
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        for flags in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            yield pytest.param(kind, flags, id=f"{kind.__name__} {' '.join(f'{k}={v}' for k, v in flags.items())}")


@pytest.mark.parametrize(("kind", "flags"), list(optimizers()))
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("inference", [False, True])
def test_after_an_optimiser_step_the_mask_is_right(
    kind: type, flags: dict[str, Any], scope: Scope, inference: bool, rankings: list[int]
) -> None:
    net = convert(Block(), K, scope=scope)
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    stepping = kind([layer.weight_score for layer in layers_of(net)], lr=0.05, **more, **flags)
    changed = 0
    for seed in range(4):
        before = masks(net)
        stepping.zero_grad()
        net(images(seed)).square().sum().backward()
        with torch.inference_mode(inference):
            stepping.step()
        after = [layer.weight.detach() for layer in layers_of(net)]
        expected = right_globally(net) if scope == "global" else [right(layer) for layer in layers_of(net)]
        assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
        changed += any(not torch.equal(mask, before[key]) for key, mask in masks(net).items())
    assert changed >= 2, "the steps changed no mask, so that a stale one would not be seen"


def _numpy_write(layer: Any, new: Tensor) -> None:
    layer.weight_score.detach().numpy()[...] = new.numpy()


def _storage_write(layer: Any, new: Tensor) -> None:
    held = torch.empty(0).set_(layer.weight_score.untyped_storage(), 0, new.shape, new.stride())
    held.copy_(new)


def _data_replaced(layer: Any, new: Tensor) -> None:
    layer.weight_score.data = new


def _attribute(layer: Any, new: Tensor) -> None:
    layer.weight_score = nn.Parameter(new)


def _in_place(layer: Any, new: Tensor) -> None:
    with torch.no_grad():
        layer.weight_score.copy_(new)


def _under_inference(layer: Any, new: Tensor) -> None:
    with torch.inference_mode():
        layer.weight_score.copy_(new)


def _data_under_inference(layer: Any, new: Tensor) -> None:
    with torch.inference_mode():
        layer.weight_score.data.copy_(new)


def _one_entry(layer: Any, new: Tensor) -> None:
    score: Any = layer.weight_score.data
    lowest = score.abs().argmin()
    score.view(-1)[lowest] = -score.abs().max() * 2


CHANGES = {
    ".data.copy_": lambda layer, new: layer.weight_score.data.copy_(new),
    ".data.mul_": lambda layer, new: layer.weight_score.data.mul_(new / layer.weight_score.detach()),
    ".data.zero_": lambda layer, new: layer.weight_score.data.zero_(),
    ".data.reciprocal_": lambda layer, new: layer.weight_score.data.reciprocal_(),
    ".data = new": _data_replaced,
    ".data[i]": _one_entry,
    "numpy": _numpy_write,
    "storage": _storage_write,
    "in place": _in_place,
    "in place in inference mode": _under_inference,
    ".data in inference mode": _data_under_inference,
    "nn.init": lambda layer, new: nn.init.uniform_(layer.weight_score, generator=torch.Generator().manual_seed(3)),
    "vector_to_parameters": lambda layer, new: nn.utils.vector_to_parameters(new.view(-1), [layer.weight_score]),
    "attribute": _attribute,
    "load_state_dict": lambda layer, new: layer.load_state_dict({**layer.state_dict(), "weight_score": new}),
    "load_state_dict assign": lambda layer, new: layer.load_state_dict(
        {**layer.state_dict(), "weight_score": new}, assign=True
    ),
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("change", CHANGES)
def test_after_each_kind_of_change_the_next_read_has_the_right_mask(
    change: str, scope: Scope, rankings: list[int]
) -> None:
    net = convert(sequential(), K, scope=scope)
    for read in ("outside", "forward"):
        for layer in layers_of(net):
            net(images())
            before = layer.weight.detach().clone()
            version = layer.weight_score._version
            rankings.clear()
            CHANGES[change](layer, reverse(layer.weight_score))
            if change.startswith(".data.") or change == "numpy":
                assert layer.weight_score._version == version  # which is why the version is no key
            if read == "forward":
                net(images())
            after = [found.weight.detach() for found in layers_of(net)]
            expected = right_globally(net) if scope == "global" else [right(found) for found in layers_of(net)]
            assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
            assert torch.equal(net(images()), bake(net)(images()))
            if not (read == "forward" and change in (".data.zero_", "nn.init")):
                assert not torch.equal(layer.weight, before)
                assert len(rankings) == 1  # nor more than once


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_functional_call_and_back(scope: Scope) -> None:
    net, x = convert(sequential(), K, scope=scope), images()
    before = net(x)
    other: Any = copy.deepcopy(net)
    for layer in layers_of(other):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    given = {"0.weight_score": other[0].weight_score.detach(), "3.weight_score": other[3].weight_score.detach()}
    assert torch.equal(functional_call(net, given, (x,)), other(x))
    assert torch.equal(net(x), before)
    with torch.inference_mode():
        assert torch.equal(functional_call(net, given, (x,)), other(x))
    assert torch.equal(net(x), before)
    by_func = torch.func.grad(lambda scores: functional_call(net, scores, (x,)).square().sum())(given)
    other(x).square().sum().backward()
    for name, gradient in by_func.items():
        torch.testing.assert_close(gradient, other.get_parameter(name).grad)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_diverge(copied: Callable[..., Any], scope: Scope) -> None:
    net, x = convert(sequential(), K, scope=scope), images()
    before = net(x)
    other = copied(net)
    stepping = torch.optim.SGD([layer.weight_score for layer in layers_of(other)], lr=1.0)
    step(other, stepping)
    assert torch.equal(net(x), before)
    assert torch.equal(other(x), bake(other)(x))
    expected = right_globally(other) if scope == "global" else [right(layer) for layer in layers_of(other)]
    for layer, weight, old in zip(layers_of(other), expected, layers_of(net), strict=True):
        assert torch.equal(layer.weight, weight)
        assert not torch.equal(layer.weight, old.weight)


# scope="global" --------------------------------------------------------------------------------------------------


def test_global_masks_are_the_top_k_of_all_layers(rankings: list[int]) -> None:
    net = convert(Block(), K, scope="global")
    weights = right_globally(net)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(net), weights, strict=True))
    total = sum(raw(layer).numel() for layer in layers_of(net))
    assert sum(int(mask.sum()) for mask in masks(net).values()) == kept_count(total, K)
    assert len(rankings) == 1


def test_a_change_of_another_layer_changes_this_mask() -> None:
    net: Any = convert(sequential(), K, scope="global")
    before = net[3].weight.detach().clone()
    net[0].weight_score.data.fill_(1e6)
    assert not torch.equal(net[3].weight, before)
    assert torch.equal(net[0].weight, raw(net[0]))
    assert torch.equal(net[3].weight, right_globally(net)[1])


def test_a_global_training_step_ranks_once(rankings: list[int]) -> None:
    net = convert(Block(), K, scope="global")
    stepping = torch.optim.Adam([layer.weight_score for layer in layers_of(net)], lr=0.1, fused=True)
    for seed in range(4):
        rankings.clear()
        step(net, stepping, seed)
        assert len(rankings) == 1


def test_a_forward_that_fails_leaves_no_stale_global_mask() -> None:
    net: Any = convert(sequential(), K, scope="global")
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 3, 9, 9))
    net[0].weight_score.data.copy_(reverse(net[0].weight_score))
    assert torch.equal(net[3].weight, right_globally(net)[1])
    assert torch.equal(net[0].weight, right_globally(net)[0])


def test_a_hook_that_changes_scores_before_a_forward_is_seen() -> None:
    net: Any = convert(sequential(), K, scope="global")
    x = images()
    net(x)
    new = reverse(net[0].weight_score)
    net.register_forward_pre_hook(lambda *_: (net[0].weight_score.data.copy_(new), None)[1])
    assert torch.equal(net(x), bake(net)(x))


def test_scores_replaced_within_a_forward_are_seen() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequential()
            self.given = None

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if self.given is None else functional_call(self.body, self.given, (x,))

    net: Any = convert(Hyper(), K, scope="global")
    x = images()
    other: Any = copy.deepcopy(net)
    other.body[0].weight_score.data.copy_(reverse(net.body[0].weight_score))
    net.given = {"0.weight_score": other.body[0].weight_score.detach().clone()}
    assert torch.equal(net(x), other(x))


def test_parts_of_a_global_network_run_alone() -> None:
    net: Any = convert(sequential(), K, scope="global")
    x = images()
    net(x)
    net[3].weight_score.data.mul_(1000)
    expected = nn.functional.conv2d(x, right_globally(net)[0])
    assert torch.equal(net[0](x), expected)
    assert torch.equal(net.forward(x), bake(net)(x))


def test_bake_of_a_global_network_leaves_no_hooks() -> None:
    net = convert(Block(), K, scope="global")
    plain = bake(net)
    fresh = Block()
    for name, module in plain.named_modules():
        twin = fresh.get_submodule(name)
        assert type(module) is type(twin)
        assert not slots_of(module)
        for attribute in vars(twin):
            if "hooks" in attribute:
                assert dict(vars(module)[attribute]) == dict(vars(twin)[attribute]), (name, attribute)
    assert pickle.dumps(plain)
    assert b"popup_surgery" not in pickle.dumps(plain)
    assert len(net._forward_pre_hooks) == 1  # the network itself stays as it is
    assert torch.equal(net.eval()(images()), plain.eval()(images()))
