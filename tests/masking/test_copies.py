"""Copies of a layer or a network that share its modules' records: each ranks the scores that it holds itself."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import replicate as replicate_module
from torch.nn.utils import parametrize, prune

from masking.layers import Block, K, images, layers_of, make, pickled, raw, reverse, right, right_globally, sequential
from popup_surgery import ArtifactError, bake, convert, masks, save
from popup_surgery.learners import LEARNERS
from support import Scope, equal_states

pytestmark = pytest.mark.usefixtures("one_sample")


def with_own_scores(layer: Any) -> Any:
    """A shallow copy of a layer with scores of its own."""
    copied = copy.copy(layer)
    copied._parameters = dict(copied._parameters)
    copied.weight_score = nn.Parameter(reverse(layer.weight_score))
    return copied


def cloned(module: Any, fresh: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """A clone as MAML's libraries make it: shallow copies of all modules, whose parameters are results."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {
        key: parameter if parameter is None else fresh(parameter) for key, parameter in module._parameters.items()
    }
    clone._modules = {key: child and cloned(child, fresh) for key, child in module._modules.items()}
    return clone


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_shallow_copy_ranks_its_own_scores(scope: Scope) -> None:
    net: Any = convert(sequential(), K, scope=scope)
    layer, x = net[3], torch.randn(2, 64)
    before = layer(x)
    copied = with_own_scores(layer)
    for _ in range(2):  # whichever was read last
        if scope == "layer":
            assert torch.equal(copied.weight, right(copied))
            assert torch.equal(layer.weight, right(layer))
        else:
            assert torch.equal(copied.weight, right_globally(nn.ModuleList([net[0], copied]))[1])
            assert torch.equal(layer.weight, right_globally(net)[1])
        assert torch.equal(layer(x), before)
        assert not torch.equal(copied(x), before)
    assert torch.equal(masks(copied)["weight"], copied.weight != 0)
    for other in (copy.deepcopy(copied), pickled(copied), bake(copied)):
        assert torch.equal(other(x), copied(x))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("net", [Block, sequential])
def test_a_clone_adapts_and_its_original_learns_through_it(net: Callable[[], nn.Module], scope: Scope) -> None:
    """MAML's step: a clone's scores are moved along their gradient, and the loss after it reaches the original's."""
    model, x = convert(net(), K, scope=scope).eval(), images()
    before = model(x)
    clone = cloned(model)
    assert torch.equal(clone(x), before)
    scores = [layer._parameters["weight_score"] for layer in layers_of(clone)]
    gradients = torch.autograd.grad(clone(x).square().sum(), scores, create_graph=True)
    for layer, score, gradient in zip(layers_of(clone), scores, gradients, strict=True):
        layer._parameters["weight_score"] = score - 10 * gradient
    expected = [right(one) for one in layers_of(clone)] if scope == "layer" else right_globally(clone)
    plain = bake(model)
    weights = (weight for weight in plain.parameters() if weight.dim() > 1)
    for weight, new in zip(weights, expected, strict=True):
        weight.data.copy_(new)
    out = clone(x)
    assert torch.equal(out, plain(x))
    assert not torch.equal(out, before)
    assert torch.equal(bake(clone)(x), out)
    assert all(torch.equal(mask, new != 0) for mask, new in zip(masks(clone).values(), expected, strict=True))
    assert torch.equal(model(x), before)
    out.square().sum().backward()
    assert all(layer.weight_score.grad.any() for layer in layers_of(model))


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_copy_of_every_learner_ranks_its_own_scores(learner: str) -> None:
    layer, x = make("Linear", learner)
    copied = with_own_scores(layer)
    copied.weight_score.data.mul_(1000)
    alone = copy.deepcopy(layer)
    alone.weight_score.data.copy_(copied.weight_score)
    for _ in range(2):
        assert torch.equal(copied(x), alone(x))
        layer(x)


def test_copies_with_own_scores_in_one_network_are_baked_each_and_not_saved(tmp_path: Any) -> None:
    net: Any = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), K)
    net[1] = with_own_scores(net[0])
    x = torch.randn(2, 6)
    assert torch.equal(net(x), torch.nn.functional.linear(torch.nn.functional.linear(x, right(net[0])), right(net[1])))
    assert torch.equal(bake(net)(x), net(x))
    assert not torch.equal(*masks(net).values())
    with pytest.raises(ArtifactError, match=r"0\.weight and 1\.weight are one weight under two masks"):
        save(net, tmp_path / "net")


