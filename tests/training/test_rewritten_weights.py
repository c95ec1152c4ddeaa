"""Runs that draw weights again or recycle them: resumed, in several processes, beside other methods, and refused."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from popup_surgery import Recipe, RecipeError, Result, bake, inspect, load, recycle, redraw, train, verify
from popup_surgery.data.batches import quiet
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.training.distributed import start
from support import PATIENCE, equal_states, slow_except, stopping

TWO = ["training.epochs=2", "data.max_train=480", "data.max_validation=200", "surgery.scheme=kaiming_normal"]


class Method(NamedTuple):
    """A way to give weights other values after every 7th step of 30, and the plane that says where they are from."""

    key: str
    share: float
    function: Callable[..., int]
    plane: str

    @property
    def settings(self) -> list[str]:
        return [*TWO, f"surgery.{self.key}={{every: 7, share: {self.share}}}"]


REDRAW, RECYCLE = Method("redraw", 0.3, redraw, "generation"), Method("recycle", 0.2, recycle, "source")


@pytest.fixture(scope="module", params=[REDRAW, RECYCLE], ids=lambda method: method.key)
def method(request: pytest.FixtureRequest) -> Method:
    found: Method = request.param
    return found


@pytest.fixture(scope="module")
def through(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run to the end."""
    return train("digits", overrides=method.settings, output=tmp_path_factory.mktemp("through") / "run")


def test_the_file_gives_the_network_of_the_run(method: Method, through: Result) -> None:
    assert inspect(through.file).requires == [method.plane]
    assert verify(through.file)
    assert equal_states(load(through.file), through.model)
    assert through.accuracy > 0.5


def test_the_loop_does_what_the_function_does(method: Method, through: Result) -> None:
    recipe = Recipe.load("digits", TWO)
    trainer, _ = prepare(recipe, start(recipe.training), quiet)
    step_done = trainer.hooks.step_done

    def and_more(progress: float, epoch: int, step: int) -> None:
        step_done(progress, epoch, step)
        method.function(trainer.core, step, every=7, share=method.share)

    trainer.hooks.step_done = and_more  # type: ignore[method-assign]
    trainer.run(lambda epoch: None)
    assert equal_states(bake(trainer.core), through.model)
    if method is REDRAW:
        drawn = [value for key, value in trainer.core.state_dict().items() if key.endswith("_generation")]
        assert max(int(value.max()) for value in drawn) == 4


