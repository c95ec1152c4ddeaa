"""The hooks of learners that the registered ones leave alone: the loop calls them, with the right numbers."""

import ast
import copy
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import popup_surgery
from popup_surgery import bake, build, convert, inspect, load, masks, save, train, verify
from popup_surgery.config import Recipe
from popup_surgery.data.batches import TRAIN, quiet
from popup_surgery.data.open import open_data
from popup_surgery.deprecated import METHODS
from popup_surgery.errors import Stopped
from popup_surgery.learners import LEARNERS, EdgePopup, Learner, get_learner, register_learner
from popup_surgery.learners.base import TrainedWeight, masked
from popup_surgery.masking.ranking import RankGroup, parameter_of
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import Selection
from popup_surgery.training.distributed import start
from popup_surgery.training.trainer import Trainer
from popup_surgery.weights.fill import fill
from popup_surgery.weights.streams import draw
from support import slow_except, stopping

PACKAGE = Path(popup_surgery.__file__).parent
STEPS = 45  # of an epoch of the digits recipe
DIGITS = [144, 2304, 16384, 4096, 640]  # weights of its layers
HALF = [n - int(0.5 * n) for n in DIGITS]


@dataclass(frozen=True)
class Gradual(EdgePopup):
    """edge-popup that starts with three times as many weights as it ends with, or with all of them."""

    asked: list[tuple[float, int]] = field(default_factory=list)

    def kept_at(self, progress: float, kept: int) -> int:
        self.asked.append((progress, kept))
        return kept + int(2 * (1 - progress) * kept)


