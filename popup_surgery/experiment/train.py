"""A run from recipe to file."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..config import Recipe
from ..config.keys import flat
from ..config.overrides import override
from ..data.batches import Progress, quiet
from ..data.folders import recognised
from ..data.seeding import ambient_seed
from ..masking.bake import bake, in_one_piece
from ..signals import asked_to_stop
from ..training.distributed import numerics, resume_threads, start, warn_of_other_threads
from ..training.metrics import Epoch, Steps
from ..training.run_folder import RunFolder
from ..training.trackers import add, add_steps, add_table, tracked
from .pushing import check_hub, push_result
from .results import Result, finished_result, mask_counts, write_results
from .setup import as_begun, prepare, run_folder, with_first_file

log = logging.getLogger("popup_surgery")


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
    after_steps: Callable[[Steps], None] = lambda steps: None,
) -> Result:
    """Train a mask as a recipe says, and write recipe.yaml, metrics.jsonl, the pictures and the artifact.

    Args:
        recipe: a `Recipe`, the name of one that comes with the package, a YAML file, or a mapping of recipe keys.
        overrides: new values of recipe keys, such as `training.epochs=3`.
        output: a folder that has no run in it yet. Default: `runs/<recipe>`.
        data_dir: the data set's folder, in place of the recipe's `data.root`.
        resume: resume the run in `output` from its newest complete checkpoint, or start a run if there is none.
        progress: shows the progress of long tasks: `with progress(total, what) as step`, then `step()` as they advance.
        after_epoch: called after each epoch with its metrics.
        after_steps: called with the loss and the rate of every `training.log_every` steps.

    Returns:
        The trained network, its accuracy and metrics, and the paths of the file and of the run's folder.

    Raises:
        RecipeError, UnknownName: the recipe has mistakes; all of them are listed.
        DataError: the data set is missing or does not fit the network; an image cannot be read; or a worker process of
            the loader died.
        RunError: `output` already has a run in it and `resume` is False, or it has a run of another recipe; another
            process runs in it; or the loss is not finite.
        HubError: the recipe has a section `hub`, and nothing can be pushed there. A push that fails when the run is
            finished is a warning.
        Stopped: SIGTERM, SIGINT or SIGUSR1 arrived. A checkpoint was written.
        PopupError: the folder cannot be written.
    """
    recipe, name = _loaded(recipe, overrides)
    folder = Path(output) if output is not None else Path("runs") / name
    given = recipe.model.init_commit
    recipe = with_first_file(as_begun(recipe, folder) if resume else recipe)
    if given is not None and given != recipe.model.init_commit:
        began = f"{recipe.model.init_commit} of {recipe.model.init_from}"
        log.warning("the run in %s began with the commit %s and resumes with it, not with %s", folder, began, given)
    if data_dir is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(data_dir)})})
    recipe = recipe.model_copy(update={"data": recognised(recipe.data)})
    run = run_folder(folder, recipe, name.rsplit("/", 1)[-1])
    if resume and run.finished:
        result = finished_result(run)
        return replace(result, pushed=push_result(run) if os.environ.get("RANK", "0") == "0" else None)
    return _train_in(run, resume, progress, after_epoch, after_steps)


def _loaded(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[Recipe, str]:
    """Return the recipe with its overrides, and its name."""
    if isinstance(recipe, str | Path):
        name = Path(recipe).stem if Path(recipe).suffix else str(recipe)
        return Recipe.load(recipe, overrides), name
    values = recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else recipe
    return Recipe.parse(override(values, overrides)), "run"


def _train_in(
    run: RunFolder,
    resume: bool,
    progress: Progress,
    after_epoch: Callable[[Epoch], None],
    after_steps: Callable[[Steps], None],
) -> Result:
    """Train in a run's folder. Each of the run's processes calls this; the first one writes the files."""
    recipe = run.recipe
    accelerator = start(recipe.training, run.path)
    main = accelerator.is_main_process
    if main:
        check_hub(recipe.hub)
    with (
        asked_to_stop() as stop,
        run.claimed(resume) if main else nullcontext(),
        tracked(accelerator, run.path, flat(recipe.dump())) if main else nullcontext(),
        numerics(recipe.training) as threads,
        ambient_seed([recipe.training.seed]),
    ):
        trainer, size = prepare(recipe, accelerator, progress if main else quiet)
        (checkpoint,) = broadcast_object_list([run.begin() if main else None])
        if checkpoint is None:
            warn_of_other_threads(recipe.training, accelerator)
        else:
            trainer.restore(checkpoint)
            resume_threads(checkpoint.state.get("threads"), threads, recipe.training, accelerator)

        def record(epoch: Epoch) -> None:
            run.add(epoch)
            if accelerator.trackers:
                # trackers take no place before the last one
                add(accelerator, epoch, trainer.layers(), trainer.step if recipe.training.log_every else None)
            after_epoch(epoch)

        def record_steps(steps: Steps) -> None:
            run.add(steps)
            if accelerator.trackers:
                add_steps(accelerator, steps)
            after_steps(steps)

        calls = (record, record_steps) if main else (_nothing, _nothing)
        history = trainer.run(calls[0], run.write_checkpoint, stop, calls[1])
        trained = accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        model = trainer.core = in_one_piece(trained).cpu()  # from here on, each process is by itself
        weights, kept = mask_counts(model, trainer.masks())
        accuracy = history[-1].accuracy
        if main:
            write_results(run, model, trainer, size)
            add_table(accelerator, {"accuracy": accuracy, "weights": weights, "kept": kept, "file": run.final.name})
            run.finish()
        accelerator.wait_for_everyone()
    pushed = push_result(run) if main else None
    return Result(bake(model).eval(), accuracy, tuple(history), run.path, run.final, weights, kept, pushed)


def _nothing(numbers: Epoch | Steps) -> None:
    pass