@pytest.mark.parametrize("after", slow_except([7, 10, 15, 21, 29], [21]))
def test_a_run_that_was_stopped_ends_in_the_same_file(
    after: int, method: Method, through: Result, tmp_path: Path
) -> None:
    """Before, at and after it is done, and at the end of an epoch."""
    with pytest.raises(Stopped):
        train("digits", overrides=method.settings, output=tmp_path / "run", progress=stopping(after))
    result = train("digits", overrides=method.settings, output=tmp_path / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()


def test_a_run_starts_from_the_file_of_another(method: Method, through: Result, tmp_path: Path) -> None:
    settings = [*method.settings, "training.epochs=1", f"model.init_from={through.file}"]
    result = train("digits", overrides=settings, output=tmp_path / "run")
    assert verify(result.file)
    assert result.file.read_bytes() != through.file.read_bytes()
    if method is REDRAW:
        assert result.accuracy > through.accuracy - 0.2


COMMON: list[list[str]] = [
    ["surgery.learner=signed"], ["surgery.learner_options={coats: [0.3, 0.1]}", "surgery.k=0.3"],
    ["surgery.learner=gem_miner", "surgery.learner_options={every: 1}", "surgery.scaled=false"],
    ["surgery.scope=global", "surgery.floor=0.05"], ["surgery.pattern='2:4'", "surgery.k=null"],
    ["surgery.k_schedule={kind: linear, epochs: 1}"],
    ["surgery.learner=piggyback", "surgery.k=null", "surgery.scaled=false"],
    ["surgery.encoding=range_coded", "surgery.scheme=signed_kaiming_constant"], ["training.precision=bfloat16"],
    ["training.compile=true"], ["training.channels_last=true"], ["training.accumulate=2"],
]  # fmt: skip
BESIDE = [
    *((method, more) for method in (REDRAW, RECYCLE) for more in COMMON),
    (REDRAW, ["surgery.k={rule: erk, k: 0.3}"]), (RECYCLE, ["surgery.fixed={dropped: 0.2, kept: 0.1}"]),
    (RECYCLE, ["surgery.redraw={every: 5, share: 0.3}"]),
]  # fmt: skip
QUICK = [(REDRAW, COMMON[2]), (REDRAW, COMMON[5]), (REDRAW, COMMON[7]), BESIDE[-1]]


@pytest.mark.parametrize(("one", "more"), slow_except(BESIDE, QUICK))
def test_other_methods_beside_it(one: Method, more: list[str], tmp_path: Path) -> None:
    result = train("digits", overrides=[*one.settings, *more], output=tmp_path / "run")
    assert verify(result.file)
    assert equal_states(load(result.file), result.model)
    if "surgery.learner=piggyback" not in more:  # which drops a weight only after many steps
        assert {one.plane, "sign"} & {*inspect(result.file).requires}


@pytest.mark.slow
def test_two_processes_do_the_same(method: Method, tmp_path: Path) -> None:
    settings = [word for setting in [*method.settings, "training.threads=1"] for word in ("--set", setting)]
    output = tmp_path / "run"
    words = [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(output), *settings]
    done = subprocess.run(
        [*words, "--num-processes", "2"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert verify(output / "digits.popup.safetensors")
    assert inspect(output / "digits.popup.safetensors").requires == [method.plane]


# what is refused


@pytest.mark.parametrize("key", ["redraw", "recycle"])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["surgery.{}=often"], "surgery.{} is 'often'; expected a mapping with every and share"),
        (["surgery.{}={{evry: 3}}"], "surgery.{} is .*: 'evry' is not one of its keys; nearest: every"),
        (["surgery.{}={{every: 3}}", "surgery.learner=dnw"], "expected null; dnw trains the weights themselves"),
        (["surgery.{}={{every: 3}}", "surgery.learner=biprop"], "expected null; biprop gives the weights of a layer"),
        (["surgery.{}={{every: 3}}", "surgery.learner=random"], "expected null; random never changes its masks"),
        (
            ["surgery.{}={{every: 3}}", "surgery.learner=supermask", "surgery.k=null", "surgery.scaled=false"],
            "surgery.{} is .*; expected null; supermask samples the weights that take part in each step",
        ),
        (
            ["surgery.{}={{every: 3}}", "surgery.scheme={{'*': kaiming_normal, fc: unsigned_kaiming_constant}}"],
            "surgery.{} is .*; expected null; the scheme unsigned_kaiming_constant gives all weights the same",
        ),
        (
            ["surgery.{}={{every: 3}}", "surgery.scheme=pretrained", "model.pretrained=true", "surgery.k=0.3"],
            "surgery.{} is .*; expected null; the scheme pretrained has no seed that other values could come from",
        ),
    ],
)
def test_recipes_that_are_refused(settings: list[str], says: str, key: str) -> None:
    with pytest.raises(RecipeError, match=says.format(key)) as caught:
        Recipe.load("digits", [setting.format(key) for setting in settings])
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "surgery.redraw={every: 0, share: 2}",
            "every is 0; .*steps between .*; and share is 2; expected a probability",
        ),
        (
            "surgery.recycle={every: 0, share: 0.7}",
            "surgery.recycle is .*: every is 0; expected the steps between two recyclings, .*; and share is 0.7; "
            "expected a share of a layer's weights above 0 and up to 0.5",
        ),
    ],
)
def test_both_bad_values_are_named(setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load("digits", [setting])


@pytest.mark.parametrize("key", ["redraw", "recycle"])
def test_a_run_that_ends_before_it_is_done_is_refused(key: str, tmp_path: Path) -> None:
    settings = [*TWO, f"surgery.{key}={{every: 31}}"]
    with pytest.raises(RecipeError, match=rf"surgery\.{key}\.every is 31; expected at most 30, the steps of the run"):
        train("digits", overrides=settings, output=tmp_path / "run")
    assert not [*tmp_path.rglob("*.safetensors")]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("digits", ["surgery.redraw={every: x}", "surgery.learner=dnw", "training.lr=-1"])
    said = str(caught.value)
    assert re.search(r"every is 'x'.*; and expected null; dnw trains the weights themselves", said)
    assert "training.lr" in said
