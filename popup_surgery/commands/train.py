import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import RunError, Stopped
from ..signals import asked_to_stop
from .shared import STOPPED, busy, printable, progress, refuse_file, show, size

if TYPE_CHECKING:
    from ..config.sections import Hub
    from ..experiment.results import Result
    from ..training.metrics import Epoch, Steps


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (popup-surgery recipes lists them), or a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of any recipe key; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder for the run; default: runs/<recipe>.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set, in place of data.root.")] = None,
    resume: Annotated[bool, typer.Option(help="Resume the run in the folder, or start one.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
) -> int:
    """Learn a mask as a recipe describes; write recipe.yaml, metrics.jsonl, the pictures and the artifact.

    \b
    $ popup-surgery train digits --set training.epochs=2
    epoch 1/2  loss 1.580  training 47.71 %  accuracy 72.42 %  mask changed 9.82 %  3,608 images/s  0:00:00 left
    epoch 2/2  loss 0.492  training 86.09 %  accuracy 93.31 %  mask changed 3.57 %  5,003 images/s  0:00:00 left
    accuracy      93.31 % of the validation images
    kept          11,784 of 23,568 weights (50.0 %)
    file          runs/digits/digits.popup.safetensors, 7,026 bytes
    time          3.0 s
    speed         4,305 images/s in training
    """
    refuse_file(recipe, "recipe")
    if num_processes > 1 and "WORLD_SIZE" not in os.environ:
        return launch(num_processes, sys.argv[1:])
    began = time.perf_counter()
    with busy("starting"):
        from ..config import Recipe
        from ..experiment.train import train
        from ..malloc import keep_freed_memory
        from ..training.distributed import join_slurm, leave

        keep_freed_memory()
        join_slurm()
        first = os.environ.get("RANK", "0") == "0"
        loaded = Recipe.load(recipe, set_ or [])
    lines = _EpochLines(loaded.epochs)
    result = train(
        recipe, overrides=set_ or (), output=output, data_dir=data_dir, resume=resume, progress=progress,
        after_epoch=lines.show, after_steps=lines.show_steps,
    )  # fmt: skip
    leave()
    if first:
        before = resume and not lines.ends
        _show_result(result, None if before else time.perf_counter() - began)
        if loaded.hub is not None and result.pushed is None:
            return _not_pushed(result.file, loaded.hub)
    return 0


def _not_pushed(file: Path, hub: "Hub") -> int:
    """Say how to push by hand. Return the status; a launcher is told it, since it takes another one for a crash."""
    from ..experiment.pushing import by_hand

    print(printable(f"error: the file was not pushed; to do so: {by_hand(file, hub)}"), file=sys.stderr)
    if STOPPED not in os.environ:
        return 1
    Path(os.environ[STOPPED]).write_text("1")
    return 0


class _EpochLines:
    """Shows a line at the end of each of `epochs` epochs, and of the steps that the recipe logs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.ends: list[float] = []  # when each ended

    def show(self, epoch: "Epoch") -> None:
        """Print the line of an epoch, with an estimate of the time left."""
        self.ends.append(time.perf_counter())
        # includes validation from the second epoch on
        each = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if self.ends[1:] else epoch.seconds
        left = each * (self.epochs - epoch.epoch)
        k = "" if epoch.k is None else f"k {epoch.k:.4g}  "
        show(
            f"epoch {epoch.epoch}/{self.epochs}  loss {epoch.train_loss:.3f}  training {epoch.train_accuracy:.2%}  "
            f"accuracy {epoch.accuracy:.2%}  {k}mask changed {epoch.changed:.2%}  "
            f"{epoch.images_per_second:,.0f} images/s  {timedelta(seconds=round(left))} left".replace("%", " %")
            + (f"  {epoch.skipped:,} skipped" if epoch.skipped else "")
        )

    def show_steps(self, steps: "Steps") -> None:
        show(
            f"epoch {steps.epoch}/{self.epochs}  step {steps.step:,}  loss {steps.train_loss:.3f}  rate {steps.lr:.3g}"
        )


def _show_result(result: "Result", seconds: float | None) -> None:
    """Show the table of a finished run. `seconds` is the time it took, or None if it was finished before."""
    if seconds is None:
        show(f"the run in {result.output} had already finished")
    speed = sum(e.images_per_second * e.seconds for e in result.history) / sum(e.seconds for e in result.history)
    table = Table.grid(padding=(0, 6, 0, 0))
    table.add_row("accuracy", f"{100 * result.accuracy:.2f} % of the validation images")
    table.add_row("kept", f"{result.kept:,} of {result.weights:,} weights ({100 * result.kept / result.weights:.1f} %)")
    table.add_row("file", f"{result.file}, {size(result.file)}")
    if seconds is not None:
        table.add_row("time", f"{seconds:.1f} s")
    table.add_row("speed", f"{speed:,.0f} images/s in training")
    if result.pushed is not None:
        table.add_row("pushed", result.pushed.url)
    show(table)


def launch(processes: int, arguments: list[str]) -> int:
    """Run the same command line in several processes, by Accelerate's launcher. Returns their common exit status."""
    import psutil
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise RunError(f"--num-processes is {processes}; expected at most {gpus}, the number of this machine's GPUs")
    environment = os.environ | ({} if gpus else {"ACCELERATE_USE_CPU": "true"})
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        environment[STOPPED] = stopped = str(Path(folder) / "stopped")
        # in its own session, else the launcher would end its processes at once; they end by themselves and checkpoint
        child = subprocess.Popen([*command, "-m", "popup_surgery", *arguments], env=environment, start_new_session=True)

        def pass_on(number: int) -> None:
            with suppress(psutil.Error):  # they may have ended
                launcher = psutil.Process(child.pid)
                for process in launcher.children() or [launcher]:
                    process.send_signal(number)

        with asked_to_stop(pass_on):
            status = child.wait()
        told = Path(stopped).read_text() if status == 0 and Path(stopped).exists() else None
        return status if told is None else int(told or Stopped.status)