def test_a_stack_of_networks_ranks_each_ones_scores() -> None:
    nets = [convert(sequential(), K, seed=seed) for seed in range(3)]
    stacked = stack_module_state(nets)
    base, x = copy.deepcopy(nets[0]).to("meta"), images()
    found = vmap(lambda state: functional_call(base, state, (x,)))(stacked)
    assert all(torch.allclose(out, net(x), atol=1e-5) for out, net in zip(found, nets, strict=True))
    alone = functional_call(base, {key: tensor[1] for group in stacked for key, tensor in group.items()}, (x,))
    assert torch.equal(alone, nets[1](x))


def test_scores_that_a_tool_computes_are_ranked() -> None:
    """A pruned score is a plain attribute, a parametrised one a property: the layer ranks what it finds."""
    pruned, x = make("Linear")
    prune.l1_unstructured(pruned, "weight_score", 20)
    assert (pruned.weight != 0).sum() == 12
    assert torch.equal(pruned.weight, right(pruned))
    assert pruned(x).shape == (3, 5)
    parametrised, _ = make("Linear")

    class Reverse(nn.Module):
        def forward(self, score: Tensor) -> Tensor:
            return score.flip(0)

    parametrize.register_parametrization(parametrised, "weight_score", Reverse())
    assert torch.equal(parametrised.weight, right(parametrised))
    parametrised(x).sum().backward()
    assert parametrised.parametrizations.weight_score.original.grad.any()


# DataParallel


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's own `replicate` work on this machine: what it sends to a device is copied, as it would be there."""

    def broadcast(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    module: Any = __import__("sys").modules[replicate_module.__module__]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)


class Recurrent(nn.Module):
    """Recurrent layers and attention, which read their weights in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(36, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cell = nn.GRUCell(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(x.flatten(2))
        mixed, _ = self.attention(steps, steps, steps)
        return self.cell(mixed.mean(1))


@pytest.mark.parametrize("learner", ["edge_popup", "supermask", "dnw"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("net", [Block, sequential, Recurrent])
def test_data_parallels_replicas_compute_and_learn_as_the_network(
    net: Callable[[], nn.Module], scope: Scope, learner: str, two_devices: None
) -> None:
    k = K if LEARNERS[learner].takes_k else None
    if k is None and scope == "global":
        pytest.skip("takes no k")
    model = convert(net(), k, scope=scope, learner=learner, scaled=k is not None).eval()
    x = images()
    whole = copy.deepcopy(model)
    expected = whole(x)
    expected.square().sum().backward()
    for _ in range(2):
        model.zero_grad()
        replicas = replicate_module(model, [0, 1])
        assert [type(one) for one in replicas] == [type(model)] * 2
        halves = [replica(half) for replica, half in zip(replicas, x.chunk(2), strict=True)]
        torch.testing.assert_close(torch.cat(halves), expected)
        torch.cat(halves).square().sum().backward()
        for one, other in zip(model.parameters(), whole.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for layer in layers_of(model):
            for name in layer._popup_state.masked:
                getattr(layer, f"{name}_score").mul_(-1).add_(0.01)
        assert torch.equal(replicate_module(model, [0])[0](x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("net", [Block, sequential, Recurrent])
def test_data_parallel_on_two_devices(net: Callable[[], nn.Module], scope: Scope) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    model = convert(net(), K, scope=scope).eval().cuda()
    parallel, x = nn.DataParallel(model, [0, 1]), images().cuda()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        torch.testing.assert_close(parallel(x), bake(model)(x), rtol=1e-3, atol=1e-4)
        optimiser.zero_grad()
        parallel(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(parallel(x), bake(model)(x), rtol=1e-3, atol=1e-4)


def test_a_deep_copy_of_a_copy_shares_nothing() -> None:
    layer, x = make("Linear")
    other = copy.deepcopy(with_own_scores(layer))
    before = layer(x)
    other.weight_score.data.mul_(-1).add_(1)
    raw(other).data.mul_(2)
    assert torch.equal(layer(x), before)
    assert torch.equal(other.weight, right(other))
    assert equal_states(bake(other), bake(copy.deepcopy(other)))
