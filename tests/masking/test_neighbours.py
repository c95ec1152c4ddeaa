"""Layers with `pattern`: which weights are neighbours in each kind of layer, and all that keeps working."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from transformers.pytorch_utils import Conv1D

from masking.layers import LAYERS, Block, check_ten_steps, images, layers_of, pickled, raw, reverse, saved, sequential
from popup_surgery import ConversionError, bake, convert, load, masks, plan, save, set_k, start_from
from popup_surgery.learners import LEARNERS, EdgePopup
from popup_surgery.learners.base import Learner
from popup_surgery.masking.plan import Plan
from popup_surgery.models.layer_types import LAYER_TYPES, Fans, LayerType
from support import equal_states

TAKE = [name for name, learner in LEARNERS.items() if learner.takes_pattern]


def chosen(score: Tensor, keep: int, of: int, dim: int = 1, parts: int = 1) -> Tensor:
    """The right mask: a stable sort of each `of` neighbours along `dim`, which has that many `parts`."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    into = mask.movedim(dim, -1)
    for part, found in zip(score.detach().movedim(dim, -1).chunk(parts, -1), into.chunk(parts, -1), strict=True):
        for group, kept in zip(part.split(of, -1), found.split(of, -1), strict=True):
            best = group.abs().argsort(dim=-1, descending=True, stable=True)
            kept.scatter_(-1, best[..., : math.ceil(group.shape[-1] * keep / of)], True)
    return mask


ALONG: dict[str, tuple[int, int]] = {"ConvTranspose1d": (0, 1), "ConvTranspose2d": (0, 2), "ConvTranspose3d": (0, 1)}


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "1:3"])
@pytest.mark.parametrize("kind", LAYERS)
def test_neighbours_are_input_channels_of_one_output_and_one_kernel_position(kind: str, pattern: str) -> None:
    layer: Any = convert(LAYERS[kind][0](), pattern=pattern)
    keep, of = map(int, pattern.split(":"))
    for _ in range(2):
        mask = chosen(layer.weight_score, keep, of, *ALONG.get(kind, (1, 1)))
        assert torch.equal(masks(layer)["weight"], mask)
        assert torch.equal(layer.weight, torch.where(mask, raw(layer), 0.0))
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    assert plan(LAYERS[kind][0](), pattern=pattern).kept == int(mask.sum())
    assert f"weight masked, {pattern}" in repr(layer)


def test_neighbours_in_layers_of_other_shapes() -> None:
    recurrent: Any = convert(nn.LSTM(6, 5, proj_size=3), pattern="2:4")
    attention: Any = convert(nn.MultiheadAttention(8, 2), pattern="2:4")
    for net, names in ((recurrent, ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]), (attention, ["in_proj_weight"])):
        for name in names:
            assert torch.equal(masks(net)[name], chosen(getattr(net, f"{name}_score"), 2, 4)), name
    turned: Any = convert(Conv1D(5, 6), pattern="2:4")
    assert torch.equal(masks(turned)["weight"], chosen(turned.weight_score, 2, 4, dim=0))
    experts: Any = convert(CondConv2d(6, 4, 3, num_experts=3), pattern="2:4")
    score = experts.weight_score.detach().view(3, 4, 6, 3, 3)
    assert torch.equal(masks(experts)["weight"], chosen(score, 2, 4, dim=2).view(3, -1))
    depthwise: Any = convert(nn.Conv2d(6, 6, 3, groups=6), pattern="2:4")
    assert masks(depthwise)["weight"].all(), "a remainder of one keeps it"


def test_k_is_n_over_m_for_scaled_weights_too() -> None:
    quarter = convert(sequential(), pattern="1:4")
    expected = convert(sequential(), 0.25)
    for mine, other in zip(layers_of(quarter), layers_of(expected), strict=True):
        assert torch.equal(raw(mine), raw(other))
    assert convert(quarter, k=0.25) is quarter is convert(quarter, pattern="1:4")
    with pytest.raises(ConversionError, match=r"converted with pattern='1:4', which '2:4' cannot change"):
        convert(quarter, pattern="2:4")


