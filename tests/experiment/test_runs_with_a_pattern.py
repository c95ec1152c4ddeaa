"""The recipe key `surgery.pattern`: runs, their resuming, and what does not go with it."""

from pathlib import Path

import pytest

from popup_surgery import Recipe, RecipeError, inspect, load, masks
from popup_surgery.config.keys import fingerprint
from popup_surgery.config.overrides import parse_setting
from support import GOLDEN, equal_states, run_digits, short, stopped_and_resumed

TINY = GOLDEN / "tiny.yaml"
RAMP = "surgery.k_schedule={kind: linear, epochs: 2}"
PATTERN = ["surgery.pattern=2:4", "surgery.k=null"]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_file(tmp_path: Path) -> None:
    overrides = [*PATTERN, "training.epochs=2", "surgery.scaled=true"]
    result = stopped_and_resumed(TINY, overrides, tmp_path)[1]
    assert equal_states(result.model, load(result.file))
    for mask in masks(result.file).values():
        if mask.dim() == 2:
            whole = mask[:, : mask.shape[1] // 4 * 4].reshape(len(mask), -1, 4)
            assert (whole.sum(-1) == 2).all()
    assert inspect(result.file).provenance["recipe"]["surgery"]["pattern"] == "2:4"


@pytest.mark.slow
def test_two_processes_and_a_compiler_train_the_same_kind_of_run(tmp_path: Path) -> None:
    done = run_digits(tmp_path / "two", "--num-processes", "2", *(f"--set={each}" for each in PATTERN))
    assert done.returncode == 0, done.stderr
    compiled = short(tmp_path / "compiled", *PATTERN, "training.compile=true")
    for file in (tmp_path / "two" / "digits.popup.safetensors", compiled.file):
        found = masks(file)["classifier.1.weight"]
        assert (found.view(len(found), -1, 4).sum(-1) == 2).all()


def test_the_pattern_sets_k() -> None:
    made = Recipe.load(TINY, ["surgery.pattern=1:4", "surgery.k=null"])
    assert made.surgery.k == 0.25  # type: ignore[union-attr]
    assert made == Recipe.load(TINY, ["surgery.pattern='1:4'", "surgery.k=0.25"])
    assert Recipe.parse(made.dump()) == made
    assert fingerprint(made) != fingerprint(Recipe.load(TINY, ["surgery.k=0.25"]))
    assert fingerprint(Recipe.load(TINY)) == fingerprint(Recipe.load(TINY, ["surgery.pattern=null"]))


def test_yaml_reads_a_pattern_as_text() -> None:
    assert parse_setting("surgery.pattern=2:4") == ("surgery.pattern", "2:4"), "and not as 124, two minutes and four"
    assert parse_setting("surgery.pattern=[1:2, 2:4]") == ("surgery.pattern", ["1:2", "2:4"])
    assert parse_setting("a=[12, -3, 0x10, 1_000, 2.5, 1e-4, .inf]")[1] == [12, -3, 16, 1000, 2.5, 1e-4, float("inf")]


WITHOUT = "surgery.learner=supermask", "surgery.k=null", "surgery.scaled=false"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["surgery.k=null", "surgery.pattern=3:2"], r"^\S+: surgery\.pattern is '3:2'; [^;]*$"),
        (["surgery.pattern=3:2"], r"surgery\.pattern is '3:2'; expected 'N:M', N of each M neighbours"),
        (["surgery.pattern=0:4"], r"surgery\.pattern is '0:4'; expected 'N:M'"),
        (["surgery.pattern=124"], r"surgery\.pattern is 124; expected 'N:M'"),
        (["surgery.pattern=2:4", "surgery.k=0.3"], r"surgery\.pattern is '2:4': k is 0\.3, and the pattern sets"),
        (["surgery.pattern=2:4", "surgery.k={'*': 0.5}"], r"surgery\.pattern is '2:4': k is {\"\*\": 0\.5}, and"),
        ([*PATTERN, "surgery.scope=global"], r"surgery\.pattern is '2:4': scope is global, and a pattern ranks"),
        ([*PATTERN, RAMP], r"k_schedule is .*; expected null; a pattern"),
        (["surgery.pattern=2:4", *WITHOUT], r"surgery\.pattern is '2:4'; expected null; supermask takes no k, because"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load(TINY, overrides)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(TINY, ["surgery.pattern=2:4", "surgery.k=0.3", "surgery.scope=global", "training.epochs=0", RAMP])
    told = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in told[1:]] == ["surgery.pattern", "surgery.k_schedule", "training.epochs"]
    assert "k is 0.3, and the pattern sets 0.5: leave k out; scope is global, and a pattern ranks" in told[1]
