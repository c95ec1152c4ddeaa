"""Runs whose k follows a schedule: what each epoch keeps, and that nothing else decides it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from popup_surgery import Recipe, RecipeError, inspect, masks, train, verify
from popup_surgery.data.batches import quiet
from popup_surgery.errors import ConversionError, Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.masking.k_schedule import KSchedule
from popup_surgery.selection import kept_count
from popup_surgery.training.distributed import start
from support import digits_command, lines, slow_except, stopping

CUBIC: dict[str, Any] = {"kind": "cubic", "start": 1.0, "begin": 1, "epochs": 2}
SETTINGS = ["training.epochs=4", "surgery.k=0.2", f"surgery.k_schedule={json.dumps(CUBIC)}"]
DIGITS = [144, 2304, 16384, 4096, 640]  # weights of its layers


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a ramp."""
    return train("digits", overrides=SETTINGS, output=tmp_path_factory.mktemp("through") / "run")


def test_each_epoch_keeps_its_share_and_the_file_the_last_one(through: Any) -> None:
    schedule = KSchedule.of(CUBIC)
    shares = [schedule.at(epoch, 0.2) for epoch in range(4)]
    assert shares == [1.0, 1.0, pytest.approx(0.3), 0.2]
    expected = [sum(kept_count(n, share) for n in DIGITS) / sum(DIGITS) for share in shares]
    assert [epoch.k for epoch in through.history] == expected
    assert [line["k"] for line in lines(through.output)] == expected
    assert [entry.kept for entry in inspect(through.file).masked] == [kept_count(n, 0.2) for n in DIGITS]
    assert {entry.note["k"] for entry in inspect(through.file).masked} == {0.2}
    assert verify(through.file)
    assert (through.output / "masks.png").exists()


def test_the_masks_are_compared_with_those_that_k_alone_gives() -> None:
    recipe = Recipe.load("digits", SETTINGS)
    trainer, _ = prepare(recipe, start(recipe.training), quiet)
    assert all(mask.all() for mask in trainer.masks().values())
    assert [layer.overlap for layer in trainer.layers()] == [kept_count(n, 0.2) / n for n in DIGITS]


def test_every_step_of_an_epoch_keeps_its_share() -> None:
    recipe = Recipe.load("digits", [*SETTINGS, "data.max_train=96", "data.max_validation=32"])
    trainer, _ = prepare(recipe, start(recipe.training), quiet)
    seen: list[int] = []
    trainer.core.register_forward_pre_hook(
        lambda net, _: seen.append(sum(int(mask.sum()) for mask in masks(net).values())) if net.training else None
    )
    trainer.run(lambda epoch: None)
    schedule = KSchedule.of(CUBIC)
    assert seen == [sum(kept_count(n, schedule.at(epoch, 0.2)) for n in DIGITS) for epoch in range(4) for _ in range(3)]


def test_the_weights_of_scaled_layers_are_those_of_the_final_k(through: Any, tmp_path: Path) -> None:
    plain = train("digits", overrides=["training.epochs=1", "surgery.k=0.2"], output=tmp_path / "plain")
    stds = [[entry.std for entry in inspect(result.file).masked] for result in (through, plain)]
    assert stds[0] == stds[1]
    assert "k" not in lines(plain.output)[0]


@pytest.mark.parametrize("after", slow_except([45, 70, 100], [100]))
def test_a_run_that_was_stopped_ends_in_the_same_file(through: Any, after: int, tmp_path: Path) -> None:
    """At the end of an epoch, within the ramp, and in the middle of its last epoch."""
    with pytest.raises(Stopped):
        train("digits", overrides=SETTINGS, output=tmp_path / "run", progress=stopping(after))
    result = train("digits", overrides=SETTINGS, output=tmp_path / "run", resume=True)
    assert result.file.read_bytes() == through.file.read_bytes()
    assert [(epoch.k, epoch.changed) for epoch in result.history] == [
        (epoch.k, epoch.changed) for epoch in through.history
    ]


@pytest.mark.slow
def test_a_global_ranking_with_a_floor_follows_the_schedule(tmp_path: Path) -> None:
    settings = [*SETTINGS, "surgery.k=0.02", "surgery.scope=global", "surgery.floor=5"]
    result = train("digits", overrides=settings, output=tmp_path / "run")
    kept = [entry.kept for entry in inspect(result.file).masked]
    assert sum(map(int, kept)) == kept_count(sum(DIGITS), 0.02)  # type: ignore[arg-type]
    assert min(map(int, kept)) >= 5  # type: ignore[arg-type]
    schedule = KSchedule.of(CUBIC)
    assert [epoch.k for epoch in result.history] == [
        kept_count(sum(DIGITS), schedule.at(epoch, 0.02)) / sum(DIGITS) for epoch in range(4)
    ]


