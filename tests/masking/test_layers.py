"""The contract of a swapped layer."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masking.layers import (
    LAYERS,
    Block,
    K,
    every_layer,
    every_learner,
    images,
    layers_of,
    make,
    pickled,
    raw,
    reverse,
    right,
    saved,
    sequential,
    trains,
)
from popup_surgery import MaskedWeightError, bake, convert, masks
from popup_surgery.learners import LEARNERS
from popup_surgery.masking.layer import is_masked
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import kept_count
from support import PATIENCE, Scope

pytestmark = pytest.mark.usefixtures("one_sample")


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
    values = layer.weight_score if LEARNERS[learner].ranks_weights else raw(layer)
    if "sign" in LEARNERS[learner].planes:
        values = values * layer.weight_score.sign()
    assert torch.equal(weight[mask], values[mask])
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


@pytest.mark.slow
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


def test_a_read_that_fails_gives_no_raw_weight() -> None:
    """`nn.Module` looks a name up in the parameters where a property raises AttributeError."""
    layer: Any = convert(nn.Linear(8, 4))
    del layer.weight_score
    with pytest.raises(MaskedWeightError, match=r"weight of MaskedLinear cannot be computed: .*weight_score"):
        layer(torch.zeros(1, 8))
