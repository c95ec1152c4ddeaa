"""Several nested masks of one score, against the equations, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import (
    ConversionError,
    RecipeError,
    bake,
    convert,
    inspect,
    load,
    masks,
    plan,
    save,
    start_from,
    train,
)
from popup_surgery.weights import SCHEMES
from support import GOLDEN, check_ensemble, equal_states, top

SHARES = [0.5, 0.25, 0.1]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def conv(shares: Any = SHARES, **settings: Any) -> Any:
    torch.manual_seed(0)
    return convert(nn.Conv2d(3, 4, 3, bias=False), shares[0], learner_options={"coats": shares}, **settings)


def raw(layer: Any) -> Tensor:
    return layer._parameters["weight"].detach()


def coats(score: Tensor, shares: list[float]) -> list[Tensor]:
    n = score.numel()
    return [top([score], n - int((1 - share) * n))[0].float() for share in shares]


@pytest.mark.parametrize("scheme", ["pretrained", *SCHEMES])
def test_ten_steps_are_those_of_the_paper(scheme: str) -> None:
    """Okoshi et al., 2022: w · Σᵢ [|s| ≥ tᵢ], each coat straight through to |s|."""
    layer = conv(scheme=scheme, learner="edge_popup", scaled=False)
    optimiser = torch.optim.SGD([layer.weight_score], lr=0.05, momentum=0.9, weight_decay=1e-4)
    weight, score = raw(layer).clone(), layer.weight_score.detach().clone()
    speed = torch.zeros_like(score)
    changed = 0
    before = coats(score, SHARES)
    for step in range(10):
        images, target = x(step + 1, 3, 6, 6), x(step + 1, 4, 4, 4)
        optimiser.zero_grad()
        (layer(images) - target).square().mean().backward()
        optimiser.step()

        size = score.abs().requires_grad_()
        through = [coat + size - size.detach() for coat in coats(score, SHARES)]
        (nn.functional.conv2d(images, weight * sum(through)) - target).square().mean().backward()
        assert size.grad is not None
        speed = 0.9 * speed + size.grad * score.sign() + 1e-4 * score
        score = score - 0.05 * speed
        torch.testing.assert_close(layer.weight_score.detach(), score)
        now = coats(score, SHARES)
        changed += any(not torch.equal(one, other) for one, other in zip(before, now, strict=True))
        before = now
    assert changed > 3
    torch.testing.assert_close(layer.weight.detach(), weight * sum(before))
    assert torch.equal(masks(layer)["weight"], before[0].bool())


def test_the_gradient_for_a_weight_that_learns_too() -> None:
    layer = conv()
    layer._parameters["weight"].requires_grad_()
    layer(x(2, 3, 6, 6)).pow(2).sum().backward()
    weight = raw(layer).clone().requires_grad_()
    factor = sum(coats(layer.weight_score.detach(), SHARES))
    nn.functional.conv2d(x(2, 3, 6, 6), weight * factor).pow(2).sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, weight.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_a_compiled_network_computes_as_an_eager_one(backend: str) -> None:
    torch._dynamo.reset()
    layer, images = conv(), x(2, 3, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        got, expected = compiled(images), layer(images)
        torch.testing.assert_close(got, expected)
        by_both = [torch.autograd.grad(out.pow(2).sum(), layer.weight_score)[0] for out in (got, expected)]
        torch.testing.assert_close(*by_both)
        with torch.no_grad():
            layer.weight_score.add_(0.1 * x(*layer.weight_score.shape))
    torch._dynamo.reset()


def test_functional_calls_and_ensembles_see_each_members_coats() -> None:
    settings: dict[str, Any] = {"learner_options": {"coats": SHARES}}
    members = [convert(nn.Linear(6, 5), 0.5, seed=seed, **settings) for seed in (1, 2, 3)]
    check_ensemble(members, x(4, 6))


def test_without_coats_it_is_edge_popup() -> None:
    one, other = conv(), convert(nn.Conv2d(3, 4, 3, bias=False), 0.5)
    assert torch.equal(masks(one)["weight"], masks(other)["weight"])
    assert plan(nn.Linear(9, 9), 0.5, learner_options={"coats": None}) is not None


@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "kaiming_uniform"])
def test_a_run_starts_with_the_coats_of_a_file(scheme: str, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        plain = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 3))
        net = convert(plain, 0.5, scheme=scheme, learner_options={"coats": [0.5, 0.25, 0.1, 0.05]})
        for name, parameter in net.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        return net

    source, again = make(1), make(2)
    save(source, tmp_path / "file")
    start_from(again, tmp_path / "file")
    assert equal_states(bake(again), bake(source))


def test_layers_of_a_few_weights(tmp_path: Path) -> None:
    """Where a coat has as many weights as the one before, or one."""
    net = convert(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), 0.9, learner_options={"coats": [0.9, 0.8, 0.01]})
    save(net, tmp_path / "file")
    assert equal_states(load(tmp_path / "file", nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))), bake(net))


EXPECTED = r"; expected 2 to 8 shares kept, above 0 and up to 1, each smaller than the one before"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learner_options": {"coats": [0.1, 0.3]}}, r"edge_popup: coats is \[0\.1, 0\.3\]" + EXPECTED),
        ({"learner_options": {"coats": [0.3, 0.3]}}, r"coats is \[0\.3, 0\.3\]" + EXPECTED),
        ({"learner_options": {"coats": [0.3]}}, r"coats is \[0\.3\]" + EXPECTED),
        ({"learner_options": {"coats": []}}, r"coats is \[\]" + EXPECTED),
        ({"learner_options": {"coats": 0.3}}, r"coats is 0\.3" + EXPECTED),
        ({"learner_options": {"coats": "0.3"}}, r"coats is '0\.3'" + EXPECTED),
        ({"learner_options": {"coats": {"a": 0.3}}}, r"coats is \{'a': 0\.3\}" + EXPECTED),
        ({"learner_options": {"coats": [0.3, 0]}}, r"coats is \[0\.3, 0\]" + EXPECTED),
        ({"learner_options": {"coats": [1.5, 0.3]}}, r"coats is \[1\.5, 0\.3\]" + EXPECTED),
        ({"learner_options": {"coats": [0.3, math.nan]}}, r"coats is \[0\.3, nan\]" + EXPECTED),
        ({"learner_options": {"coats": [True, 0.3]}}, r"coats is \[True, 0\.3\]" + EXPECTED),
        ({"learner_options": {"coats": [0.9 - i / 10 for i in range(9)]}}, EXPECTED),
        (
            {"k": 0.2, "learner_options": {"coats": [0.3, 0.1]}},
            r"k is 0\.2; expected 0\.3, the first of learner_option",
        ),
        ({"k": {"*": 0.3}, "learner_options": {"coats": [0.3, 0.1]}}, r"k is \{'\*': 0\.3\}; expected 0\.3, the first"),
        ({"learner_options": {"coats": [0.2, 0.1]}}, r"k is 0\.3; expected 0\.2, the first of learner_options\.coats"),
        (
            {"pattern": "2:4", "learner_options": {"coats": [0.5, 0.1]}},
            r"pattern is '2:4'; expected None; .* edge_popup with coats chooses in another way",
        ),
        (
            {"scope": "global", "learner_options": {"coats": [0.3, 0.1]}},
            r"scope is 'global'; expected 'layer'; edge_popup with",
        ),
    ],
)
def test_what_convert_refuses(settings: dict[str, Any], says: str) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ConversionError, match=says) as caught:
        convert(layer, **settings)
    assert "\n" not in str(caught.value)
    assert type(layer) is nn.Linear


def test_a_recipe_says_all_that_is_wrong(tmp_path: Path) -> None:
    tiny, options = GOLDEN / "tiny.yaml", ["surgery.learner_options={coats: [0.3, 0.1, 0.05]}", "training.epochs=2"]
    with pytest.raises(RecipeError) as caught:
        train(tiny, overrides=[*options, "surgery.scope=global"], output=tmp_path / "wrong")
    said = str(caught.value)
    assert "surgery.k is 0.5; expected 0.3, the first of learner_options.coats" in said
    assert "surgery.scope is 'global'; expected layer; edge_popup with coats ranks each layer by itself" in said
    result = train(tiny, overrides=[*options, "surgery.k=0.3"], output=tmp_path / "run")
    assert {entry.planes for entry in inspect(result.file).masked} == {("coat2", "coat3")}
    assert equal_states(load(result.file), result.model)
