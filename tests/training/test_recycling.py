"""Runs that recycle weights: resumed, in several processes, with other methods beside it, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from popup_surgery import Recipe, RecipeError, Result, bake, inspect, load, recycle, train, verify
from popup_surgery.data.batches import quiet
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.training.distributed import start
from support import PATIENCE, equal_states, slow_except, stopping

TWO = ["training.epochs=2", "data.max_train=480", "data.max_validation=200", "surgery.scheme=kaiming_normal"]
SETTINGS = [*TWO, "surgery.recycle={every: 7, share: 0.2}"]


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run to the end: 30 steps, four recyclings."""
    return train("digits", overrides=SETTINGS, output=tmp_path_factory.mktemp("through") / "run")


def test_the_file_gives_the_network_of_the_run(through: Result) -> None:
    assert inspect(through.file).requires == ["source"]
    assert verify(through.file)
    assert equal_states(load(through.file), through.model)
    assert through.accuracy > 0.5


def test_the_loop_does_what_the_function_does(through: Result) -> None:
    recipe = Recipe.load("digits", TWO)
    trainer, _ = prepare(recipe, start(recipe.training), quiet)
    step_done = trainer.hooks.step_done

    def and_recycle(progress: float, epoch: int, step: int) -> None:
        step_done(progress, epoch, step)
        recycle(trainer.core, step, every=7, share=0.2)

    trainer.hooks.step_done = and_recycle  # type: ignore[method-assign]
    trainer.run(lambda epoch: None)
    assert equal_states(bake(trainer.core), through.model)


@pytest.mark.parametrize("after", slow_except([7, 10, 15, 21, 29], [21]))
def test_a_run_that_was_stopped_ends_in_the_same_file(after: int, through: Result, tmp_path: Path) -> None:
    """Before, at and after a recycling, and at the end of an epoch."""
    with pytest.raises(Stopped):
        train("digits", overrides=SETTINGS, output=tmp_path / "run", progress=stopping(after))
    result = train("digits", overrides=SETTINGS, output=tmp_path / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()


def test_a_run_starts_from_a_file_whose_weights_were_copied(through: Result, tmp_path: Path) -> None:
    settings = [*SETTINGS, "training.epochs=1", f"model.init_from={through.file}"]
    result = train("digits", overrides=settings, output=tmp_path / "run")
    assert verify(result.file)
    assert result.file.read_bytes() != through.file.read_bytes()


BESIDE: list[list[str]] = [
    ["surgery.learner=signed"], ["surgery.learner_options={coats: [0.3, 0.1]}", "surgery.k=0.3"],
    ["surgery.learner=gem_miner", "surgery.learner_options={every: 1}", "surgery.scaled=false"],
    ["surgery.scope=global", "surgery.floor=0.05"], ["surgery.pattern='2:4'", "surgery.k=null"],
    ["surgery.fixed={dropped: 0.2, kept: 0.1}"], ["surgery.redraw={every: 5, share: 0.3}"],
    ["surgery.k_schedule={kind: linear, epochs: 1}"],
    ["surgery.learner=piggyback", "surgery.k=null", "surgery.scaled=false"],
    ["surgery.encoding=range_coded", "surgery.scheme=signed_kaiming_constant"], ["training.precision=bfloat16"],
    ["training.compile=true"], ["training.channels_last=true"], ["training.accumulate=2"],
]  # fmt: skip
QUICK = [BESIDE[6]]


@pytest.mark.parametrize("more", slow_except([(more,) for more in BESIDE], [(more,) for more in QUICK]))
def test_other_methods_beside_it(more: list[str], tmp_path: Path) -> None:
    result = train("digits", overrides=[*SETTINGS, *more], output=tmp_path / "run")
    assert verify(result.file)
    assert equal_states(load(result.file), result.model)
    if "surgery.learner=piggyback" not in more:  # which drops a weight only after many steps
        assert {"source", "sign"} & {*inspect(result.file).requires}


@pytest.mark.slow
def test_two_processes_copy_the_same(tmp_path: Path) -> None:
    settings = [word for setting in [*SETTINGS, "training.threads=1"] for word in ("--set", setting)]
    output = tmp_path / "run"
    words = [sys.executable, "-m", "popup_surgery", "train", "digits", "-o", str(output), *settings]
    done = subprocess.run(
        [*words, "--num-processes", "2"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert verify(output / "digits.popup.safetensors")
    assert inspect(output / "digits.popup.safetensors").requires == ["source"]


# what is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["surgery.recycle=often"], "surgery.recycle is 'often'; expected a mapping with every and share"),
        (["surgery.recycle={shore: 0.1}"], "surgery.recycle is .*: 'shore' is not one of its keys; nearest: share"),
        (
            ["surgery.recycle={every: 0, share: 0.7}"],
            "surgery.recycle is .*: every is 0; expected the steps between two recyclings, .*; and share is 0.7; "
            "expected a share of a layer's weights above 0 and up to 0.5",
        ),
        (
            ["surgery.recycle={every: 3}", "surgery.learner=biprop"],
            "surgery.recycle is .*; expected null; biprop gives the weights of a layer one magnitude",
        ),
        (
            ["surgery.recycle={every: 3}", "surgery.learner=random"],
            "surgery.recycle is .*; expected null; random never changes its masks",
        ),
        (
            ["surgery.recycle={every: 3}", "surgery.scheme={'*': kaiming_normal, fc: unsigned_kaiming_constant}"],
            "surgery.recycle is .*; expected null; the scheme unsigned_kaiming_constant gives all weights the same",
        ),
        (
            ["surgery.recycle={every: 3}", "surgery.scheme=pretrained", "model.pretrained=true", "surgery.k=0.3"],
            "surgery.recycle is .*; expected null; the scheme pretrained has no seed that other values could come from",
        ),
    ],
)
def test_recipes_that_are_refused(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.load("digits", settings)
    assert len(str(caught.value).splitlines()) <= 2
