"""The contract of a swapped layer, and when its scores are ranked."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.func import functional_call

from popup_surgery import MaskedWeightError, Tracer, bake, convert, masks, sampled
from popup_surgery.learners import LEARNERS
from popup_surgery.masking.layer import is_masked
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import kept_count
from support import PATIENCE, Scope, top

K = 0.4


class Block(nn.Module):
    """A network with a weight-standardised convolution, which reads its weight twice, and a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = StdConv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "StdConv2d": (lambda: StdConv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_learner = pytest.mark.parametrize("learner", LEARNERS)


@pytest.fixture(autouse=True)
def one_sample() -> Iterator[None]:
    """What a learner must keep to it keeps for each sample, so that those that sample show one here."""
    with sampled(0):
        yield


def make(kind: str, learner: str = "edge_popup", **settings: Any) -> tuple[Any, Tensor]:
    build, shape = LAYERS[kind]
    k = K if LEARNERS[learner].takes_k else None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return convert(build(), k, learner=learner, **settings), x


def trains(learner: str) -> bool:
    return LEARNERS[learner].trains


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def sequential() -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def layers_of(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if is_masked(module)]


def raw(layer: Any) -> Any:
    return layer._parameters["weight"]


def right(layer: Any, k: float = K) -> Tensor:
    """The weight that the layer should have by its scores as they are now."""
    score = layer.weight_score.detach().clone()
    return torch.where(top([score], kept_count(score.numel(), k))[0], raw(layer).detach(), 0.0)


def right_globally(net: nn.Module, k: float = K) -> list[Tensor]:
    found = layers_of(net)
    scores = [layer.weight_score.detach().clone() for layer in found]
    chosen = top(scores, kept_count(sum(score.numel() for score in scores), k))
    return [torch.where(mask, raw(layer).detach(), 0.0) for mask, layer in zip(chosen, found, strict=True)]


def reverse(score: Tensor) -> Tensor:
    """Other scores of the same shape, of which others are the largest."""
    flat = score.detach().clone().reshape(-1)
    flat[flat.abs().argsort()] = flat[flat.abs().argsort(descending=True)]
    return flat.view(score.shape).contiguous()


# what the layer is -----------------------------------------------------------------------------------------------


@every_learner
@every_layer
def test_weight_is_raw_where_the_mask_is_and_plus_zero_elsewhere(kind: str, learner: str) -> None:
    layer, _ = make(kind, learner)
    mask = masks(layer)["weight"]
    weight: Any = layer.weight
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape == raw(layer).shape
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(weight[mask], raw(layer)[mask])
    zeros = weight[~mask]
    assert (raw(layer)[~mask] < 0).any(), "no negative weight is masked, so that −0.0 could not come up"
    assert not zeros.any()
    assert not zeros.signbit().any()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_positive_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    layer, _ = make(kind)
    layer.to(dtype)
    mask, weight = masks(layer)["weight"], layer.weight
    assert weight.dtype == dtype
    assert not weight[~mask].signbit().any()
    assert torch.equal(weight[mask], raw(layer)[mask])


@every_layer
def test_mask_is_the_top_k_by_magnitude(kind: str) -> None:
    layer, _ = make(kind)
    assert torch.equal(layer.weight, right(layer))
    assert masks(layer)["weight"].sum() == kept_count(raw(layer).numel(), K)


@every_learner
@every_layer
def test_is_an_instance_of_its_class_with_its_own_forward_and_keys(kind: str, learner: str) -> None:
    plain = LAYERS[kind][0]()
    layer, x = make(kind, learner)
    assert isinstance(layer, type(plain))
    assert type(layer).forward is type(plain).forward
    assert list(layer.state_dict()) == [*plain.state_dict(), "weight_score"]
    assert type(bake(layer)) is type(plain)
    assert "masked" in repr(layer)
    assert (f"k={K:g}" in repr(layer)) == LEARNERS[learner].takes_k
    assert layer(x).shape == plain(x).shape


@every_learner
@every_layer
def test_forward_is_that_of_the_original_class_with_the_masked_weight(kind: str, learner: str) -> None:
    layer, x = make(kind, learner)
    plain: Any = LAYERS[kind][0]()
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if plain.bias is not None:
            plain.bias.zero_()
    assert torch.equal(layer(x), plain(x))
    assert layer(x).any()


@every_learner
@every_layer
def test_only_scores_require_a_gradient(kind: str, learner: str) -> None:
    layer, x = make(kind, learner)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight_score"] * trains(learner)
    assert layer.weight_score.dtype == torch.float32
    assert layer.weight_score.shape == raw(layer).shape
    out = layer(x)
    assert out.requires_grad == trains(learner)
    if trains(learner):
        out.square().sum().backward()
        assert layer.weight_score.grad.any()
    assert raw(layer).grad is None


@every_layer
def test_gradient_goes_straight_through(kind: str) -> None:
    layer, x = make(kind)
    plain: Any = bake(layer)
    plain(x).square().sum().backward()
    layer(x).square().sum().backward()
    expected = plain.weight.grad * raw(layer) * layer.weight_score.detach().sign()
    grad, mask = layer.weight_score.grad, masks(layer)["weight"]
    assert torch.equal(grad, expected)
    assert grad[mask].any()
    assert grad[~mask].any()


def test_gradient_at_a_score_of_zero_is_zero() -> None:
    layer, x = make("Linear")
    layer.weight_score.data[0, 0] = 0
    layer(x).square().sum().backward()
    assert layer.weight_score.grad[0, 0] == 0
    assert layer.weight_score.grad[0, 1] != 0


def test_a_raw_weight_that_learns_too_gets_its_masked_gradient() -> None:
    layer, x = make("Linear")
    plain: Any = bake(layer)
    raw(layer).requires_grad_(True)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(raw(layer).grad, torch.where(masks(layer)["weight"], plain.weight.grad, 0.0))
    assert layer.weight_score.grad.any()


# copies ----------------------------------------------------------------------------------------------------------


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_learner
@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_the_same_and_lives_alone(kind: str, learner: str, copied: Callable[..., Any]) -> None:
    layer, x = make(kind, learner)
    before = layer(x)
    other: Any = copied(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(x), before)
    other.weight_score.data.copy_(1000 * reverse(layer.weight_score))  # so wide that probabilities are 0 and 1
    assert torch.equal(layer(x), before)
    assert not torch.equal(other(x), before)
    assert other.weight_score.requires_grad == trains(learner)
    if trains(learner):
        other(x).sum().backward()
        assert other.weight_score.grad.any()
    assert layer.weight_score.grad is None


@every_learner
@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind: str, learner: str, assign: bool) -> None:
    layer, x = make(kind, learner)
    other, _ = make(kind, learner, seed=7)
    assert not torch.equal(layer(x), other(x))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert not other.load_state_dict(state, assign=assign).missing_keys
    assert torch.equal(layer(x), other(x))
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["weight_score"] * trains(learner)
    if assign:
        assert raw(other).data_ptr() == state["weight"].data_ptr()


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_goes_into_a_masked_layer(kind: str, assign: bool) -> None:
    layer, _ = make(kind)
    score = layer.weight_score.detach().clone()
    plain: Any = LAYERS[kind][0]()
    layer.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(raw(layer), plain.weight)
    assert torch.equal(layer.weight_score, score)
    assert torch.equal(layer.weight, right(layer))
    assert not raw(layer).requires_grad


