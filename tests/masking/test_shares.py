"""How k is spread over layers: the rules, and the floor of a global ranking."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from popup_surgery import ConversionError, bake, build, convert, inspect, load, masks, plan, save, selection
from popup_surgery.learners import LEARNERS, EdgePopup, register_learner
from popup_surgery.masking.settings import RULES, MaskingSettings
from popup_surgery.masking.shares import Layer, spread
from popup_surgery.selection import gpu, kept_count, select, select_op
from support import top

RULE: dict[str, float | str] = {"rule": "erk", "k": 0.1}


# rules


def proportional(sizes: list[int], weights: list[float], kept: int) -> list[float]:
    """RigL's way: what would be more than full is full, and the others share what is left, until nothing is."""
    full: set[int] = set()
    while True:
        left = kept - sum(sizes[i] for i in full)
        factor = left / sum(w for i, w in enumerate(weights) if i not in full)
        more = {i for i, w in enumerate(weights) if i not in full and factor * w > sizes[i]}
        if not more:
            return [float(sizes[i]) if i in full else factor * w for i, w in enumerate(weights)]
        full |= more


@pytest.mark.parametrize("k", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_against_its_paper_on_conv4(rule: str, k: float) -> None:
    found = plan(build("conv4"), {"rule": rule, "k": k})
    sizes, shapes = [weight.numel for weight in found.masked], [weight.shape for weight in found.masked]
    weights = {
        "uniform": [float(n) for n in sizes],
        "erk": [n * sum(shape) / math.prod(shape) for n, shape in zip(sizes, shapes)],
        "balanced": [1.0] * len(sizes),
        "fan": [float(shape[0]) for shape in shapes],  # one output each, times the same number of inputs
    }[rule]
    expected = proportional(sizes, weights, kept_count(sum(sizes), k))
    assert found.kept == kept_count(sum(sizes), k)
    assert all(weight.kept is not None and abs(weight.kept - x) <= 1 for weight, x in zip(found.masked, expected))
    assert all(weight.k == weight.kept / weight.numel for weight in found.masked if weight.kept)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_rule_keeps_exactly_k_of_any_network(data: st.DataObject) -> None:
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=3).map(tuple), min_size=1, max_size=12)
    )
    layers = [Layer(shape, math.prod(shape), float(math.prod(shape[1:]))) for shape in shapes]
    kept = data.draw(st.integers(len(layers), sum(layer.numel for layer in layers)))
    for rule in RULES:
        counts = spread(layers, rule, kept)
        assert sum(counts) == kept
        assert all(1 <= count <= layer.numel for count, layer in zip(counts, layers, strict=True))
        order = sorted(range(len(layers)), key=lambda i: layers[i].weight(rule))
        for a, b in pairwise(order):  # more for a layer of more weight, unless it is full
            assert counts[a] <= counts[b] + 1 or counts[b] == layers[b].numel


def test_the_network_and_its_file_have_the_counts_of_the_plan(tmp_path: Any) -> None:
    """Also the widths of `scaled` weights, which are those of each layer's own k."""
    small: dict[str, Any] = {"width": 0.25, "in_chans": 1, "img_size": 8}
    net = convert(build("conv2", **small), RULE, scheme="kaiming_normal")
    planned = plan(build("conv2", **small), RULE, scheme="kaiming_normal")
    plain = plan(build("conv2", **small), 1.0, scheme="kaiming_normal")
    for weight, full, mask in zip(planned.masked, plain.masked, masks(net).values(), strict=True):
        assert int(mask.sum()) == weight.kept
        assert weight.k is not None
        assert weight.std == pytest.approx(full.std / math.sqrt(weight.k))
    save(net, tmp_path / "net")
    manifest = inspect(tmp_path / "net")
    assert [entry.kept for entry in manifest.masked] == [weight.kept for weight in planned.masked]
    assert [entry.note["k"] for entry in manifest.masked] == [weight.k for weight in planned.masked]
    read = load(tmp_path / "net")
    assert all(map(torch.equal, read.state_dict().values(), bake(net).state_dict().values()))
    assert type(planned).from_json(planned.to_json()) == planned
    assert "(10.0%) by the rule erk" in planned.totals()


def test_patterns_beside_a_rule_set_single_layers() -> None:
    net = build("conv4")
    last = plan(net).masked[-1]
    found = plan(net, {**RULE, last.key.removesuffix(".weight"): 0.5})
    assert found.masked[-1].kept == kept_count(last.numel, 0.5)
    assert found.kept == kept_count(found.weights, 0.1)
    assert found.masked[-1].kept != plan(net, RULE).masked[-1].kept


