"""Piggyback against its equations, and as the learner that the scheme `pretrained` brings."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from popup_surgery import ConversionError, bake, convert, load, masks, plan, save, start_from
from popup_surgery.learners import LEARNERS, Piggyback, get_learner
from popup_surgery.masking.settings import MaskingSettings
from support import check_ensemble, equal_states, slow_except

THRESHOLD = np.float32(5e-3)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def conv(**settings: Any) -> Any:
    torch.manual_seed(0)
    return convert(nn.Conv2d(3, 4, 3, bias=False), **{"scheme": "pretrained", **settings})


def moved(layer: Any) -> Any:
    """The layer with scores on both sides of the threshold, two of them at it and next to it."""
    with torch.no_grad():
        layer.weight_score.add_(0.02 * x(*layer.weight_score.shape))
        layer.weight_score.view(-1)[0] = float(THRESHOLD)
        layer.weight_score.view(-1)[1] = float(np.nextafter(THRESHOLD, np.float32(1)))
    return layer


def raw(layer: Any) -> Tensor:
    return layer._parameters["weight"].detach()


# the equations


def test_all_weights_take_part_at_first() -> None:
    layer = conv()
    assert layer.weight_score.dtype == torch.float32
    assert layer.weight_score.eq(float(np.float32(1e-2))).all()
    assert masks(layer)["weight"].all()
    assert torch.equal(layer.weight, raw(layer))
    large: Any = convert(nn.Linear(300_000, 1, bias=False), scheme="pretrained", learner_options={"init": 1})
    assert large.weight_score.eq(1).all(), "of more than one piece"


@pytest.mark.parametrize("scheme", ["pretrained", "signed_kaiming_constant", "kaiming_normal"])
def test_the_gradient_goes_straight_through_the_threshold(scheme: str) -> None:
    layer = moved(conv(scheme=scheme, learner="piggyback"))
    images = x(2, 3, 6, 6)
    out = layer(images)
    out.pow(3).sum().backward()

    kept = torch.from_numpy(layer.weight_score.detach().numpy() > THRESHOLD)
    assert 0 < kept.sum() < kept.numel()
    assert kept.view(-1)[:2].tolist() == [False, True], "a score at the threshold is not above it"
    assert torch.equal(masks(layer)["weight"], kept)
    effective = (raw(layer) * kept).requires_grad_()
    expected = nn.functional.conv2d(images, effective)
    expected.pow(3).sum().backward()
    torch.testing.assert_close(out, expected)
    assert effective.grad is not None
    torch.testing.assert_close(layer.weight_score.grad, effective.grad * raw(layer))
    assert (layer.weight_score.grad != 0).all(), "kept and dropped weights alike"


def test_the_gradient_for_a_weight_that_learns_too() -> None:
    layer = moved(conv())
    layer._parameters["weight"].requires_grad_()
    layer(x(2, 3, 6, 6)).pow(2).sum().backward()
    weight = raw(layer).clone().requires_grad_()
    nn.functional.conv2d(x(2, 3, 6, 6), weight * masks(layer)["weight"]).pow(2).sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, weight.grad)


def test_each_read_sees_the_scores_as_they_are() -> None:
    """Also after a write that no version counter shows."""
    layer = conv()
    assert layer.weight.ne(0).all()
    layer.weight_score.data[0] = 0
    assert layer.weight[0].eq(0).all()
    assert layer.weight[1:].ne(0).all()
    layer.weight_score.data.fill_(math.nan)
    assert layer.weight.eq(0).all(), "NaN is not above the threshold"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_stay_float32_in_a_network_of_another_dtype(dtype: torch.dtype) -> None:
    layer = moved(conv()).to(dtype)
    layer(x(2, 3, 6, 6).to(dtype)).square().sum().backward()
    assert layer.weight.dtype == dtype
    assert layer.weight_score.grad.dtype == layer.weight_score.dtype == torch.float32


@pytest.mark.parametrize("backend", slow_except(["aot_eager", "inductor"], ["aot_eager"]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_a_compiled_network_compares_as_an_eager_one(backend: str) -> None:
    torch._dynamo.reset()
    layer, images = moved(conv()), x(2, 3, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        got, expected = compiled(images), layer(images)
        torch.testing.assert_close(got, expected)
        by_both = [torch.autograd.grad(out.pow(2).sum(), layer.weight_score)[0] for out in (got, expected)]
        torch.testing.assert_close(*by_both)
        with torch.no_grad():
            layer.weight_score.neg_().add_(2 * float(THRESHOLD))
    torch._dynamo.reset()


def test_functional_calls_and_ensembles_compare_each_members_scores() -> None:
    members = [moved(convert(nn.Linear(6, 5), learner="piggyback", seed=seed)) for seed in (1, 2, 3)]
    for scale, member in enumerate(members):
        member.weight_score.data.mul_(scale)
    images = x(4, 6)
    check_ensemble(members, images)
    state = dict(members[2].named_parameters())
    torch.testing.assert_close(torch.func.functional_call(members[0], state, (images,)), members[2](images))


# files


def test_a_layer_may_end_with_nothing(tmp_path: Path) -> None:
    net: Any = convert(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), learner="piggyback")
    net[0].weight_score.data.zero_()
    manifest = save(net, tmp_path / "file", probe=(1, 4))
    assert [entry.kept for entry in manifest.masked] == [0, 6]
    again = load(tmp_path / "file", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    assert equal_states(again, bake(net))


@pytest.mark.parametrize("options", [{}, {"init": 3, "threshold": -0.1}, {"init": 1e-30, "threshold": 0}])
def test_scores_from_a_mask_give_that_mask(options: dict[str, Any]) -> None:
    learner = get_learner("piggyback", options)
    assert isinstance(learner, Piggyback)
    threshold = float(np.float32(learner.threshold))
    first = torch.full((50,), float(np.float32(learner.init)))
    near = torch.tensor(threshold).nextafter(torch.tensor(9.0))
    scores = [first, torch.cat([x(40), torch.tensor([threshold]), near.view(1), torch.zeros(2)])]
    wanted = [torch.arange(len(score)) % 3 == 0 for score in scores]
    for chosen in (wanted, [~mask for mask in wanted], [torch.ones_like(mask) for mask in wanted]):
        found = learner.seed_from_mask(scores, chosen)
        assert all(torch.equal(a, b) for a, b in zip(learner.select(found, 0).masks, chosen, strict=True))
        assert all(score.dtype == torch.float32 for score in found)
    assert torch.equal(learner.seed_from_mask([first], [torch.ones(50, dtype=torch.bool)])[0], first)


def test_a_run_starts_from_the_mask_of_a_file(tmp_path: Path) -> None:
    net = conv()
    other = moved(copy.deepcopy(net))
    save(other, tmp_path / "file")
    start_from(net, tmp_path / "file")
    assert torch.equal(masks(net)["weight"], masks(other)["weight"])
    kept = masks(net)["weight"]
    torch.testing.assert_close(net.weight_score.detach(), torch.where(kept, 0.01, 0.0))


# settings


def test_a_pretrained_scheme_brings_it_unless_k_or_a_learner_is_given() -> None:
    of = MaskingSettings.of
    found = of({"scheme": "pretrained"})
    assert (found.learner, found.k, found.scaled, found.scope) == ("piggyback", None, False, "layer")
    assert found == of({"scheme": "pretrained", "learner": "piggyback"})
    assert found == of({"scheme": "pretrained", "scaled": False, "scope": "layer", "k": None})
    assert of({"scheme": "pretrained", "learner_options": {"init": 1}}).learner_options == {"init": 1}
    for given in (
        {"k": 0.3}, {"k": {"fc": 0.3}}, {"learner": "edge_popup"}, {"learner": "edge_popup", "scope": "global"},
    ):  # fmt: skip
        found = of({"scheme": "pretrained", **given})
        assert (found.learner, found.k is None) == ("edge_popup", False)
    for scheme in ({"*": "pretrained"}, {"*": "pretrained", "fc": "kaiming_normal"}, "kaiming_normal"):
        assert of({"scheme": scheme}).learner == "edge_popup"


def test_a_converted_network_keeps_the_learner_that_its_scheme_brought() -> None:
    net: Any = convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), scheme="pretrained")
    assert convert(net) is net
    assert convert(net, scheme="pretrained", learner="piggyback") is net
    with pytest.raises(ConversionError, match=r"converted with k=None, which 0\.5 cannot change"):
        convert(net, 0.5)
    with pytest.raises(ConversionError, match=r"converted with learner='piggyback', which 'edge_popup' cannot change"):
        convert(net, learner="edge_popup")
    assert "pretrained, seed 0, piggyback" in plan(nn.Linear(3, 2), scheme="pretrained").totals()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learner": "piggyback", "k": 0.5}, r"k is 0\.5; expected None; piggyback takes no k"),
        ({"scaled": True}, r"scaled is True; expected False; .*; scheme pretrained brings it unless k or a learner"),
        ({"scope": "global"}, r"scope is 'global'; expected 'layer'; piggyback takes no k"),
        ({"learner_options": {"init": "zero"}}, r"piggyback: init is 'zero'; expected a number"),
        ({"learner_options": {"init": True}}, r"init is True; expected a number"),
        ({"learner_options": {"init": math.nan}}, r"init is nan; expected a number"),
        ({"learner_options": {"init": math.inf}}, r"init is inf; expected a number"),
        ({"learner_options": {"threshold": -1e300}}, r"threshold is -1e\+300; expected a number"),
        ({"learner_options": {"threshold": None}}, r"threshold is None; expected a number"),
        ({"learner_options": {"init": 5e-3}}, r"init is 0\.005; expected more than threshold, 0\.005, in float32"),
        (
            {"learner_options": {"init": 1 + 1e-9, "threshold": 1}},
            r"init is 1\.000000001; expected more than threshold",
        ),
        ({"learner_options": {"thresold": 0}}, r"piggyback has no option 'thresold'; nearest: threshold"),
    ],
)
def test_what_convert_refuses(settings: dict[str, Any], says: str) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ConversionError, match=says) as caught:
        convert(layer, scheme="pretrained", **settings)
    assert "\n" not in str(caught.value)
    assert type(layer) is nn.Linear


def test_it_alone_starts_with_the_whole_network() -> None:
    assert [name for name, learner in LEARNERS.items() if learner.starts_whole] == ["piggyback"]