class Watching(EdgePopup):
    """edge-popup that writes down what it is told after each step."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def after_step(self, weights: Sequence[TrainedWeight], seed: int, step: int) -> None:
        kept = [int(one.mask().sum()) for one in weights]
        self.told.append((seed, step, [one.name for one in weights], kept, torch.is_grad_enabled()))


class Redrawing(EdgePopup):
    """edge-popup that draws the weights again that take no part, every 30 steps; no seed gives them all back."""

    redraws = True
    learns_weights = True

    def after_step(self, weights: Sequence[TrainedWeight], seed: int, step: int) -> None:
        if step % 30 == 0:
            for one in weights:
                values = draw(one.distribution, one.weight.numel(), one.std, seed + step, "weight", one.name)
                one.weight.copy_(torch.where(one.mask(), one.weight, fill(torch.empty_like(one.weight), values)))


class Levelled(EdgePopup):
    """w_eff = w · h(|s|) · r, where r brings the mean |w_eff| of a layer to 1/2."""

    rescale = True

    def scale(self, weight: Tensor, mask: Tensor) -> float:
        return 0.5 * mask.numel() / float(masked(weight, mask).abs().sum())

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return super().effective(weight, score, mask) * self.scale(weight.detach(), mask)


@pytest.fixture
def registered() -> Iterator[None]:
    """The learners of this file are known under the names of their classes, until the test ends."""
    before = dict(LEARNERS)
    for learner in (Gradual(), Watching(), Redrawing(), Levelled()):
        register_learner(type(learner).__name__, learner)
    yield
    LEARNERS.clear()
    LEARNERS.update(before)


def run(learner: str, output: Path, *more: str, **arguments: Any) -> popup_surgery.Result:
    overrides = [f"surgery.learner={learner}", "training.epochs=2", *more]
    return train("digits", overrides=overrides, output=output, **arguments)


def stopped(learner: str, output: Path, after: int) -> popup_surgery.Result:
    """A run that was stopped after so many steps and resumed."""
    with pytest.raises(Stopped):
        run(learner, output, progress=stopping(after))
    return run(learner, output, resume=True)


def groups(net: nn.Module) -> list[RankGroup]:
    return [slot.ranking for module in net.modules() for slot in slots_of(module).values()]


# every registered learner


@pytest.mark.parametrize("name", LEARNERS)
def test_a_training_ends_with_what_k_asks_for(name: str) -> None:
    """And each answer on the way is a number of weights."""
    learner = LEARNERS[name]
    for kept in (0, 1, 7, 10_000):
        assert learner.kept_at(1.0, kept) == kept
        assert all(type(now := learner.kept_at(i / 8, kept)) is int and now >= 0 for i in range(9))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_scale_is_what_effective_multiplies_by(name: str) -> None:
    learner = LEARNERS[name]
    may = is_dataclass(learner) and "rescale" in {option.name for option in fields(learner)}
    options: list[dict[str, Any]] = [{}, {"rescale": True}] if may else [{}]
    weight, score = torch.linspace(-2, 3, 12), torch.linspace(1, 2, 12)
    mask = torch.arange(12) % 3 == 0
    for learner in (get_learner(name, chosen) for chosen in options):
        scale = learner.scale(weight, mask)
        assert type(scale) is float
        assert scale == (3.0 if learner.rescale else 1.0)
        held = score if learner.learns_weights else learner.values(weight, mask)
        torch.testing.assert_close(learner.effective(weight, score, mask), masked(held, mask) * scale)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_told_after_a_step_changes_what_a_learner_says_it_changes(name: str) -> None:
    net = convert(nn.Linear(6, 5), learner=name)
    slot = slots_of(net)["weight"]
    weight, score = parameter_of(net, "weight"), parameter_of(net, "weight_score")
    before = weight.detach().clone()
    one = TrainedWeight("weight", weight, score, lambda: slot.ranking.mask(0), slot.distribution, slot.std, 0)
    with torch.no_grad():
        LEARNERS[name].after_step([one], 0, 1)
    assert LEARNERS[name].redraws or torch.equal(weight, before)
    assert score.isfinite().all()


# kept_at


def test_the_loop_asks_how_many_are_kept_at_each_step(registered: None, tmp_path: Path) -> None:
    learner = LEARNERS["Gradual"]
    assert isinstance(learner, Gradual)
    result = run("Gradual", tmp_path / "run")
    first = [progress for progress, kept in learner.asked if kept == HALF[0]]
    assert sorted(set(first)) == sorted({0.0, *((step // STEPS + step % STEPS / STEPS) / 2 for step in range(91))})
    assert all(a <= b for a, b in pairwise(first))
    assert {kept for _, kept in learner.asked} == set(HALF)
    manifest = inspect(result.file)
    assert [entry.kept for entry in manifest.masked] == HALF
    assert verify(result.file)


@pytest.mark.parametrize("after", slow_except([20, STEPS], [20]))
def test_a_run_that_was_stopped_keeps_as_many_at_each_step(registered: None, after: int, tmp_path: Path) -> None:
    through = run("Gradual", tmp_path / "through")
    result = stopped("Gradual", tmp_path / "run", after)
    assert result.file.read_bytes() == through.file.read_bytes()
    assert [epoch.changed for epoch in result.history] == [epoch.changed for epoch in through.history]


def trainer(learner: str, steps: bool = True) -> Trainer:
    recipe = Recipe.load("digits", ["training.epochs=2"])
    data = open_data(recipe.data, (1, 8, 8), 0, torch.device("cpu"), quiet)
    if not steps:
        data.counts = {**data.counts, TRAIN: None}
    model = convert(build("conv2", width=0.25, in_chans=1, img_size=8), 0.5, learner=learner)
    return Trainer(model, data, recipe.training, start(recipe.training), quiet)


def test_each_step_reads_the_masks_of_its_own_progress(registered: None) -> None:
    fit = trainer("Gradual")
    seen = []
    fit.core.register_forward_pre_hook(
        lambda net, _: seen.append([int(mask.sum()) for mask in masks(net).values()]) if net.training else None
    )
    fit.run(lambda epoch: None)
    expected = [
        [
            min(n, kept + int(2 * (1 - (step // STEPS + step % STEPS / STEPS) / 2) * kept))
            for n, kept in zip(DIGITS, HALF)
        ]
        for step in range(2 * STEPS)
    ]
    assert seen == expected
    assert seen[0] == DIGITS, "more than there are stands for all"


def test_progress_goes_by_epochs_where_their_steps_are_not_known(registered: None) -> None:
    fit, learner = trainer("Gradual", steps=False), LEARNERS["Gradual"]
    assert isinstance(learner, Gradual)
    fit.run(lambda epoch: None)
    assert {progress for progress, _ in learner.asked} == {0.0, 0.5, 1.0}
    assert all(group.kept_now is None for group in groups(fit.core))


def test_a_group_ranks_again_only_where_the_number_changes(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = convert(nn.Linear(10, 10), 0.4, learner="Gradual")
    (group,) = groups(net)
    calls: list[int] = []
    select = Gradual.select

    def spy(self: Gradual, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        calls.append(kept)
        return select(self, scores, kept, names)

    monkeypatch.setattr(Gradual, "select", spy)
    for progress in (0.0, 0.0, 0.5, 0.5, 1.0, 1.0):
        group.at(progress)
        assert int(masks(net)["weight"].sum()) == min(100, 40 + int(80 * (1 - progress)))
    assert calls == [100, 80, 40]
    plain = convert(nn.Linear(10, 10), 0.4)
    before = copy.copy(groups(plain)[0].__getstate__())
    groups(plain)[0].at(0.3)
    assert groups(plain)[0].__getstate__() | {"kept_now": None} == before | {"kept_now": None}


def test_a_group_that_was_pickled_before_there_were_hooks_is_read(registered: None) -> None:
    group = groups(convert(nn.Linear(10, 10), 0.4))[0]
    old = group.__getstate__()
    old.pop("kept_now", None)
    read = RankGroup.__new__(RankGroup)
    read.__dict__.update(old)
    read = pickle.loads(pickle.dumps(read))
    assert read.mask(0).sum() == 40
    read.at(0.5)
    assert read.mask(0).sum() == 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_follows_the_number(registered: None) -> None:
    torch._dynamo.reset()
    net = convert(nn.Linear(10, 10), 0.3, learner="Gradual")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for progress in (0.0, 0.5, 1.0):
        groups(net)[0].at(progress)
        torch.testing.assert_close(compiled(torch.ones(2, 10)), net(torch.ones(2, 10)))
    torch._dynamo.reset()


# after_step


@pytest.mark.parametrize("after", slow_except([None, 20, STEPS], [20]))
def test_the_loop_tells_of_each_step(registered: None, after: int | None, tmp_path: Path) -> None:
    learner = LEARNERS["Watching"]
    assert isinstance(learner, Watching)
    result = run("Watching", tmp_path / "run") if after is None else stopped("Watching", tmp_path / "run", after)
    names = [entry.stream for entry in inspect(result.file).masked]
    assert learner.told == [(0, step, names, HALF, False) for step in range(1, 2 * STEPS + 1)]


@pytest.mark.slow
def test_watching_changes_nothing(registered: None, tmp_path: Path) -> None:
    watched, plain = run("Watching", tmp_path / "watched"), run("edge_popup", tmp_path / "plain")
    assert all(map(torch.equal, watched.model.state_dict().values(), plain.model.state_dict().values()))


@pytest.mark.parametrize("after", [40])
def test_weights_that_were_redrawn_are_there_after_a_resume(registered: None, after: int, tmp_path: Path) -> None:
    through = run("Redrawing", tmp_path / "through")
    drawn = bake(convert(build("conv2", width=0.25, in_chans=1, img_size=8), 1.0, scaled=False)).state_dict()
    state = through.model.state_dict()
    assert any((state[key] != drawn[key])[state[key] != 0].any() for key in state)
    result = stopped("Redrawing", tmp_path / "run", after)
    assert result.file.read_bytes() == through.file.read_bytes()


def test_a_learner_that_redraws_must_say_that_no_file_holds_its_weights() -> None:
    class Half(EdgePopup):
        redraws = True

    with pytest.raises(ValueError, match=r"'half' redraws weights, .* set learns_weights too"):
        register_learner("half", Half())
    assert "half" not in LEARNERS


# scale


def test_a_scale_that_depends_on_the_weights_is_in_the_file(registered: None, tmp_path: Path) -> None:
    layers = nn.Linear(30, 20), nn.Linear(20, 4)
    net = convert(nn.Sequential(*layers), 0.4, learner="Levelled", scheme="kaiming_normal")
    for layer in layers:
        torch.testing.assert_close(layer.weight.detach().abs().mean(), torch.tensor(0.5))
    save(net, tmp_path / "net")
    read = load(tmp_path / "net", nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4)))
    assert all(map(torch.equal, read.state_dict().values(), bake(net).state_dict().values()))
    torch.testing.assert_close(read.get_parameter("0.weight").detach(), layers[0].weight.detach())


def test_a_factor_of_the_mask_alone_is_a_scale() -> None:
    class Old(EdgePopup):
        rescale = True

        def factor(self, mask: Tensor) -> float:
            return 2.0

    assert Old().scale(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 2.0
    assert LEARNERS["supermask"].scale(torch.ones(3), torch.tensor([True, False, False])) == 1.0


# what is documented


def test_the_imports_that_the_docs_give_for_a_learner() -> None:
    page = (PACKAGE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    block = next(b for b in page.split("```python\n") if b.startswith("from popup_surgery import ConversionError"))
    exec(block.split("```")[0], names)
    assert {"Learner", "Selection", "TrainedWeight", "noise", "masked", "register_learner", "draw"} <= names.keys()
    hooks = [name for name in vars(Learner) if not name.startswith("_") and callable(getattr(Learner, name))]
    old = METHODS.keys()
    assert not [name for name in hooks if name not in old and f"`{name}(" not in page]


# who asks


def test_no_other_room_asks_for_a_learner_by_class_or_by_name() -> None:
    """A learner's own attributes and methods answer."""
    classes = {cls.__name__ for learner in LEARNERS.values() for cls in type(learner).__mro__ if cls is not Learner}
    classes -= {"ABC", "object"}
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())) if path.parent.name != "learners" else ():
            words = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
            named = isinstance(node, ast.Compare | ast.MatchValue) and words & LEARNERS.keys()
            if named or (isinstance(node, ast.Name) and node.id in classes):
                asked.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert not asked
