"""What a run leaves beside its file: the scores, and the numbers of steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from popup_surgery import RecipeError, Result, build, convert, masks, train
from popup_surgery.artifact import stored_masks
from popup_surgery.errors import Stopped
from popup_surgery.training.metrics import Steps
from support import GOLDEN, Outcome, lines, run_digits, short, slow_except, stopping

CONV2: dict[str, Any] = {"in_chans": 1, "img_size": 8}
FEW = ["training.epochs=2", "data.max_train=64", "data.max_validation=20", "data.batch_size=16"]  # 4 steps an epoch


def few(output: Path, *more: str, **arguments: Any) -> Result:
    return train(GOLDEN / "tiny.yaml", overrides=[*FEW, *more], output=output, **arguments)


# scores


@pytest.mark.parametrize("learner", slow_except(["edge_popup", "supermask", "random", "dnw"], ["edge_popup", "dnw"]))
def test_the_scores_of_a_run_are_kept_where_they_are_asked_for(learner: str, tmp_path: Path) -> None:
    more = [f"surgery.learner={learner}", *(["surgery.k=null"] if learner == "supermask" else [])]
    result = few(tmp_path / "run", "training.keep_scores=true", *more)
    file = tmp_path / "run" / "tiny.scores.safetensors"
    scores = load_file(file)
    net = convert(build("popup_surgery/conv2", width=0.05, **CONV2), **dict(surgery_of(result)))
    assert scores.keys() == {f"{name}_score" for name in masks(net)}
    assert {tensor.dtype for tensor in scores.values()} == {torch.float32}
    left = net.load_state_dict(scores, strict=False)
    assert not left.unexpected_keys
    if learner in ("edge_popup", "random"):
        assert all(torch.equal(mask, masks(net)[name]) for name, mask in stored_masks(result.file).items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def surgery_of(result: Result) -> dict[str, Any]:
    from popup_surgery import Recipe

    return Recipe.load(result.output / "recipe.yaml").surgery.arguments  # type: ignore[union-attr]


def test_kept_scores_change_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = few(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*scores*"))
    with pytest.raises(Stopped):
        few(tmp_path / "kept", progress=stopping(3))
    kept = few(tmp_path / "kept", "training.keep_scores=true", resume=True)
    assert stored(kept) == stored(plain)
    assert few(tmp_path / "kept", resume=True).file == kept.file
    assert not caplog.records
    few(tmp_path / "plain", "training.keep_scores=true", resume=True)
    assert f"the run in {tmp_path / 'plain'} ended without keeping its scores, which are gone" in caplog.text


def stored(result: Result) -> dict[str, bytes]:
    return {name: mask.numpy().tobytes() for name, mask in stored_masks(result.file).items()}


def test_a_dense_run_has_no_scores_to_keep(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training\.keep_scores is true; with surgery: none there are no scores"):
        few(tmp_path / "run", "surgery=none", "training.keep_scores=true")


# steps


def test_steps_are_written_between_epochs(tmp_path: Path) -> None:
    seen: list[Steps] = []
    result = few(tmp_path / "run", "training.log_every=3", "training.schedule_per=step", after_steps=seen.append)
    found = lines(tmp_path / "run")
    assert [("step", line["step"]) if "step" in line else ("epoch", line["epoch"]) for line in found] == [
        ("step", 3), ("epoch", 1), ("step", 6), ("epoch", 2),
    ]  # fmt: skip
    assert [line for line in found if "step" in line] == [steps.line() for steps in seen]
    assert set(found[0]) == {"epoch", "step", "lr", "train_loss"}
    assert [line["epoch"] for line in found] == [1, 1, 2, 2]
    assert found[0]["lr"] > found[2]["lr"] > 0
    assert len(result.history) == 2
    assert few(tmp_path / "run", "training.schedule_per=step", resume=True).history == result.history


def test_the_loss_of_steps_is_the_mean_since_the_line_before(tmp_path: Path) -> None:
    """With a line for each step and batches of one size, their mean is the loss of the epoch."""
    few(tmp_path / "run", "training.log_every=1")
    found = lines(tmp_path / "run")
    for epoch in (1, 2):
        steps = [line["train_loss"] for line in found if line["epoch"] == epoch and "step" in line]
        (whole,) = [line["train_loss"] for line in found if line["epoch"] == epoch and "step" not in line]
        assert len(steps) == 4
        assert sum(steps) / 4 == pytest.approx(whole, rel=1e-9)
    few(tmp_path / "two", "training.log_every=2")
    pairs = [line["train_loss"] for line in lines(tmp_path / "two") if "step" in line]
    assert pairs[0] == pytest.approx((found[0]["train_loss"] + found[1]["train_loss"]) / 2)


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(after: int, tmp_path: Path) -> None:
    few(tmp_path / "through", "training.log_every=2")
    with pytest.raises(Stopped):
        few(tmp_path / "run", "training.log_every=2", progress=stopping(after))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # of a process that was killed after its checkpoint
        file.write(json.dumps({"epoch": 9, "step": after + 1, "lr": 0.0, "train_loss": 0.0}) + '\\n{"epoch": 9, "st')
    few(tmp_path / "run", "training.log_every=2", resume=True)
    timeless = [
        [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in found]
        for found in (lines(tmp_path / "run"), lines(tmp_path / "through"))
    ]
    for ours, theirs in zip(*timeless, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_trackers_get_the_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few(tmp_path / "run", "training.log_every=2", "training.trackers=[tensorboard]")
    found = EventAccumulator(str(tmp_path / "run" / "popup-surgery"))
    found.Reload()
    steps = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert steps["step/train_loss"] == steps["step/lr"] == [2, 4, 6, 8]
    assert steps["accuracy"] == [4, 8]
    assert [event.value for event in found.Scalars("epoch")] == [1, 2]


@pytest.mark.slow
def test_two_processes_write_the_steps_of_both(tmp_path: Path) -> None:
    more = ["--set", "training.log_every=20", "--set", "training.epochs=1"]
    done = run_digits(tmp_path / "run", "--num-processes", "2", *more)
    assert done.returncode == 0, done.stderr
    short(tmp_path / "one", "training.log_every=20", "training.epochs=1")
    ours, theirs = (lines(tmp_path / name) for name in ("run", "one"))
    assert [line.get("step") for line in ours] == [line.get("step") for line in theirs] == [20, 40, None]
    assert done.stdout.count("step 20  loss") == 1


def test_the_command_line_shows_steps(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    sets = [word for setting in [*FEW, "training.log_every=3"] for word in ("--set", setting)]
    done = cli("train", GOLDEN / "tiny.yaml", "-o", tmp_path / "run", *sets)
    assert done.status == 0
    assert done.out.splitlines()[0].startswith("epoch 1/2  step 3  loss ")


# evaluate


def test_evaluate_prints_json(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    file = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"
    done = cli("evaluate", file, "--json")
    values = json.loads(done.out)
    assert (values["images"], values["data"]) == (200, "digits")
    assert 0 < values["accuracy"] < 1
    assert f"{100 * values['accuracy']:.2f} % of 200" in cli("evaluate", file).out
