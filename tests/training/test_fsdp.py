"""Runs in shards: processes that were started with FSDP2 train as one, and what does not work is one sentence."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from popup_surgery import PopupError, Recipe, train
from popup_surgery.data.batches import quiet
from popup_surgery.errors import Stopped
from popup_surgery.experiment.setup import prepare
from popup_surgery.selection.shards import is_shard, whole
from popup_surgery.training.distributed import leave, start
from support import launch, stopped_and_resumed, stopping

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "1000",
}
FEW = ["training.epochs=2", "data.batch_size=720"]

REFUSED: list[tuple[dict[str, str], list[str], str]] = [
    ({"FSDP_VERSION": "1"}, [], "started with version 1 of FSDP; expected version 2: accelerate launch --use_fsdp"),
    ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, [], "FSDP wraps no layer, .* --fsdp_auto_wrap_policy SIZE_BASED_WRAP"),
    ({"FSDP_MIN_NUM_PARAMS": "100000000"}, [], "FSDP wraps no layer, so that each process would gather the whole net"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "FSDP, which does not work with 'the offload of parameters to the CPU'$"),
    (
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        ["training.compile=true", "training.channels_last=true"],
        "with 'activation checkpointing', 'training.compile', 'training.channels_last'$",
    ),
    (
        {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"},
        [],
        "FSDP does not take this network: Could not find the transformer layer class Block in the model",
    ),
    ({}, ["surgery.learner=gem_miner"], "does not work with 'the learner gem_miner': between steps, no process has"),
    ({}, ["surgery=none"], "does not work with 'a network without masks'"),
    ({}, ["surgery.redraw={every: 2, share: 0.1}"], "does not work with 'surgery.redraw'"),
]


def first_update(file: Path) -> None:
    """Take one step in this process's part of a run, and write the whole scores after it."""
    recipe = Recipe.load("digits", ["training.epochs=1", "training.accumulate=2", "training.clip_norm=0.5"])
    accelerator = start(recipe.training)
    fitted, _ = prepare(recipe, accelerator, quiet)
    assert all(is_shard(score) for score in fitted.update.parameters) == (accelerator.num_processes > 1)
    fitted._one_step(fitted.data.train(0, fitted.part))
    scores = {name: whole(p) for name, p in fitted.core.named_parameters() if p.requires_grad}
    if accelerator.is_main_process:
        torch.save(scores, file)
    accelerator.wait_for_everyone()
    leave()


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started from here are those of FSDP2."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_first_update_is_that_of_one_process(
    processes: int, fsdp: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(processes, __file__, "first_update", tmp_path / "shards.pt")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    first_update(tmp_path / "alone.pt")
    shards, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("shards.pt", "alone.pt"))
    for name, score in alone.items():
        assert (shards[name] - score).abs().max() <= 1e-6 * score.abs().max(), name


def whole_run(folder: Path) -> None:
    """Runs in shards: one that is stopped and resumed, and one that stays stopped."""
    _, result = stopped_and_resumed("digits", FEW, folder)
    assert result.file.exists()
    with pytest.raises(Stopped):
        train("digits", overrides=FEW, output=folder / "stopped", progress=stopping(2))
    leave()


@pytest.mark.slow
def test_a_run_in_shards_resumes_there_and_in_one_process(
    fsdp: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(2, __file__, "whole_run", tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    result = train("digits", overrides=FEW, output=tmp_path / "stopped", resume=True)
    assert "written by 2 processes and resumes with 1" in caplog.text
    alone = train("digits", overrides=FEW, output=tmp_path / "alone")
    assert [len(each.history) for each in (result, alone)] == [2, 2]
    assert (result.weights, result.kept) == (alone.weights, alone.kept)


def refusals(file: Path) -> None:
    """Write what is said about each case of `REFUSED`."""
    said = []
    for environment, overrides, _ in REFUSED:
        os.environ.update(
            FSDP | {"FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"} | environment
        )
        recipe = Recipe.load("digits", [*FEW, *overrides])
        try:
            prepare(recipe, start(recipe.training), quiet)
        except PopupError as error:
            said.append(str(error))
        else:
            said.append("")
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(said))
    leave()


@pytest.mark.slow
def test_what_does_not_work_is_one_sentence(fsdp: None, tmp_path: Path) -> None:
    launch(2, __file__, "refusals", tmp_path / "said.json")
    for said, (_, _, expected) in zip(json.loads((tmp_path / "said.json").read_text()), REFUSED, strict=True):
        assert re.search(expected, said), said
        assert "\n" not in said


if __name__ == "__main__":  # one of the processes
    work: dict[str, Callable[[Path], None]] = {
        "first_update": first_update, "refusals": refusals, "whole_run": whole_run,
    }  # fmt: skip
    work[sys.argv[1]](Path(sys.argv[2]))