def test_a_checkpoint_without_the_weight_is_missing_both_keys() -> None:
    layer, _ = make("Linear")
    with pytest.raises(RuntimeError, match=r'"weight", "weight_score"'):
        layer.load_state_dict({"bias": torch.zeros(5)})


def test_a_masked_checkpoint_does_not_go_into_a_plain_layer() -> None:
    layer, _ = make("Linear")
    with pytest.raises(RuntimeError, match="weight_score"):
        nn.Linear(6, 5).load_state_dict(layer.state_dict())


def test_pickle_opens_in_a_fresh_process(tmp_path: Path) -> None:
    cases = [(*make(kind), None) for kind in LAYERS]
    cases.append((convert(sequential(), K, scope="global"), images(), None))
    cases = [(layer, x, layer(x).detach()) for layer, x, _ in cases]
    path = tmp_path / "layers.pickle"
    path.write_bytes(pickle.dumps(cases))
    script = (
        "import pickle, sys, torch\n"
        "for layer, x, y in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    assert torch.allclose(layer(x), y, atol=1e-5), layer\n"
        "    layer(x).sum().backward()\n"
        "    assert all(p.grad.any() for n, p in layer.named_parameters() if n.endswith('weight_score')), layer\n"
        "print('equal')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "equal\n", done.stderr


# compilers and tracers -------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda model, backend="aot_eager": torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@every_learner
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose1d", "StdConv2d"])
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


# writing to the masked weight ------------------------------------------------------------------------------------


@every_layer
def test_assignment_and_deletion_are_refused(kind: str) -> None:
    layer, _ = make(kind)
    before = layer.weight.clone()
    with pytest.raises(MaskedWeightError, match=r"weight of Masked.*cannot be assigned.*weight_score"):
        layer.weight = nn.Parameter(torch.zeros_like(before))
    with pytest.raises(MaskedWeightError, match="cannot be assigned"):
        layer.weight = torch.zeros_like(before)
    with pytest.raises(MaskedWeightError, match=r"weight of Masked.*cannot be deleted"):
        del layer.weight
    assert torch.equal(layer.weight, before)
    layer.anything_else = 3  # other attributes are free
    del layer.anything_else


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["kept", "died", "view", "detached", "copy", "init"])
def test_a_write_in_place_is_found_at_the_next_read(how: str, grad: bool) -> None:
    layer, x = make("Linear")
    before = layer.weight.detach().clone()
    kept_alive: list[Any] = []
    with torch.set_grad_enabled(grad):
        if how == "kept":
            kept_alive.append(layer.weight)
            kept_alive[0].add_(1)
        elif how == "died":
            layer.weight.zero_()
        elif how == "view":
            layer.weight[0].fill_(3.0)
        elif how == "detached":
            layer.weight.detach().mul_(2)
        elif how == "copy":
            layer.weight.copy_(torch.ones(5, 6))
        else:
            nn.init.ones_(layer.weight)
    with pytest.raises(MaskedWeightError, match=r"'weight' was written to in place.*weight_score"):
        layer(x)
    assert torch.equal(layer.weight, before)  # said once, and nothing came of the write