def test_a_rule_and_steps(tmp_path: Path) -> None:
    steps = {"kind": "steps", "start": 0.5, "epochs": 2, "every": 1}
    settings = ["training.epochs=3", "surgery.k={rule: erk, k: 0.1}", f"surgery.k_schedule={json.dumps(steps)}"]
    result = train("digits", overrides=settings, output=tmp_path / "run")
    entries = inspect(result.file).masked
    assert sum(int(entry.kept or 0) for entry in entries) == kept_count(sum(DIGITS), 0.1)
    assert result.history[0].k == pytest.approx(0.5, abs=1e-3)
    first, second, third = (epoch.k or 0 for epoch in result.history)
    assert first > second > third == kept_count(sum(DIGITS), 0.1) / sum(DIGITS)


@pytest.mark.slow
def test_two_processes_and_a_compiled_network_keep_the_same(tmp_path: Path) -> None:
    import subprocess

    from support import PATIENCE

    found = {}
    for name, more in {
        "one": [], "two": ["--num-processes", "2"], "compiled": ["--set", "training.compile=true"],
    }.items():  # fmt: skip
        sets = [
            word for setting in [*SETTINGS, "surgery.scope=global", "surgery.floor=0.05"] for word in ("--set", setting)
        ]
        words = digits_command(tmp_path / name, *sets, *more)
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("  k 1  ") == 2, done.stdout
        manifest = inspect(tmp_path / name / "digits.popup.safetensors")
        found[name] = [line["k"] for line in lines(tmp_path / name)], manifest.kept
        assert all((entry.kept or 0) >= kept_count(entry.numel, 0.05) for entry in manifest.masked)
    assert found["one"] == found["two"] == found["compiled"]


# what a recipe may not say


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["surgery.k_schedule={kind: cubics}"],
            "surgery.k_schedule is .*: kind is 'cubics'; expected constant, linear",
        ),
        (["surgery.k_schedule={kind: linear, epochs: 3, start: 1.5}"], "start is 1.5; expected a share above 0"),
        (["surgery.k_schedule=cubic"], "surgery.k_schedule is 'cubic'; expected a mapping with kind"),
        (
            ["surgery.k_schedule={kind: cubic, begin: 30, epochs: 10}"],
            "reaches k in epoch 40, counted from 0; expected at most 39",
        ),
        (
            ["surgery.k_schedule={kind: cubic, epochs: 3}", "surgery.learner=supermask", "surgery.k=null"],
            "surgery.k_schedule is .*; expected null; supermask takes no k",
        ),
        (["surgery.floor=0.1"], "surgery.floor is 0.1; expected none unless scope is global"),
        (["surgery.floor=0.6", "surgery.scope=global"], "surgery.floor is 0.6; expected at most k, 0.5"),
        (
            ["surgery.floor=4", "surgery.learner=supermask", "surgery.k=null", "surgery.scaled=false"],
            "surgery.floor is 4; expected null; supermask takes no k",
        ),
        (["surgery.k={rule: erks, k: 2}"], "surgery.k is .*: rule is 'erks'; .*; and k is 2; expected a number"),
        (
            ["surgery.k={rule: erk, k: 0.1}", "surgery.scope=global"],
            r"surgery.scope is 'global'; expected layer, because k is .*; all layers",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.load("digits", settings)


def test_all_mistakes_are_told_at_once() -> None:
    settings = ["surgery.k={rule: ek, k: 1}", "surgery.floor=x", "surgery.k_schedule={kind: up}", "training.lr=-1"]
    with pytest.raises(RecipeError) as caught:
        Recipe.load("digits", settings)
    first, *sentences = str(caught.value).split("\n")
    assert first == "digits has 4 mistakes:"
    assert [re.split(" is ", sentence)[0] for sentence in sentences] == [
        "surgery.k", "surgery.floor", "surgery.k_schedule", "training.lr",
    ]  # fmt: skip


def test_a_start_that_is_too_low_is_refused_before_the_first_step(tmp_path: Path) -> None:
    settings = ["surgery.scope=global", "surgery.floor=100", "surgery.k=0.1"]
    settings.append("surgery.k_schedule={kind: linear, start: 0.01, epochs: 2}")
    with pytest.raises(
        ConversionError, match=r"k_schedule starts too low: k=0.01 keeps 236 .* at least 500, which the"
    ):
        train("digits", overrides=settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "recipe.yaml").exists()


def test_equal_schedules_are_one_whatever_their_words() -> None:
    from popup_surgery.config.keys import fingerprint

    base = Recipe.load("digits")
    short, whole = (
        Recipe.load("digits", [f"surgery.k_schedule={text}"])
        for text in ("{kind: cubic, epochs: 3}", "{kind: cubic, start: 1, begin: 0, epochs: 3, every: null}")
    )
    assert fingerprint(short) == fingerprint(whole) != fingerprint(base)
