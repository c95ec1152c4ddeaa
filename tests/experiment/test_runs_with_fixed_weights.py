"""The recipe key `surgery.fixed`: runs, their resuming, and what does not go with it."""

from pathlib import Path

import pytest
import torch

from popup_surgery import Recipe, RecipeError, convert, inspect, load, masks, train
from popup_surgery.config.keys import fingerprint
from popup_surgery.selection import kept_count
from support import GOLDEN, equal_states, run_digits, short, stopped_and_resumed

TINY = GOLDEN / "tiny.yaml"
FIXED = ["surgery.fixed={dropped: 0.5, kept: 0.1}", "surgery.k=0.3"]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_file(tmp_path: Path) -> None:
    ramp = "surgery.k_schedule={kind: linear, start: 0.5, epochs: 1}"
    overrides = [*FIXED, ramp, "training.epochs=2", "surgery.scope=global", "surgery.encoding=range_coded"]
    result = stopped_and_resumed(TINY, overrides, tmp_path)[1]
    assert equal_states(result.model, load(result.file))
    manifest = inspect(result.file)
    assert manifest.requires == ["range_coded", "fixed"]
    assert manifest.kept == kept_count(manifest.weights, 0.3)
    assert manifest.provenance["recipe"]["surgery"]["fixed"] == {"dropped": 0.5, "kept": 0.1}


def test_weights_that_are_free_are_drawn_again(tmp_path: Path) -> None:
    overrides = [*FIXED, "training.epochs=1", "data.max_train=96", "surgery.redraw={every: 2, share: 0.5}"]
    overrides += ["surgery.scheme=kaiming_normal", "surgery.encoding=range_coded"]
    result = train(TINY, overrides=overrides, output=tmp_path / "run")
    assert inspect(result.file).requires == ["range_coded", "fixed", "generation"]
    assert equal_states(result.model, load(result.file))


@pytest.mark.slow
def test_processes_and_a_compiler_train_the_same_kind_of_run(tmp_path: Path) -> None:
    done = run_digits(tmp_path / "two", "--num-processes", "2", *(f"--set={each}" for each in FIXED))
    assert done.returncode == 0, done.stderr
    compiled = short(tmp_path / "compiled", *FIXED, "training.compile=true")
    nothing = convert(load(compiled.file), 0.1, fixed={"dropped": 0.5, "kept": 0.1})  # keeps what is fixed alone
    for file in (tmp_path / "two" / "digits.popup.safetensors", compiled.file):
        for name, mask in masks(file).items():
            assert int(mask.sum()) == kept_count(mask.numel(), 0.3)
            assert torch.equal(mask & masks(nothing)[name], masks(nothing)[name])


def test_it_is_a_key_of_its_own() -> None:
    made = Recipe.load(TINY, FIXED)
    assert Recipe.parse(made.dump()) == made
    assert fingerprint(made) != fingerprint(Recipe.load(TINY, ["surgery.k=0.3"]))
    assert fingerprint(Recipe.load(TINY)) == fingerprint(Recipe.load(TINY, ["surgery.fixed=null"]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["surgery.fixed=0.5"], r"surgery\.fixed is 0\.5; expected a mapping with dropped, kept, or both"),
        (["surgery.fixed={drop: 0.5}"], r"surgery\.fixed is .*: 'drop' is not one of its keys; nearest: dropped"),
        (["surgery.fixed={dropped: 0.6}"], r"surgery\.fixed is .*: k is 0\.5; expected a k above 0 and up to 0\.4"),
        (["surgery.fixed={dropped: 0.1}", "surgery.pattern=2:4"], r"surgery\.fixed is .*: it is beside the pattern"),
        ([*FIXED, "surgery.learner=gem_miner"], r"surgery\.fixed is .*; expected null; the largest scores of the free"),
        ([*FIXED, "surgery.learner=dnw"], r"surgery\.fixed is .*; expected null; .* dnw chooses in"),
        ([*FIXED, "surgery.learner_options={coats: [0.3, 0.1]}"], r"surgery\.fixed is .*; expected null; the largest"),
        (["surgery.fixed={kept: 0.1}", "surgery.learner=supermask", "surgery.k=null"], r"fixed is .*; expected null;"),
        ([*FIXED, "surgery.k_schedule={kind: linear, epochs: 2}"], r"k_schedule is .*: start is 1\.0; expected a"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load(TINY, overrides)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(TINY, ["surgery.fixed={dropped: 2, kept: -1, all: 1}", "training.epochs=0"])
    told = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in told[1:]] == ["surgery.fixed", "training.epochs"]
    assert all(f"{name} is {value}; expected a share" in told[1] for name, value in (("dropped", 2), ("kept", -1)))