@every_layer
def test_writes_through_the_data_of_the_masked_weight_are_noticed(kind: str) -> None:
    layer, x = make(kind)
    before, mask, weights = layer(x), masks(layer)["weight"], raw(layer).clone()
    layer.weight.data.zero_()
    with pytest.raises(MaskedWeightError, match=r"'weight' was written to in place.*weight_score"):
        layer(x)
    held: Any = layer.weight
    held.data.fill_(float("nan"))
    with pytest.raises(MaskedWeightError, match="was written to in place"):
        masks(layer), layer.weight
    with pytest.raises(MaskedWeightError, match=r"the data of a masked weight of shape .* was assigned"):
        layer.weight.data = torch.zeros_like(weights)
    layer.weight.detach().numpy()[...] = 5
    with torch.inference_mode():
        layer.weight.zero_()
    assert torch.equal(layer(x), before)
    assert torch.equal(masks(layer)["weight"], mask)
    assert torch.equal(raw(layer), weights)
    assert torch.equal(layer.weight, right(layer))


def test_writing_to_a_returned_mask_does_no_harm() -> None:
    layer, x = make("Linear")
    before = layer(x)
    masks(layer)["weight"].fill_(True)
    assert torch.equal(layer(x), before)


def test_every_read_is_a_fresh_tensor_with_a_gradient() -> None:
    layer, _ = make("Linear")
    first, second = layer.weight, layer.weight
    assert first.data_ptr() != second.data_ptr()
    assert first.requires_grad
    assert not first.is_leaf


