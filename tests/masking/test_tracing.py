"""Swapped layers under compilers, tracers and exporters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from masking.layers import (
    Block,
    K,
    every_layer,
    every_learner,
    images,
    layers_of,
    make,
    raw,
    reverse,
    right,
    sequential,
    trains,
)
from popup_surgery import MaskedWeightError, Tracer, bake, convert
from support import Scope, slow_except

pytestmark = pytest.mark.usefixtures("one_sample")


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda model, backend="aot_eager": torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@every_learner
@pytest.mark.parametrize("kind", slow_except(["Linear", "Conv2d", "ConvTranspose1d", "StdConv2d"], ["Conv2d"]))
def test_compiled_layer_equals_eager(kind: str, learner: str, compiler: Callable[..., Any]) -> None:
    layer, x = make(kind, learner)
    compiled = compiler(layer)
    for _ in range(2):
        expected, got = layer(x), compiled(x)
        assert torch.equal(got, expected)
        if trains(learner):
            (by_eager,) = torch.autograd.grad(expected.square().sum(), layer.weight_score)
            (by_compiled,) = torch.autograd.grad(got.square().sum(), layer.weight_score)
            torch.testing.assert_close(by_compiled, by_eager)
            assert by_eager.any()
        layer.weight_score.data.copy_(reverse(layer.weight_score))  # a compiled graph holds no mask


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_compiled_network_equals_eager(scope: Scope, compiler: Callable[..., Any]) -> None:
    net, x = convert(Block(), K, scope=scope).eval(), images()
    compiled = compiler(net)
    for _ in range(2):
        expected, got = net(x), compiled(x)
        assert torch.equal(got, expected)
        expected.square().sum().backward()
        by_eager = [layer.weight_score.grad for layer in layers_of(net)]
        net.zero_grad()
        got.square().sum().backward()
        torch.testing.assert_close([layer.weight_score.grad for layer in layers_of(net)], by_eager)
        net.zero_grad()
        for layer in layers_of(net):
            layer.weight_score.data.copy_(reverse(layer.weight_score))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_inductor_equals_eager(compiler: Callable[..., Any]) -> None:
    layer, x = make("Linear")
    net = nn.Sequential(layer, nn.ReLU())
    compiled = compiler(net, "inductor")
    expected, got = net(x), compiled(x)
    torch.testing.assert_close(got, expected)
    (by_eager,) = torch.autograd.grad(expected.square().sum(), layer.weight_score)
    (by_compiled,) = torch.autograd.grad(got.square().sum(), layer.weight_score)
    torch.testing.assert_close(by_compiled, by_eager)


def test_reading_the_weight_in_a_compiled_function(compiler: Callable[..., Any]) -> None:
    layer, x = make("Linear")
    torch.testing.assert_close(compiler(lambda x: x @ layer.weight.t())(x), x @ right(layer).t())


@every_layer
def test_functional_call_with_other_scores(kind: str) -> None:
    layer, x = make(kind)
    before = layer(x)
    other: Any = copy.deepcopy(layer)
    other.weight_score.data.copy_(reverse(layer.weight_score))
    given: Any = other.weight_score.detach().clone().requires_grad_()
    got = functional_call(layer, {"weight_score": given}, (x,))
    assert torch.equal(got, other(x))
    assert not torch.equal(got, before)
    got.square().sum().backward()
    other(x).square().sum().backward()
    assert torch.equal(given.grad, other.weight_score.grad)
    assert torch.equal(layer(x), before)


@every_layer
def test_functional_call_with_other_weights(kind: str) -> None:
    layer, x = make(kind)
    other: Any = copy.deepcopy(layer)
    other._parameters["weight"].data.mul_(3)
    assert torch.equal(functional_call(layer, {"weight": raw(other).clone()}, (x,)), other(x))


@every_learner
@every_layer
def test_func_grad(kind: str, learner: str) -> None:
    layer, x = make(kind, learner)
    layer.weight_score.requires_grad_()
    layer(x).square().sum().backward()
    score = layer.weight_score.detach().clone()
    got = torch.func.grad(lambda s: functional_call(layer, {"weight_score": s}, (x,)).square().sum())(score)
    torch.testing.assert_close(got, layer.weight_score.grad)
    assert torch.equal(layer(x), bake(layer)(x))  # nothing of the transform stays


def test_func_grad_sees_the_scores_that_it_is_given() -> None:
    layer, x = make("Linear")
    layer(x)
    other: Any = copy.deepcopy(layer)
    other.weight_score.data.copy_(reverse(layer.weight_score))
    other(x).square().sum().backward()
    given = other.weight_score.detach().clone()
    got = torch.func.grad(lambda s: functional_call(layer, {"weight_score": s}, (x,)).square().sum())(given)
    torch.testing.assert_close(got, other.weight_score.grad)


def test_vmap_over_inputs_gives_one_gradient_each() -> None:
    layer, x = make("Linear")
    score = layer.weight_score.detach().clone()

    def loss(s: Tensor, sample: Tensor) -> Tensor:
        return functional_call(layer, {"weight_score": s}, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(score, x)
    layer(x).square().sum().backward()
    assert each.shape == (3, 5, 6)
    torch.testing.assert_close(each.sum(0), layer.weight_score.grad)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_symbolic_trace_takes_masked_layers_as_leaves(scope: Scope) -> None:
    net, x = convert(sequential(), K, scope=scope), images()
    graph = torch.fx.symbolic_trace(net)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert torch.equal(graph(x), net(x))
    for layer in layers_of(net):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    assert torch.equal(graph(x), net(x))
    assert torch.equal(graph(x), bake(net)(x))


def test_our_tracer_takes_layers_of_other_libraries_as_leaves() -> None:
    net: Any = convert(Block(), K).eval()
    x = images()
    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    assert next(node.target for node in graph.graph.nodes if node.op == "call_module") == "stem"
    net.stem.weight_score.data.copy_(reverse(net.stem.weight_score))
    assert torch.equal(graph(x), bake(net)(x))


def test_a_plain_tracer_that_would_freeze_a_mask_says_which_to_take() -> None:
    net: Any = convert(Block(), K)
    with pytest.raises(MaskedWeightError, match=r"popup_surgery\.Tracer"):
        torch.fx.symbolic_trace(net)
    assert torch.equal(net.stem.weight, right(net.stem))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_baked_network_exports(scope: Scope) -> None:
    net, x = convert(Block(), K, scope=scope).eval(), images()
    exported = torch.export.export(bake(net), (x,)).module()
    assert torch.equal(exported(x), net(x))
