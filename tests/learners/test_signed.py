"""Signed supermasks against their equations, and what `convert` says of their options."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import (
    ArtifactError,
    ConversionError,
    RecipeError,
    bake,
    convert,
    inspect,
    load,
    masks,
    save,
    start_from,
    train,
)
from popup_surgery.learners import Signed, get_learner
from popup_surgery.weights import SCHEMES
from support import GOLDEN, check_ensemble, equal_states, top

THRESHOLD: dict[str, Any] = {"threshold": 0.1}


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def conv(**settings: Any) -> Any:
    torch.manual_seed(0)
    return convert(nn.Conv2d(3, 4, 3, bias=False), learner="signed", **settings)


def raw(layer: Any) -> Tensor:
    return layer._parameters["weight"].detach()


def taking_part(score: Tensor, k: float | None) -> Tensor:
    if k is None:
        return score.abs() > 0.1
    return top([score], round(k * score.numel()))[0]


# the equations


@pytest.mark.parametrize("scheme", ["pretrained", *SCHEMES])
@pytest.mark.parametrize("k", [0.25, None])
def test_ten_steps_are_those_of_the_paper(scheme: str, k: float | None) -> None:
    """Koster et al., 2022: m = sign(s) · [|s| > τ], w_eff = w · m, and the gradient of m goes to s unchanged."""
    layer = conv(scheme=scheme, scaled=False, **({"k": k} if k else {"learner_options": THRESHOLD}))
    optimiser = torch.optim.SGD([layer.weight_score], lr=0.05, momentum=0.9, weight_decay=3e-4, nesterov=True)
    weight, score = raw(layer).clone(), layer.weight_score.detach().clone()
    speed = torch.zeros_like(score)
    signs = set()
    for step in range(10):
        images, target = x(step + 1, 3, 6, 6), x(step + 1, 4, 4, 4)
        optimiser.zero_grad()
        (layer(images) - target).square().mean().backward()
        optimiser.step()

        m = (score.sign() * taking_part(score, k)).requires_grad_()
        (nn.functional.conv2d(images, weight * m) - target).square().mean().backward()
        assert m.grad is not None
        gradient = m.grad + 3e-4 * score
        speed = 0.9 * speed + gradient
        score = score - 0.05 * (gradient + 0.9 * speed)
        torch.testing.assert_close(layer.weight_score.detach(), score)
        signs |= set((m.detach() * 1).unique().tolist())
    assert signs == {-1.0, 0.0, 1.0}
    torch.testing.assert_close(layer.weight.detach(), weight * score.sign() * taking_part(score, k))


def test_a_threshold_is_compared_at_each_read_and_never_includes_equality() -> None:
    layer = conv(learner_options=THRESHOLD)
    at = float(torch.tensor(0.1))
    above = float(torch.tensor(0.1).nextafter(torch.tensor(1.0)))
    layer.weight_score.data.zero_()
    layer.weight_score.data.view(-1)[:5] = torch.tensor([at, -at, above, -above, math.nan])
    assert masks(layer)["weight"].view(-1)[:5].tolist() == [False, False, True, True, False]
    flat, weight = layer.weight.detach().view(-1), raw(layer).view(-1)
    assert flat[2:4].tolist() == [float(weight[2]), -float(weight[3])]
    layer.weight_score.data.fill_(1)
    assert torch.equal(layer.weight, raw(layer))
    layer.weight_score.data.fill_(-1)
    assert torch.equal(layer.weight, -raw(layer))


def test_the_gradient_for_a_weight_that_learns_too() -> None:
    layer = conv()
    layer._parameters["weight"].requires_grad_()
    layer(x(2, 3, 6, 6)).pow(2).sum().backward()
    weight, score = raw(layer).clone().requires_grad_(), layer.weight_score.detach()
    factor = score.sign() * masks(layer)["weight"]
    nn.functional.conv2d(x(2, 3, 6, 6), weight * factor).pow(2).sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_stay_float32_in_a_network_of_another_dtype(dtype: torch.dtype) -> None:
    layer = conv().to(dtype)
    layer.weight_score.data.mul_(1e-42)  # whose signs float16 and bfloat16 would still have
    layer(x(2, 3, 6, 6).to(dtype)).square().sum().backward()
    assert layer.weight.dtype == dtype
    assert layer.weight.lt(0).any()
    assert layer.weight_score.grad.dtype == layer.weight_score.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, THRESHOLD])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_a_compiled_network_computes_as_an_eager_one(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer, images = conv(learner_options=options), x(2, 3, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        got, expected = compiled(images), layer(images)
        torch.testing.assert_close(got, expected)
        by_both = [torch.autograd.grad(out.pow(2).sum(), layer.weight_score)[0] for out in (got, expected)]
        torch.testing.assert_close(*by_both)
        with torch.no_grad():
            layer.weight_score.add_(0.1 * x(*layer.weight_score.shape))
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, THRESHOLD])
def test_functional_calls_and_ensembles_see_each_members_signs(options: dict[str, Any]) -> None:
    members = [convert(nn.Linear(6, 5), learner="signed", learner_options=options, seed=seed) for seed in (1, 2, 3)]
    check_ensemble(members, x(4, 6))


# scores


def test_scores_start_within_the_bound() -> None:
    for init, bound in (("uniform", 27**-0.5), (0.5, 0.5), (2, 2.0)):
        score = conv(learner_options={"init": init}).weight_score
        assert 0.9 * bound < score.abs().max() <= bound * 1.000001
    edge_popup: Any = convert(nn.Conv2d(3, 4, 3, bias=False))
    assert torch.equal(conv().weight_score, edge_popup.weight_score)


@pytest.mark.parametrize("options", [{}, THRESHOLD, {"threshold": 0}])
def test_scores_from_a_mask_give_that_mask_and_keep_their_signs(options: dict[str, Any]) -> None:
    learner = get_learner("signed", options)
    assert isinstance(learner, Signed)
    scores = [x(50), 0.1 * x(40)]
    for third in (lambda n: torch.arange(n) % 3 == 0, lambda n: torch.zeros(n, dtype=torch.bool)):
        chosen = [third(len(score)) for score in scores]
        kept = sum(int(mask.sum()) for mask in chosen)
        found = learner.seed_from_mask(scores, chosen)
        assert all(torch.equal(a, b) for a, b in zip(learner.select(found, kept).masks, chosen, strict=True))
        assert all(torch.equal(a.signbit(), b.signbit()) for a, b in zip(found, scores, strict=True))


@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "kaiming_uniform"])
@pytest.mark.parametrize("options", [{}, THRESHOLD])
def test_a_run_starts_with_the_signs_of_a_file(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    def make(seed: int, **settings: Any) -> nn.Module:
        net = convert(nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 3)), scheme=scheme, scaled=False, **settings)
        for name, parameter in net.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        return net

    settings = {"learner": "signed", "learner_options": options}
    source, again = make(1, **settings), make(2, **settings)
    save(source, tmp_path / "file")
    start_from(again, tmp_path / "file")
    assert equal_states(bake(again), bake(source))
    before = make(3)
    if "constant" in scheme:  # a draw can give each sign
        start_from(before, tmp_path / "file")
        found, expected = bake(before).state_dict(), bake(source).state_dict()
        for name, value in expected.items():  # with a threshold, the file keeps another number of weights
            both = (found[name] != 0) & (value != 0)
            assert torch.equal(found[name][both], value[both])
            assert options or torch.equal(found[name], value)
        return
    with pytest.raises(
        ArtifactError, match=r"'0\.weight' has the plane 'sign', with which the network's learner cannot start; con"
    ):
        start_from(before, tmp_path / "file")
    assert equal_states(bake(before), bake(make(3)))


# settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"learner_options": {"threshold": "0.1"}},
            r"signed: threshold is '0\.1'; expected None, or a number from 0 to",
        ),
        ({"learner_options": {"threshold": -1}}, r"signed: threshold is -1; expected None, or a number from 0 to 1000"),
        ({"learner_options": {"threshold": math.nan}}, r"threshold is nan; expected None, or a number from 0 to 1000"),
        ({"learner_options": {"threshold": True}}, r"threshold is True; expected None, or a number from 0 to 1000"),
        ({"learner_options": {"init": 0}}, r"init is 0; expected 'uniform', or a number above 0 to 1000"),
        ({"learner_options": {"init": None}}, r"init is None; expected 'uniform', or a number above 0 to 1000"),
        ({"learner_options": {"init": math.inf}}, r"init is inf; expected 'uniform', or a number above 0 to 1000"),
        ({"learner_options": {"tau": 1}}, r"signed has no option 'tau'"),
        ({"k": 0.5, "learner_options": THRESHOLD}, r"k is 0\.5; expected None; signed takes no k, because its scores "),
        ({"scope": "global", "learner_options": THRESHOLD}, r"scope is 'global'; expected 'layer'; signed takes no k"),
        (
            {"learner_options": {"threshold": 0.6}},
            r"signed: threshold is 0\.6; expected less than 0\.577, up to which the scores of 'weight' are drawn, so "
            r"that weights take part at first; learner_options\.init sets a larger bound",
        ),
        ({"learner_options": {"threshold": 0.5, "init": 0.5}}, r"threshold is 0\.5; expected less than 0\.5, up to wh"),
    ],
)
def test_what_convert_refuses(settings: dict[str, Any], says: str) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ConversionError, match=says) as caught:
        convert(layer, learner="signed", **settings)
    assert "\n" not in str(caught.value)
    assert type(layer) is nn.Linear


def test_a_recipe_has_no_k_if_there_is_a_threshold(tmp_path: Path) -> None:
    tiny = GOLDEN / "tiny.yaml"
    options = ["surgery.learner=signed", "surgery.learner_options.threshold=0.1", "training.epochs=1"]
    with pytest.raises(RecipeError, match=r"surgery\.k is 0\.5; expected null; signed takes no k"):
        train(tiny, overrides=options, output=tmp_path / "k")
    with pytest.raises(RecipeError, match=r"surgery\.k"):
        train(tiny, overrides=["surgery.learner=signed", "surgery.k=null"], output=tmp_path / "none")
    result = train(tiny, overrides=[*options, "surgery.k=null"], output=tmp_path / "run")
    assert {entry.planes for entry in inspect(result.file).masked} == {("sign",)}
    assert equal_states(load(result.file), result.model)


@pytest.mark.parametrize("options", [{}, THRESHOLD])
def test_the_number_of_kept_weights_has_a_gradient(options: dict[str, Any]) -> None:
    learner = get_learner("signed", options)
    assert isinstance(learner, Signed)
    score = x(40).requires_grad_()
    mask = learner.select([score], 10).masks[0]
    kept = learner.kept_weights(score, mask)
    kept.backward()
    assert int(kept) == int(mask.sum())
    assert torch.equal(score.grad, score.detach().sign())  # type: ignore[arg-type]