# dtypes, layouts, modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_leave_scores_in_float32_to_the_bit(cast: str) -> None:
    net: Any = convert(sequential(), K)
    x = images()
    net(x).sum().backward()
    before = [(layer.weight_score.detach().clone(), layer.weight_score.grad.clone()) for layer in layers_of(net)]
    chosen = masks(net)
    getattr(net, cast)()
    for layer, (score, grad) in zip(layers_of(net), before, strict=True):
        assert raw(layer).dtype == layer.weight.dtype == getattr(torch, {"half": "float16"}.get(cast, cast)), cast
        assert layer.weight_score.dtype == torch.float32
        assert torch.equal(layer.weight_score, score)
        assert torch.equal(layer.weight_score.grad, grad)
        assert layer.weight_score.requires_grad
    assert all(torch.equal(mask, chosen[key]) for key, mask in masks(net).items())
    net.zero_grad()
    net(x.to(raw(net[0]).dtype)).sum().backward()
    assert net[0].weight_score.grad.dtype == torch.float32
    assert net[0].weight_score.grad.any()
    net.float()
    assert torch.equal(net[0].weight_score, before[0][0])


def test_autocast_reads_and_trains() -> None:
    net: Any = convert(sequential(), K)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, bake(net)(x))
    out.float().square().sum().backward()
    assert net[0].weight_score.grad.dtype == torch.float32
    assert net[0].weight_score.grad.any()


def test_channels_last() -> None:
    net: Any = convert(sequential(), K)
    x = images()
    before, chosen = net(x), masks(net)
    net.to(memory_format=torch.channels_last)
    assert raw(net[0]).is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight_score.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(net[0].weight, right(net[0]))
    assert all(torch.equal(mask, chosen[key]) for key, mask in masks(net).items())
    torch.testing.assert_close(net(x), before)
    net(x).sum().backward()
    assert net[0].weight_score.grad.any()
    net[0].weight_score.data.copy_(reverse(net[0].weight_score))
    assert torch.equal(net[0].weight, right(net[0]))


def test_convert_a_channels_last_network_gives_the_same_network() -> None:
    plain = convert(sequential(), K)
    other: Any = convert(sequential().to(memory_format=torch.channels_last), K)
    assert other[0].weight_score.is_contiguous(memory_format=torch.channels_last)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert all(torch.equal(mask, masks(other)[key]) for key, mask in masks(plain).items())


def test_to_meta_and_back() -> None:
    layer, _ = make("Linear")
    layer.to("meta").half()
    assert layer.weight_score.is_meta
    assert layer.weight_score.dtype == torch.float32
    assert raw(layer).dtype == torch.float16


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_inference_mode_and_training_after_it(scope: Scope) -> None:
    net, x = convert(sequential(), K, scope=scope), images()
    with torch.inference_mode():
        inferred = net(x)
    assert torch.equal(net(x), inferred)
    net(x).square().sum().backward()
    assert all(layer.weight_score.grad.any() for layer in layers_of(net))
    with torch.inference_mode():
        assert torch.equal(net(x), inferred)


def test_inference_mode_before_training_raw_weights_too() -> None:
    layer, x = make("Linear")
    raw(layer).requires_grad_(True)
    with torch.inference_mode():
        layer(x)
    layer(x).square().sum().backward()
    assert torch.equal(raw(layer).grad != 0, masks(layer)["weight"])


# which modules ---------------------------------------------------------------------------------------------------


