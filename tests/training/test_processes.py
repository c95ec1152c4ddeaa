"""Several processes train one network: however they are started, and when one of them dies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.utils import is_deepspeed_available

from popup_surgery import Recipe, RunError, evaluate
from popup_surgery.data.batches import quiet
from popup_surgery.experiment.setup import prepare
from popup_surgery.training.distributed import leave, start
from support import PATIENCE, digits_begun, digits_command, launch, run_digits, slow_except


def first_update(file: Path, accumulate: int) -> None:
    """Take one step in this process's part of a run, and write the scores after it."""
    recipe = Recipe.load("digits", ["training.epochs=1", f"training.accumulate={accumulate}"])
    accelerator = start(recipe.training)
    fitted, _ = prepare(recipe, accelerator, quiet)
    fitted._one_step(fitted.data.train(0, fitted.part))
    if accelerator.is_main_process:
        torch.save({n: p.detach() for n, p in fitted.core.named_parameters() if p.requires_grad}, file)
    accelerator.wait_for_everyone()
    leave()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The scores after the first step of one process that takes its batch at once."""
    file = tmp_path_factory.mktemp("whole") / "scores.pt"
    first_update(file, 1)
    scores: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return scores


@pytest.mark.parametrize(("processes", "accumulate"), slow_except([(1, 3), (2, 1), (2, 2)], [(1, 3)]))
def test_the_first_update_is_the_same_however_the_batch_is_divided(
    processes: int, accumulate: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "scores.pt"
    if processes == 1:
        first_update(file, accumulate)
    else:
        launch(processes, __file__, file, accumulate)
    divided = torch.load(file, weights_only=True)
    for name, score in whole.items():
        assert (divided[name] - score).abs().max() <= 1e-6 * score.abs().max(), name


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    done = run_digits(tmp_path / "run", "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/3") == 1  # one of them speaks
    file = tmp_path / "run" / "digits.popup.safetensors"
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    result = evaluate(file)
    assert result.images == 359  # which two processes do not divide
    assert result.accuracy == last["accuracy"] > 0.9


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_it_as_it_is(launcher: str, tmp_path: Path) -> None:
    interpreter, *words = digits_command(tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [interpreter, "-m", *LAUNCHERS[launcher], *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 3/3") == 1
    assert evaluate(tmp_path / "run" / "digits.popup.safetensors").accuracy > 0.9


@pytest.mark.slow
def test_deepspeed_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    done = run_digits(tmp_path / "run")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*DeepSpeed.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("installed", [False, True])
def test_deepspeed_is_refused_whether_or_not_it_is_installed(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        for name, text in {"deepspeed.py": "", "deepspeed-0.18.0.dist-info/METADATA": "Name: deepspeed\n"}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    assert bool(is_deepspeed_available()) == installed
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(
        RunError, match=r"^the run was started with DeepSpeed; expected one process, .* or FSDP2, which"
    ):
        start(Recipe.load("digits").training)


@pytest.mark.slow
@pytest.mark.fault
def test_a_process_that_dies_ends_the_run_and_is_named(tmp_path: Path) -> None:
    process = digits_begun(tmp_path / "run", "--num-processes", "2", "--set", "training.epochs=2000")
    family = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in family if child.environ().get("RANK") == "1")
    victim.kill()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert re.search(r"rank\s*:? *1|local_rank: 1", said), said[-2000:]


if __name__ == "__main__":  # one of the processes that the first test starts
    first_update(Path(sys.argv[1]), int(sys.argv[2]))
