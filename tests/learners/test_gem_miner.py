"""Gem-Miner against algorithm 1 of its paper, written out in plain PyTorch, and in the loop."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import (
    ConversionError,
    Recipe,
    RecipeError,
    bake,
    build,
    convert,
    inspect,
    load,
    masks,
    save,
    start_from,
    train,
)
from popup_surgery.data.batches import quiet
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.learners.gem_miner import FROZEN, left
from popup_surgery.masking.ranking import score_of
from popup_surgery.masking.state import slots_of
from popup_surgery.masking.walk import masked_weights
from popup_surgery.selection import kept_count
from popup_surgery.training.distributed import start
from popup_surgery.training.trainer import Trainer
from popup_surgery.weights import SCHEMES
from support import PATIENCE, check_ensemble, equal_states, slow_except, stopping

GEM = ["surgery.learner=gem_miner", "surgery.learner_options={every: 1}", "surgery.scope=global", "surgery.k=0.2"]
FEW = ["data.max_train=96", "data.max_validation=40", "training.schedule=constant", "training.weight_decay=0"]
SHORT = [
    *GEM,
    "training.epochs=4",
    "training.lr=3",
    "training.weight_decay=0",
    "data.max_train=704",
]  # the rate is for so few steps
WEIGHTS = 23_568  # of the digits recipe


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def digits(**options: Any) -> Any:
    return build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8, **options)


def trainer(*overrides: str) -> Trainer:
    recipe = Recipe.load("digits", [*GEM, *FEW, *overrides])
    return prepare(recipe, start(recipe.training), quiet)[0]


def scores(net: nn.Module) -> list[Tensor]:
    return [score_of(module, name).detach() for _, module, name, _ in masked_weights(net)]


def conv(**settings: Any) -> Any:
    return convert(nn.Conv2d(3, 4, 3, bias=False), **{"learner": "gem_miner", "k": 0.3, **settings})


# the method


def test_it_is_algorithm_1_of_the_paper() -> None:
    """Twelve steps in four epochs, with three rounds: the same probabilities, the same frozen weights."""
    fit = trainer("training.epochs=4", "surgery.learner_options.penalty_weight=0.01", "surgery.learner_options.every=1")
    net = digits()
    for parameter in net.parameters():
        parameter.data.zero_()  # the biases
    plain = bake(convert(digits(), k=1.0, scaled=False)).state_dict()
    names = [key for key, *_ in masked_weights(fit.core)]
    w = [plain[key] for key in names]
    p: Any = [score.clone().requires_grad_() for score in scores(fit.core)]
    q = [torch.ones_like(each) for each in p]
    assert all(0 < each.min() < 0.01 and 0.99 < each.max() < 1 for each in p if each.numel() > 2000)
    buffers, losses = [torch.zeros_like(each) for each in p], []
    for epoch in range(4):
        for images, labels, _ in fit.data.train(epoch):
            rounded = [(each > 0.5).float() + (each - each.detach()) for each in p]
            weights = {name: a * b * c for name, a, b, c in zip(names, w, q, rounded, strict=True)}
            loss = nn.functional.cross_entropy(torch.func.functional_call(net, weights, (images,)), labels)
            losses.append(loss.detach())
            loss = loss + 0.01 * sum((a * b).square().sum() for a, b in zip(p, q, strict=True))
            for each, grad, buffer in zip(p, torch.autograd.grad(loss, p), buffers, strict=True):
                buffer.mul_(0.9).add_(grad)
                each.data.sub_(0.1 * buffer).clamp_(0, 1)
        if epoch < 3:
            flat = torch.cat([torch.where(b > 0, a.detach(), -1).view(-1) for a, b in zip(p, q, strict=True)])
            rest = round(WEIGHTS * (kept_count(WEIGHTS, 0.2) / WEIGHTS) ** ((epoch + 1) / 3))
            least = flat.sort(descending=True).values[rest - 1]
            q = [((a.detach() >= least) & (b > 0)).float() for a, b in zip(p, q, strict=True)]
            assert sum(int(each.sum()) for each in q) == rest, "no ties"
    assert len(losses) == 12
    fit.run(lambda epoch: None)
    ours = scores(fit.core)
    for score, probability, flag in zip(ours, p, q, strict=True):
        assert torch.equal(score == FROZEN, flag == 0)
        torch.testing.assert_close(score[flag > 0], probability.detach()[flag > 0], rtol=0, atol=2e-6)
    assert all(torch.equal(mask, flag > 0) for mask, flag in zip(masks(fit.core).values(), q, strict=True))
    assert fit.history[-1].train_loss == pytest.approx(float(torch.stack(losses[9:]).mean()), rel=1e-4)


def test_the_gradient_goes_straight_through_to_what_is_not_frozen() -> None:
    layer, images = conv(), x(2, 3, 6, 6)
    slots_of(layer)["weight"].ranking.at(0.5)
    layer.weight_score.data[0, 0] = FROZEN
    layer(images).pow(3).sum().backward()
    kept = layer.weight_score > 0.5
    raw = layer._parameters["weight"].detach()
    effective = (raw * kept).requires_grad_()
    nn.functional.conv2d(images, effective).pow(3).sum().backward()
    assert effective.grad is not None
    expected = effective.grad * raw
    expected[0, 0] = 0
    torch.testing.assert_close(layer.weight_score.grad, expected)
    assert (expected != 0).sum() == 108 - 9, "kept and dropped weights alike"


@pytest.mark.parametrize(("every", "epochs"), [(1, 4), (2, 5), (2, 6), (5, 3), (5, 1)])
def test_each_round_freezes_the_same_share_of_the_rest(every: int, epochs: int) -> None:
    fit = trainer(f"training.epochs={epochs}", f"surgery.learner_options.every={every}")
    rest, above = [], []

    def after(epoch: Any) -> None:
        ranked = torch.cat([score.view(-1) for score in scores(fit.core)])
        rest.append(int((ranked != FROZEN).sum()))
        above.append(int((ranked > 0.5).sum()))

    fit.run(after)
    kept = kept_count(WEIGHTS, 0.2)
    every = min(every, epochs - 1)
    rounds = (epochs - 1) // every if every else 0
    expected = [
        WEIGHTS * (kept / WEIGHTS) ** min(e // every / rounds, 1) if every else WEIGHTS for e in range(1, epochs)
    ]
    assert rest[:-1] == [round(number) for number in expected]
    assert rest[-1] == (kept if rounds else WEIGHTS)
    found = masks(fit.core).values()
    assert sum(int(mask.sum()) for mask in found) == kept
    shown = torch.cat([mask.view(-1) for mask in found])
    ranked = torch.cat([score.view(-1) for score in scores(fit.core)])
    assert ranked[shown].min() >= ranked[~shown].max()
    assert [epoch.density for epoch in fit.history] == [number / WEIGHTS for number in [*above[:-1], kept]]


def test_how_many_are_left() -> None:
    assert [left(1000, 100, done, 2) for done in range(4)] == [1000, round(1000 * 0.1**0.5), 100, 100]
    assert left(3, 1, 1, 5) == 2
    assert left(7, 7, 1, 2) == 7
    assert left(7, 1, 0, 0) == 1


@pytest.mark.parametrize("k", [0.4, {"*": 0.4, "classifier.*": 0.9}])
def test_layers_freeze_by_themselves_unless_they_are_ranked_together(k: Any) -> None:
    fit = trainer("training.epochs=3", "surgery.scope=layer", f"surgery.k={json.dumps(k)}")
    fit.run(lambda epoch: None)
    for key, module, name, slot in masked_weights(fit.core):
        share = k if isinstance(k, float) else k["classifier.*" if key.startswith("classifier") else "*"]
        kept = kept_count(score_of(module, name).numel(), share)
        assert int((score_of(module, name) != FROZEN).sum()) == kept == int(slot.mask(module, name).sum())


def test_a_floor_holds_in_every_round() -> None:
    """At a k so small that the last layer would be left with nothing, and without moving the number kept."""
    settings = ["training.epochs=3", "surgery.k=0.01", "training.lr=1"]

    def rest(*more: str) -> list[list[int]]:
        found: list[list[int]] = []
        fit = trainer(*settings, *more)
        fit.run(lambda epoch: found.append([int((score != FROZEN).sum()) for score in scores(fit.core)]))
        assert [int(mask.sum()) for mask in masks(fit.core).values()] == found[-1]
        return found

    plain, floored = rest(), rest("surgery.floor=40")
    assert min(map(min, plain)) < 40
    assert all(min(each) >= 40 for each in floored)
    assert [sum(each) for each in plain] == [sum(each) for each in floored]


OPTIMIZERS = ["sgd", "adamw", "lion", "lamb", "adadelta", "muon"]


@pytest.mark.parametrize("optimizer", slow_except(OPTIMIZERS, ["sgd", "adamw"]))
def test_what_is_frozen_stays_whatever_the_optimizer_does(optimizer: str) -> None:
    """Also with a rate that moves each score by more than 1 in a step, momentum and weight decay."""
    fit = trainer("training.epochs=3", f"training.optimizer={optimizer}", "training.lr=50", "training.weight_decay=0.1")
    frozen: list[Tensor] = []

    def after(epoch: Any) -> None:
        now = torch.cat([score.view(-1) == FROZEN for score in scores(fit.core)])
        assert all((now | ~before).all() for before in frozen)
        assert int((~now).sum()) == left(WEIGHTS, kept_count(WEIGHTS, 0.2), epoch.epoch, 2)
        frozen.append(now)

    fit.run(after)
    flat = torch.cat([score.view(-1) for score in scores(fit.core)])
    assert ((flat == FROZEN) | ((flat >= 0) & (flat <= 1))).all()
    assert len(frozen) == 3


def test_without_the_loop_the_largest_are_kept() -> None:
    """As in a network that was just converted, or is trained by another loop. Ties go to the lower index."""
    layer = conv()
    kept = kept_count(108, 0.3)
    chosen = torch.zeros(108, dtype=torch.bool)
    chosen[layer.weight_score.detach().view(-1).argsort(descending=True, stable=True)[:kept]] = True
    assert torch.equal(masks(layer)["weight"].view(-1), chosen)
    flat = layer.weight_score.data.view(-1)
    for values in (0.0, -0.5, 1.0):
        flat.fill_(values)
        flat[:50] = FROZEN
        assert masks(layer)["weight"].view(-1).nonzero().view(-1).tolist() == list(range(50, 50 + kept))
    flat.fill_(FROZEN)
    assert int(masks(layer)["weight"].sum()) == kept


# in the loop


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train("digits", overrides=SHORT, output=tmp_path_factory.mktemp("gem") / "run")


def test_it_learns_digits_and_writes_exactly_k(through: Any) -> None:
    assert through.accuracy > 0.6
    assert (through.weights, through.kept) == (WEIGHTS, kept_count(WEIGHTS, 0.2))
    assert inspect(through.file).kept == through.kept
    assert equal_states(through.model, load(through.file))
    assert [round(epoch.density, 3) for epoch in through.history][-1] == 0.2


@pytest.mark.parametrize("after", slow_except([10, 22, 30, 87], [30]))
def test_a_run_that_was_stopped_ends_in_the_same_file(after: int, through: Any, tmp_path: Path) -> None:
    """Within an epoch and at the end of one, before the first round, after it, and in the last epoch."""
    with pytest.raises(Stopped):
        train("digits", overrides=SHORT, output=tmp_path / "run", progress=stopping(after))
    result = train("digits", overrides=SHORT, output=tmp_path / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()
    assert [e.density for e in result.history] == [e.density for e in through.history]


def test_what_was_mined_is_finetuned(through: Any, tmp_path: Path) -> None:
    overrides = ["surgery=none", f"model.init_from={through.file}", "training.epochs=2", "training.lr=0.01"]
    tuned = train("digits", overrides=overrides, output=tmp_path / "run")
    assert tuned.accuracy > through.accuracy
    for name, weight in tuned.model.named_parameters():
        assert not weight[through.model.get_parameter(name) == 0].any()


def test_it_starts_from_the_mask_of_a_file(through: Any, tmp_path: Path) -> None:
    """The mask is that of the file by both rules: p > ½, and the largest."""
    net = convert(digits(), 0.2, learner="gem_miner", scaled=False, scope="global")
    start_from(net, through.file)
    for _, module, name, slot in masked_weights(net):
        kept = through.model.get_parameter(slot.stream) != 0
        assert torch.equal(slot.mask(module, name), kept)
        slot.ranking.at(0.0)
        assert torch.equal(slot.mask(module, name), kept)
        slot.ranking.at(1.0)
    save(net, tmp_path / "again")
    assert equal_states(load(tmp_path / "again"), load(through.file))
    overrides = [*GEM, *FEW, "surgery.k=0.1", f"model.init_from={through.file}", "training.epochs=2"]
    result = train("digits", overrides=overrides, output=tmp_path / "run")
    assert result.kept == kept_count(WEIGHTS, 0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    net: Any = conv(scheme=scheme, scaled=True)
    save(net, tmp_path / "net")
    assert equal_states(load(tmp_path / "net", nn.Conv2d(3, 4, 3, bias=False)), bake(net))
    assert inspect(tmp_path / "net").kept == kept_count(108, 0.3)


@pytest.mark.parametrize("backend", slow_except(["eager", "aot_eager", "inductor"], ["eager"]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_a_compiled_network_has_the_same_masks(backend: str) -> None:
    torch._dynamo.reset()
    layer, images = conv(), x(2, 3, 6, 6)
    layer.weight_score.data[1] = FROZEN
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for progress in (0.5, 1.0):
        slots_of(layer)["weight"].ranking.at(progress)
        got, expected = compiled(images), layer(images)
        torch.testing.assert_close(got, expected)
        by_both = [torch.autograd.grad(out.pow(2).sum(), layer.weight_score)[0] for out in (got, expected)]
        torch.testing.assert_close(*by_both)
    torch._dynamo.reset()


def test_an_ensemble_by_vmap_ranks_each_members_scores() -> None:
    members = [convert(nn.Linear(6, 5), 0.3, learner="gem_miner", seed=seed) for seed in (1, 2, 3)]
    check_ensemble(members, x(4, 6))


@pytest.mark.slow
def test_two_processes_freeze_the_same_weights_as_one(tmp_path: Path) -> None:
    overrides = [*GEM, *FEW, "training.epochs=4", "training.threads=1"]
    settings = [word for setting in overrides for word in ("--set", setting)]
    found = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        words = [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(output), *settings]
        done = subprocess.run(
            [*words, "--num-processes", processes], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(load(output / "digits.popup.safetensors"))
    one, two = ({name: weight != 0 for name, weight in net.named_parameters()} for net in found)
    assert sum(int(mask.sum()) for mask in two.values()) == kept_count(WEIGHTS, 0.2)
    differ = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differ <= 4, "sums in another order move a score by its last digits"


# what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, r"gem_miner: every is 0; expected an integer from 1, a number of epochs"),
        ({"every": 2.0}, r"every is 2\.0; expected an integer"),
        ({"every": True}, r"every is True; expected an integer"),
        ({"penalty_weight": -1}, r"penalty_weight is -1; expected a number from 0 to 1000"),
        ({"penalty_weight": float("nan")}, r"penalty_weight is nan; expected a number"),
        ({"rounds": 3}, r"gem_miner has no option 'rounds'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConversionError, match=says) as caught:
        conv(learner_options=options)
    assert "\n" not in str(caught.value)
    values = Recipe.load("digits", GEM).dump()
    values["surgery"]["learner_options"] = options
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(values)


def test_a_schedule_of_k_is_refused_beside_its_own_rounds() -> None:
    with pytest.raises(
        RecipeError, match=r"k_schedule is .*; expected null; gem_miner comes to k by rounds of its own"
    ):
        Recipe.load("digits", [*GEM, "surgery.k_schedule={kind: linear, epochs: 3}"])