def test_the_root_itself_and_a_module_used_twice() -> None:
    layer, _ = make("Linear")
    assert is_masked(layer)
    net: Any = convert(Block(), K).eval()
    x = images()
    plain: Any = bake(net)
    plain(x).square().sum().backward()
    net(x).square().sum().backward()
    expected = plain.conv.weight.grad * raw(net.conv) * net.conv.weight_score.detach().sign()
    torch.testing.assert_close(net.conv.weight_score.grad, expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_one_parameter_under_two_names_stays_one(rankings: list[int]) -> None:
    net: Any = convert(Tied(), K)
    x = torch.randn(3, 5)
    assert raw(net.first) is raw(net.second)
    assert net.first.weight_score is net.second.weight_score
    assert list(masks(net)) == ["first.weight"]
    assert {"first.weight", "first.weight_score", "second.weight", "second.weight_score"} <= set(net.state_dict())
    net(x).square().sum().backward()
    assert len(rankings) == 1
    plain: Any = bake(net)
    assert plain.first.weight is plain.second.weight
    plain(x).square().sum().backward()
    expected = plain.first.weight.grad * raw(net.first) * net.first.weight_score.detach().sign()
    torch.testing.assert_close(net.first.weight_score.grad, expected)
    for other in (copy.deepcopy(net), pickled(net)):
        assert raw(other.first) is raw(other.second)
        assert other.first.weight_score is other.second.weight_score
        other.first.weight_score.data.copy_(reverse(net.first.weight_score))
        assert torch.equal(other.second.weight, right(other.second))
        assert torch.equal(net.second.weight, right(net.second))


def test_an_embedding_tied_to_a_linear_layer_meets_the_mask() -> None:
    class Tongue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    net: Any = convert(Tongue(), K)
    x = torch.tensor([[1, 2, 6]])
    assert isinstance(net.embedding, nn.Embedding)
    assert torch.equal(net.embedding.weight, net.head.weight)
    assert torch.equal(net.head.weight, right(net.head))
    assert torch.equal(net(x), bake(net)(x))
    net(x).square().sum().backward()
    assert net.head.weight_score.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_meets_the_mask_of_its_projection(training: bool) -> None:
    net: Any = convert(nn.MultiheadAttention(8, 2, batch_first=True), K).train(training)
    x = torch.randn(2, 3, 8)
    assert is_masked(net.out_proj)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(net(x, x, x)[0], bake(net)(x, x, x)[0])
    assert not torch.equal(net.out_proj.weight, raw(net.out_proj))
    assert not torch.equal(net.in_proj_weight, net._parameters["in_proj_weight"])
    net(x, x, x)[0].square().sum().backward()
    assert net.out_proj.weight_score.grad.any()
    assert net.in_proj_weight_score.grad.any()


def test_transformer_encoder_layer_meets_the_masks_on_its_fast_path() -> None:
    net = convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), K).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), bake(net)(x))


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
PLAIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL = {
    "swinv2_tiny_window8_256": SWIN,
    "swin_tiny_patch4_window7_224": SWIN,
    "eva02_tiny_patch14_224": {"img_size": 28, **PLAIN},
    "eva_giant_patch14_224": {"img_size": 28, **PLAIN, "mlp_ratio": 2},
    "beit_base_patch16_224": {"img_size": 32, **PLAIN},
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", SMALL)
def test_networks_that_read_weights_outside_the_layer_meet_the_mask(name: str) -> None:
    import timm

    sizes: Any = SMALL[name]
    net = convert(timm.create_model(name, num_classes=5, **sizes), K).eval()
    x = torch.randn(2, 3, sizes["img_size"], sizes["img_size"], generator=torch.Generator().manual_seed(0))
    plain = bake(net)
    assert not any(is_masked(module) for module in plain.modules())
    out = net(x)
    torch.testing.assert_close(out, plain(x))
    for layer in layers_of(net):
        plain.get_parameter(slots_of(layer)["weight"].stream).data.copy_(raw(layer))
    assert (out - plain(x)).abs().max() > 0.01, "the masks make no difference"
    plain = bake(net)
    assert all(torch.equal(plain.get_parameter(key) != 0, mask) for key, mask in masks(net).items())
    net(x).square().sum().backward()
    assert all(layer.weight_score.grad is not None for layer in layers_of(net))


# the ranking contract --------------------------------------------------------------------------------------------


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    optimizer.zero_grad()
    net(images(seed)).square().sum().backward()
    optimizer.step()


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