def test_a_new_layer_keeps_what_the_others_leave() -> None:
    net = build("conv4")
    convert(net, RULE)
    kept = sum(int(mask.sum()) for mask in masks(net).values())
    name = plan(build("conv4")).masked[-1].key.removesuffix(".weight")
    before = masks(net)
    owner = net.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Linear(256, 10, bias=False))
    convert(net)
    after = masks(net)
    assert sum(int(mask.sum()) for mask in after.values()) == kept
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith(name))
    assert convert(net, RULE) is net
    with pytest.raises(ConversionError, match=r"converted with k=\{'rule': 'erk', 'k': 0.1\}, which .* cannot change"):
        convert(net, {"rule": "fan", "k": 0.1})


@pytest.mark.parametrize(
    ("k", "said"),
    [
        ({"rule": "erks", "k": 0.1}, "rule is 'erks'; expected balanced, erk, fan or uniform"),
        ({"rule": None, "k": 0.1}, "rule is None; expected balanced"),
        ({"rule": "erk"}, "k is missing beside rule"),
        ({"rule": "eks"}, "rule is 'eks'; .*; and k is missing beside rule"),
        ({"rule": "erk", "k": 1.5}, "^k is 1.5; expected a number above 0 and up to 1"),
        ({"rule": "erk", "k": True}, "^k is True; expected a number"),
        ({"rule": "erk", "k": 0.1, "*": 0.2}, r"'\*' is beside rule"),
        ({"rule": "erk", "k": 0.1, "0": 2}, "^k for '0' is 2; expected a number above 0 and up to 1"),
        ({"rule": "erk", "k": 0.1, "7": 0.2}, "k has '7', which matches no layer"),
        ({"rule": "erk", "k": 0.001}, "k=0.001 keeps 1 of 100 weights, and the rule erk cannot: expected 2 to 100"),
        (
            {"rule": "erk", "k": 0.1, "0": 1.0},
            "keeps 10 of 100 weights, .* expected 61 to 100, .* 60 in those with a k",
        ),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(k: Any, said: str) -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    with pytest.raises(ConversionError, match=said):
        plan(net, k)


def test_a_layer_may_be_called_rule() -> None:
    net = nn.Sequential()
    net.add_module("rule", nn.Linear(10, 10))
    assert plan(net, {"rule": 0.5}).kept == 50


def test_a_rule_and_a_global_ranking_exclude_each_other() -> None:
    with pytest.raises(ConversionError, match="scope='global' ranks all layers together and spreads k by the scores"):
        MaskingSettings.of({"k": RULE, "scope": "global"})


# the floor


def right(scores: list[Tensor], kept: int, floors: list[int]) -> list[Tensor]:
    """Each layer's own largest first, then the largest of all others, by stable sorts."""
    lowest = [top([score], floor)[0] for score, floor in zip(scores, floors)]
    flat = torch.cat([score.reshape(-1).abs() for score in scores])
    sure = torch.cat([mask.reshape(-1) for mask in lowest])
    rest = [i for i in flat.argsort(descending=True, stable=True).tolist() if not sure[i]]
    sure[rest[: kept - int(sure.sum())]] = True
    return [part.view(s.shape) for part, s in zip(sure.split([s.numel() for s in scores]), scores)]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_floor_against_sorting(data: st.DataObject) -> None:
    """Few values, so that there are ties within layers, between them, and at the floors."""
    value = st.integers(-3, 3).map(float)
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    scores = [torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n))) for n in sizes]
    floors = [data.draw(st.integers(0, n)) for n in sizes]
    kept = data.draw(st.integers(sum(floors), sum(sizes)))
    selection = select(scores, kept, floors)
    assert all(map(torch.equal, selection.masks, right(scores, kept, floors)))
    assert selection.holds(scores)
    assert all(selection.holds(scores, i) for i in range(len(scores)))
    changed = data.draw(st.integers(0, len(scores) - 1))
    n = len(scores[changed])
    scores[changed] = torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n)))
    if selection.holds(scores):
        assert all(map(torch.equal, selection.masks, select(scores, kept, floors).masks))
    assert not selection.holds([*scores, scores[0]])


def test_a_floor_works_on_any_strides_and_beyond_all_numbers() -> None:
    scores = [torch.full((2, 3), torch.inf).t(), torch.full((4,), torch.nan), torch.zeros(5)[::2]]
    found = select(scores, 6, [1, 1, 2]).masks
    assert [int(mask.sum()) for mask in found] == [1, 3, 2]
    assert all(map(torch.equal, select_op(scores, 6, [1, 1, 2]), found))


@pytest.mark.parametrize("name", [name for name, learner in LEARNERS.items() if learner.takes_k])
def test_every_learner_with_a_k_takes_a_floor(name: str) -> None:
    net = convert(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), 0.1, scope="global", floor=40, learner=name)
    with torch.no_grad():
        net.get_parameter("0.weight_score").mul_(1e-3)
    assert [int(mask.sum()) for mask in masks(net).values()] == [40, 50]


