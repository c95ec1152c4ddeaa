"""The penalty on the share of kept weights: its value and gradient, in the loop, and where it has no place."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import ConversionError, Recipe, RecipeError, build, convert, density_penalty, masks, sampled, train
from popup_surgery.data.batches import quiet
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.learners import LEARNERS, get_learner
from popup_surgery.learners.base import Learner
from popup_surgery.masking.ranking import parameter_of, score_of
from popup_surgery.masking.walk import masked_weights
from popup_surgery.training.distributed import leave, start
from support import launch, slow_except, stopping

SUPERMASK = ["surgery.learner=supermask", "surgery.k=null", "training.weight_decay=0"]
PIGGYBACK = ["surgery.learner=piggyback", "surgery.k=null", "training.weight_decay=0"]
PENALTY = "training.density_penalty={weight: 2.0, target: 0.3}"


def net(learner: str, **options: Any) -> Any:
    """Two layers of 12 and 6 weights, with scores on both sides of every threshold."""
    k = 0.3 if get_learner(learner, options).takes_k else None
    found = convert(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), k, learner=learner, learner_options=options)
    with torch.no_grad():
        for i, (_, module, name, _) in enumerate(masked_weights(found)):
            score = score_of(module, name)
            score.copy_(torch.linspace(-2 - i, 3, score.numel()).view(score.shape))
    return found


def scores(model: nn.Module) -> list[Tensor]:
    return [score_of(module, name) for _, module, name, _ in masked_weights(model)]


def density(model: nn.Module) -> float:
    found = masks(model).values()
    return sum(int(mask.sum()) for mask in found) / sum(mask.numel() for mask in found)


# value and gradient


@pytest.mark.parametrize("target", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("rescale", [False, True])
def test_of_supermask_it_is_the_density_of_the_file_with_the_gradient_of_the_expected_number(
    target: float, rescale: bool
) -> None:
    model = net("supermask", rescale=rescale)
    with sampled(3):  # as within a step of the loop; it is not the density of the sample
        penalty = density_penalty(model, 1.5, target)
    kept = sum(int((score > 0).sum()) for score in scores(model))
    assert penalty.item() == pytest.approx(1.5 * max(0.0, kept / 18 - target))
    assert kept / 18 == density(model)
    penalty.backward()
    for score in scores(model):
        p = score.detach().sigmoid()
        expected = 1.5 / 18 * p * (1 - p) if kept / 18 > target else torch.zeros_like(p)
        torch.testing.assert_close(score.grad, expected)


def test_of_a_named_sample_it_is_the_expected_density() -> None:
    model = net("supermask", sample=4)
    expected = torch.cat([score.detach().sigmoid().view(-1) for score in scores(model)]).mean()
    torch.testing.assert_close(density_penalty(model).detach(), expected)


def test_of_piggyback_every_weight_pays_the_same() -> None:
    model = net("piggyback")
    penalty = density_penalty(model, target=0.1)
    assert penalty.item() == pytest.approx(density(model) - 0.1)
    penalty.backward()
    for score in scores(model):
        torch.testing.assert_close(score.grad, torch.full_like(score, 1 / 18)), "kept and dropped weights alike"


def test_of_signed_masks_it_pulls_every_score_to_0() -> None:
    model = net("signed", threshold=0.6, init=1.0)
    penalty = density_penalty(model, 9.0)
    assert penalty.item() == pytest.approx(9 * density(model))
    assert 0.5 < density(model) < 1
    penalty.backward()
    for score in scores(model):
        torch.testing.assert_close(score.grad, score.detach().sign() / 2)


def test_a_learner_of_ones_own_needs_nothing_more() -> None:
    """Its penalty follows from `effective`, whatever factor it has."""

    class Scaled(type(LEARNERS["piggyback"])):  # type: ignore[misc]
        rescale = True

        def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
            return super().effective(weight, score, mask) * self.factor(mask)

    learner: Learner = Scaled()
    score = torch.linspace(-1, 1, 10).requires_grad_()
    kept = learner.kept_weights(score, learner.select([score.detach()], 0).masks[0])
    assert kept.item() == pytest.approx(5)
    kept.backward()
    torch.testing.assert_close(score.grad, torch.ones(10))


def test_shared_and_wrapped_networks_count_each_weight_once() -> None:
    layer = nn.Linear(4, 4)
    model: Any = convert(nn.Sequential(layer, nn.ReLU(), layer), learner="piggyback")
    model[0].weight_score.data[:2] = 0
    assert density_penalty(nn.DataParallel(model)).item() == pytest.approx(0.5)
    compiled: Any = torch.compile(model)
    assert density_penalty(compiled).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (lambda: nn.Linear(3, 2), {}, r"Linear has no masked weights; convert it first"),
        (lambda: convert(nn.Linear(3, 2), 0.5), {}, r"edge_popup takes a k, which sets how many weights are kept"),
        (lambda: net("gem_miner"), {}, r"gem_miner takes a k"),
        (lambda: net("supermask"), {"weight": 0}, r"weight is 0; expected a number above 0"),
        (lambda: net("supermask"), {"weight": float("nan")}, r"weight is nan; expected a number above 0"),
        (lambda: net("supermask"), {"weight": True}, r"weight is True; expected a number above 0"),
        (lambda: net("supermask"), {"target": 1}, r"target is 1; expected a share from 0 and below 1"),
        (lambda: net("supermask"), {"target": "0.3"}, r"target is '0\.3'; expected a share"),
    ],
)
def test_what_the_function_refuses(model: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConversionError, match=says) as caught:
        density_penalty(model(), **arguments)
    assert "\n" not in str(caught.value)


# in the loop


def fitted(*overrides: str) -> Any:
    few = ["data.max_train=160", "training.epochs=2", "training.schedule=constant"]
    recipe = Recipe.load("digits", [*few, *overrides])
    return prepare(recipe, start(recipe.training), quiet)[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ten_steps_are_those_of_the_loss_with_the_penalty(accumulate: int) -> None:
    """Against SGD written out, on the threshold's straight-through gradient. The hinge ends within the ten steps."""
    overrides = [*PIGGYBACK, "training.lr=0.05", "training.density_penalty={weight: 100.0, target: 0.9}"]
    fit = fitted(*overrides, f"training.accumulate={accumulate}")
    plain = build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8)
    for parameter in plain.parameters():
        parameter.data.zero_()  # the biases
    weights = {key: parameter_of(module, name).detach() for key, module, name, _ in masked_weights(fit.core)}
    s: Any = {key: torch.full_like(weight, 1e-2).requires_grad_() for key, weight in weights.items()}
    buffers = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    threshold, n, found = torch.tensor(5e-3), sum(map(torch.numel, weights.values())), []
    for epoch in range(2):
        for images, labels, _ in fit.data.train(epoch):
            m = {key: (each > threshold).float() + (each - each.detach()) for key, each in s.items()}
            logits = torch.func.functional_call(plain, {key: weights[key] * m[key] for key in m}, (images,))
            share = sum(each.sum() for each in m.values()) / n
            found.append(float(share.detach()))
            loss = nn.functional.cross_entropy(logits, labels) + 100 * (share - 0.9).clamp(min=0)
            for key, grad in zip(s, torch.autograd.grad(loss, list(s.values())), strict=True):
                buffers[key].mul_(0.9).add_(grad)
                s[key].data.sub_(0.05 * buffers[key])
    assert len(found) == 10
    assert found[0] == 1
    assert found[-1] < 0.9 < found[2]
    fit.run(lambda epoch: None)
    for key, module, name, _ in masked_weights(fit.core):
        torch.testing.assert_close(score_of(module, name).detach(), s[key].detach(), rtol=1e-4, atol=1e-6)
    assert fit.history[-1].density == density(fit.core)