@pytest.mark.parametrize("learner", TAKE)
@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "kaiming_normal", "pretrained"])
def test_each_scheme_and_learner_that_ranks(learner: str, scheme: str, tmp_path: Path) -> None:
    if LEARNERS[learner].binary and scheme == "pretrained":
        return  # which is refused: tests/learners/test_biprop.py
    plain = nn.Linear(10, 6)
    base = copy.deepcopy(plain) if scheme == "pretrained" else None
    net: Any = convert(plain, pattern="2:4", learner=learner, scheme=scheme)
    assert torch.equal(masks(net)["weight"], chosen(net.weight_score, 2, 4))
    if not LEARNERS[learner].learns_weights:
        save(net, tmp_path / "net")
        assert equal_states(load(tmp_path / "net", nn.Linear(10, 6), base=base), bake(net))


def test_it_takes_part_in_shared_weights_and_copies() -> None:
    net: Any = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    net["two"].weight = net["one"].weight
    convert(net, pattern="2:4")
    assert torch.equal(net["one"].weight, net["two"].weight)
    assert list(masks(net)) == ["one.weight"]
    for other in (copy.deepcopy(net), pickled(net), saved(net)):
        other["one"].weight_score.data.copy_(reverse(other["one"].weight_score))
        assert torch.equal(masks(other)["one.weight"], chosen(other["one"].weight_score, 2, 4))
        assert other["two"].weight_score is other["one"].weight_score


def test_memory_formats_and_casts() -> None:
    net, x = convert(Block(), pattern="2:4").eval(), images()
    expected = net(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected)
    assert all(torch.equal(one, masks(last)[key]) for key, one in masks(net).items())
    assert all(torch.equal(one, masks(net.double())[key]) for key, one in masks(last).items())


def test_functional_calls_and_stacks() -> None:
    nets: list[Any] = [convert(nn.Linear(8, 5), pattern="2:4", seed=seed) for seed in range(3)]
    x = torch.randn(2, 8)
    states, buffers = stack_module_state(nets)
    together = vmap(lambda state, buffer: functional_call(nets[0], (state, buffer), (x,)))(states, buffers)
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]))
    other = {"weight_score": reverse(nets[0].weight_score)}
    expected = torch.where(chosen(other["weight_score"], 2, 4), raw(nets[0]), 0.0)
    torch.testing.assert_close(functional_call(nets[0], other, (x,)), nn.functional.linear(x, expected))

    def loss(score: Tensor) -> Tensor:
        return functional_call(nets[0], {"weight_score": score}, (x,)).square().sum()

    nets[0](x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(nets[0].weight_score.detach()), nets[0].weight_score.grad)


def test_a_compiled_network_has_one_operator_for_each_layer() -> None:
    torch._dynamo.reset()
    net, x = convert(sequential(), pattern="2:4"), images()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for _ in range(2):
        expected, got = net(x), compiled(x)
        assert torch.equal(got, expected)
        for layer in layers_of(net):
            layer.weight_score.data.copy_(reverse(layer.weight_score))
    (graph,) = graphs
    assert sum("select_pattern" in str(node.target) for node in graph.graph.nodes) == 2
    assert not any(name in str(node.target) for node in graph.graph.nodes for name in ("sort", "topk"))
    torch._dynamo.reset()


def test_inference_mode_and_checkpoints() -> None:
    net: Any = convert(sequential(), pattern="2:4")
    x = images()
    with torch.inference_mode():
        expected = net(x)
    assert torch.equal(net(x), expected)
    net(x).square().sum().backward()
    first = [layer.weight_score.grad.clone() for layer in layers_of(net)]
    net.zero_grad()
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([layer.weight_score.grad for layer in layers_of(net)], first)


def test_new_layers_get_the_same_pattern_and_a_file_starts_it(tmp_path: Path) -> None:
    net: Any = convert(sequential(), pattern="2:4")
    net.append(nn.Linear(5, 4))
    convert(net)
    assert torch.equal(masks(net)["4.weight"], chosen(net[4].weight_score, 2, 4))
    for layer in layers_of(net):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    save(net, tmp_path / "net")
    again = convert(sequential().append(nn.Linear(5, 4)), pattern="2:4")
    start_from(again, tmp_path / "net")
    assert all(torch.equal(mask, masks(net)[key]) for key, mask in masks(again).items())


def test_ten_steps_are_those_of_the_equations() -> None:
    """m is the choice among neighbours."""
    net = convert(sequential(), pattern="2:4", scheme="kaiming_normal")
    check_ten_steps(net, lambda scores: [chosen(score, 2, 4) for score in scores])


# what is refused