def test_a_floor_on_a_device_without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "backend_of", lambda tensors: gpu)
    torch.manual_seed(0)
    scores = [torch.randn(6, 5) * 1e-3, torch.randn(40), torch.randn(3, 3).t()]
    found = select(scores, 30, [7, 1, 2])
    assert all(map(torch.equal, found.masks, right(scores, 30, [7, 1, 2])))
    assert not found.holds(scores)


def test_floors_that_do_not_fit_are_refused() -> None:
    for floors in ([3, 3], [1], [5, 0]):
        with pytest.raises(ValueError, match=r"the floors are|kept is 5"):
            select([torch.ones(4), torch.ones(4)], 5, floors)


def collapsing(floor: float | None, k: float = 0.1) -> nn.Module:
    """A network whose first layer has the lowest scores of all."""
    net = convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), k, scope="global", floor=floor)
    with torch.no_grad():
        net.get_parameter("0.weight_score").mul_(1e-3)
    return net


@pytest.mark.parametrize(("floor", "kept"), [(None, [0, 90]), (0.05, [30, 60]), (7, [7, 83]), (7.0, [7, 83])])
def test_no_layer_keeps_less_than_the_floor(floor: float | None, kept: list[int]) -> None:
    net = collapsing(floor)
    assert [int(mask.sum()) for mask in masks(net).values()] == kept


def test_a_floor_is_followed_from_step_to_step_without_ranking_twice(rankings: list[int]) -> None:
    net = collapsing(0.05)
    scores = [net.get_parameter(f"{i}.weight_score") for i in (0, 2)]
    stepping = torch.optim.SGD(scores, lr=1.0)
    for seed in range(4):
        stepping.zero_grad()
        torch.manual_seed(seed)
        net(torch.randn(3, 20)).square().sum().backward()
        stepping.step()
        rankings.clear()
        found = list(masks(net).values())
        assert all(map(torch.equal, found, right([score.detach() for score in scores], 90, [30, 15])))
        net(torch.randn(3, 20))
        assert rankings == [90]  # once, for all reads
    twin = copy.deepcopy(net)
    assert all(map(torch.equal, masks(twin).values(), masks(net).values()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_floor_in_a_compiled_network_and_under_vmap() -> None:
    torch._dynamo.reset()
    net = collapsing(0.05)
    images = torch.randn(3, 20)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(images), net(images))
    torch._dynamo.reset()
    stack = torch.stack([net.get_parameter("0.weight_score").detach() * scale for scale in (1.0, 1e4)])
    first, second = (net.get_parameter(f"{i}.weight_score").detach() for i in (0, 2))
    found = torch.vmap(lambda score: select_op([score, second], 90, [30, 15])[0])(stack)
    assert torch.equal(found[0], right([first, second], 90, [30, 15])[0])
    assert torch.equal(found[1], right([first * 1e4, second], 90, [30, 15])[0])


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"floor": 0.05}, "expected none unless scope is global"),
        ({"floor": 0.2, "k": 0.1, "scope": "global"}, "floor is 0.2; expected at most k, 0.1"),
        ({"floor": 0, "scope": "global"}, "floor is 0; expected a share above 0 and below 1"),
        ({"floor": -1, "scope": "global"}, "floor is -1; expected a share"),
        ({"floor": math.nan, "scope": "global"}, "floor is nan; expected a share"),
        ({"floor": math.inf, "scope": "global"}, "floor is inf; expected a share"),
        ({"floor": True, "scope": "global"}, "floor is True; expected a share"),
        ({"floor": "0.1", "scope": "global"}, "floor is '0.1'; expected a share"),
        ({"floor": 1.5, "scope": "global"}, "floor is 1.5; .* a whole number of weights"),
        ({"floor": 60, "k": 0.1, "scope": "global"}, "floor=60 keeps 120 weights in 2 layers; expected at most 90"),
        ({"floor": 0.05, "learner": "supermask"}, "floor is 0.05; expected None; supermask takes no k"),
    ],
)
def test_a_floor_that_cannot_be_kept_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        plan(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), **given_)


def test_a_learner_that_ranks_in_its_own_way_says_whether_it_takes_a_floor() -> None:
    class Own(EdgePopup):
        takes_floor = False

    register_learner("own", Own())
    try:
        with pytest.raises(ConversionError, match="floor is 3; expected None: own ranks without a floor"):
            plan(nn.Linear(20, 30), 0.5, scope="global", floor=3, learner="own")
    finally:
        LEARNERS.pop("own")