LEARN = {
    "supermask": [*SUPERMASK, "training.lr=50", "training.epochs=4"],
    "piggyback": [*PIGGYBACK, "training.lr=0.03", "training.epochs=4"],
}
WEIGHT = {"supermask": 2.0, "piggyback": 5.0}


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARN)
def test_a_target_is_reached_that_is_not_without_it(learner: str, tmp_path: Path) -> None:
    without = train("digits", overrides=LEARN[learner], output=tmp_path / "without")
    assert without.kept / without.weights > 0.4
    penalty = f"training.density_penalty={{weight: {WEIGHT[learner]}, target: 0.3}}"
    result = train("digits", overrides=[*LEARN[learner], penalty], output=tmp_path / "with")
    assert abs(result.kept / result.weights - 0.3) < 0.03
    assert result.accuracy > 0.7
    assert [epoch.density for epoch in result.history][-1] == result.kept / result.weights


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_file(tmp_path: Path) -> None:
    overrides = [*LEARN["supermask"], PENALTY, "training.epochs=2"]
    through = train("digits", overrides=overrides, output=tmp_path / "through")
    with pytest.raises(Stopped):
        train("digits", overrides=overrides, output=tmp_path / "run", progress=stopping(60))
    result = train("digits", overrides=overrides, output=tmp_path / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()
    assert [e.density for e in result.history] == [e.density for e in through.history]


def first_update(file: Path, accumulate: int) -> None:
    """Take one step in this process's part of a run, and write the scores after it."""
    fit = fitted(*SUPERMASK, "training.lr=1", PENALTY, f"training.accumulate={accumulate}")
    fit._one_step(fit.data.train(0, fit.part))
    if fit.accelerator.is_main_process:
        torch.save({n: p.detach() for n, p in fit.core.named_parameters() if p.requires_grad}, file)
    fit.accelerator.wait_for_everyone()
    leave()


@pytest.mark.parametrize(("processes", "accumulate"), slow_except([(1, 3), (2, 1), (2, 2)], [(1, 3)]))
def test_the_first_update_is_the_same_however_the_batch_is_divided(
    processes: int, accumulate: int, tmp_path: Path
) -> None:
    first_update(tmp_path / "whole.pt", 1)
    file = tmp_path / "scores.pt"
    if processes == 1:
        first_update(file, accumulate)
    else:
        launch(processes, __file__, file, accumulate)
    whole, divided = (torch.load(each, weights_only=True) for each in (tmp_path / "whole.pt", file))
    for name, score in whole.items():
        assert (divided[name] - score).abs().max() <= 1e-6 * score.abs().max(), name


def test_an_epoch_says_how_many_weights_take_part(tmp_path: Path) -> None:
    """Of a dense network, where nothing is masked, it says nothing."""
    few = ["training.epochs=1", "data.max_train=64"]
    (line,) = [epoch.line() for epoch in train("digits", overrides=few, output=tmp_path / "hidden").history]
    assert line["density"] == pytest.approx(0.5, abs=0.001)
    (line,) = [e.line() for e in train("digits", overrides=["surgery=none", *few], output=tmp_path / "dense").history]
    assert "density" not in line


# recipes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            [PENALTY],
            r"training\.density_penalty is .*; expected null; edge_popup keeps the share surgery\.k, and a pen",
        ),
        (["surgery.learner=gem_miner", PENALTY], r"expected null; gem_miner keeps the share surgery\.k"),
        (["surgery=none", PENALTY], r"training\.density_penalty is .*; expected null; with surgery: none there are no"),
        (
            [*SUPERMASK, "training.density_penalty.target=0.3"],
            r"density_penalty\.weight is missing; expected a number ab",
        ),
        (
            [*SUPERMASK, PENALTY, "training.density_penalty.target=1"],
            r"density_penalty\.target is 1; expected a number ",
        ),
        (
            [*SUPERMASK, PENALTY, "training.density_penalty.weight=-1"],
            r"density_penalty\.weight is -1; expected a numb",
        ),
        (
            [*SUPERMASK, PENALTY, "training.density_penalty.k=1"],
            r"density_penalty\.k is not a key of a recipe; nearest",
        ),
        (
            [*SUPERMASK, "training.density_penalty=0.3"],
            r"density_penalty is 0\.3; expected a section with keys such as ",
        ),
    ],
)
def test_what_a_recipe_refuses(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.load("digits", overrides)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("digits", ["surgery.k=2", "training.lr=-1", "data.batch_size=0", PENALTY])
    lines = str(caught.value).split("\n")
    assert lines[0] == "digits has 4 mistakes:"
    assert {line.split(" ")[0] for line in lines[1:]} == {
        "surgery.k", "training.lr", "data.batch_size", "training.density_penalty",
    }  # fmt: skip


def test_a_penalty_makes_another_run_and_no_penalty_the_same_as_before() -> None:
    from popup_surgery.config.keys import fingerprint

    plain, null = (Recipe.load("digits", [*SUPERMASK, *more]) for more in ([], ["training.density_penalty=null"]))
    given = Recipe.load("digits", [*SUPERMASK, PENALTY])
    other = Recipe.load("digits", [*SUPERMASK, PENALTY, "training.density_penalty.target=0.2"])
    assert fingerprint(plain) == fingerprint(null)
    assert len({fingerprint(each) for each in (plain, given, other)}) == 3
    assert Recipe.parse(given.dump()) == given


if __name__ == "__main__":  # one of the processes that a test starts
    first_update(Path(sys.argv[1]), int(sys.argv[2]))