BAD = r"expected 'N:M', N of each M neighbours, with 1 <= N < M <= 16, such as '2:4'"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": "3:2"}, rf"pattern is '3:2'; {BAD}"),
        ({"pattern": "0:4"}, rf"pattern is '0:4'; {BAD}"),
        ({"pattern": "4:4"}, rf"pattern is '4:4'; {BAD}"),
        ({"pattern": "1:32"}, rf"pattern is '1:32'; {BAD}"),
        ({"pattern": "half"}, rf"pattern is 'half'; {BAD}"),
        ({"pattern": (2, 4)}, rf"pattern is \(2, 4\); {BAD}"),
        ({"pattern": "2:4", "k": 0.3}, r"k is 0\.3; expected 0\.5, which the pattern 2:4 sets, or none"),
        ({"pattern": "2:4", "k": {"*": 0.5}}, r"k is \{'\*': 0\.5\}; expected 0\.5, which the pattern 2:4 sets"),
        ({"pattern": "2:4", "scope": "global"}, r"scope is 'global'; expected 'layer'; a pattern ranks the neighbours"),
        ({"pattern": "2:4", "learner_options": {"coats": [0.5, 0.1]}}, r"pattern is '2:4'; expected None; a pattern"),
        ({"pattern": "2:4", "learner": "gem_miner"}, r"pattern is '2:4'; expected None; a pattern keeps the largest"),
        ({"pattern": "2:4", "learner": "supermask"}, r"pattern is '2:4'; expected None; supermask takes no k, because"),
        ({"pattern": "2:4", "learner": "piggyback"}, r"pattern is '2:4'; expected None; piggyback takes no k, because"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(settings: dict[str, Any], says: str) -> None:
    net = sequential()
    before = copy.deepcopy(net.state_dict())
    for verb in (convert, plan):
        with pytest.raises(ConversionError, match=f"^{says}"):
            verb(net, **settings)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_learner_that_selects_in_its_own_way_takes_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signed(EdgePopup):
        def select(self, scores: Any, kept: int, names: Any = (), floors: Any = None, fixed: Any = None) -> Any:
            return super().select([score.clamp(min=0) for score in scores], kept)

    class Growing(EdgePopup):
        def kept_at(self, progress: float, kept: int) -> int:
            return round(kept * progress)

    class Louder(EdgePopup):
        def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
            return 2 * super().effective(weight, score, mask)

    class Mixed(Signed, Louder):
        pass

    for name, made in (("signed", Signed), ("growing", Growing), ("mixed", Mixed)):
        monkeypatch.setitem(LEARNERS, name, made())
        with pytest.raises(ConversionError, match=f"pattern is '2:4'; expected None; a pattern .* {name} "):
            convert(nn.Linear(8, 4), pattern="2:4", learner=name)
    monkeypatch.setitem(LEARNERS, "louder", Louder())
    layer: Any = convert(nn.Linear(8, 4), pattern="2:4", learner="louder")
    assert torch.equal(layer.weight != 0, chosen(layer.weight_score, 2, 4))
    assert not Learner.takes_pattern


def test_no_other_k_can_be_set_later() -> None:
    net = convert(sequential(), pattern="2:4")
    before = masks(net)
    with pytest.raises(
        ConversionError, match=r"k=0\.3 is not that of the pattern 2:4, which keeps as many all the time"
    ):
        set_k(net, 0.3)
    set_k(net, None)
    set_k(net, 0.5)
    assert all(torch.equal(mask, before[key]) for key, mask in masks(net).items())


def test_a_type_of_layer_must_say_what_its_neighbours_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

    def own(fans: Fans) -> nn.Module:
        kind = LayerType((Own,), lambda module: {"weight": fans})
        monkeypatch.setattr("popup_surgery.models.layer_types.LAYER_TYPES", [*LAYER_TYPES, kind])
        return Own()

    for fans in (Fans(8, 6), Fans(8, 6, 7)):
        with pytest.raises(ConversionError, match="the layer of weight does not say which elements are neighbours"):
            convert(own(fans), pattern="2:4")
    layer: Any = convert(own(Fans(8, 6, 8)), pattern="2:4")
    assert torch.equal(masks(layer)["weight"], chosen(layer.weight_score, 2, 4))


def test_a_plan_goes_through_json() -> None:
    made = plan(Block(), pattern="2:4")
    assert Plan.from_json(made.to_json()) == made
    assert "ranked among neighbours, 2:4" in made.totals()
    old = made.to_json().replace(', "pattern": null', "")
    assert Plan.from_json(old) == made
