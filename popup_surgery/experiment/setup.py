"""Build what a recipe describes: network, data, trainer and folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from ..artifact import Artifact, load, start_from, stored_masks
from ..config import Recipe
from ..config.schema import Data
from ..config.yaml import read_yaml
from ..data.batches import TRAIN, Batches, Progress
from ..data.open import open_data
from ..errors import DataError, RecipeError
from ..hub import Address, is_address
from ..learners import get_learner
from ..masking.convert import convert
from ..masking.k_schedule import KSchedule, check_schedule
from ..masking.recycle import Recycle
from ..masking.redraw import Redraw
from ..masking.rewrites import Rewrite
from ..models.architecture import input_size
from ..models.build import build
from ..models.libraries import architecture_of
from ..models.pretrained import weights_file
from ..training.lottery_ticket import TicketTrainer
from ..training.optimizers import try_optimizer
from ..training.outputs import answers, fewest_images
from ..training.run_folder import Kind, RunFolder
from ..training.trainer import Trainer


def open_for(model: nn.Module, data: Data, progress: Progress, train: bool, classes: Sequence[str] = ()) -> Batches:
    """Open the images of `data` for a plain network, on its device. `classes` are the names of its outputs, if known.

    Raises:
        DataError: they do not fit the network, or are of other classes.
    """
    size = image_size(data, model)
    answered = answers(model, size)
    batches = open_data(data, size, 0, next(model.parameters()).device, progress, train=train)
    if classes:
        batches.name_by(list(classes))
    _check_classes(answered, batches, "choose a data set with the file's classes: --set data.name=NAME, --data-dir DIR")
    return batches


def run_folder(path: Path, recipe: Recipe, stem: str) -> RunFolder:
    """Return the folder of a run. Its files are named after `stem`."""
    dense = recipe.surgery == "none" or get_learner(recipe.surgery.learner).learns_weights
    masked = recipe.surgery != "none" or recipe.lottery_ticket is not None
    kind = Kind.ARTIFACT if not dense else Kind.MASKED_WEIGHTS if masked else Kind.WEIGHTS
    return RunFolder(path, as_begun(recipe, path), kind, stem)


def prepare(recipe: Recipe, accelerator: Accelerator, progress: Progress) -> tuple[Trainer, tuple[int, int, int]]:
    """Return a trainer with a recipe's network, data and optimiser, ready for the first step; and the images' size."""
    model, schedule = _network(recipe), k_schedule(recipe)
    check_schedule(model, schedule)
    try_optimizer(
        [parameter for parameter in model.parameters() if parameter.requires_grad], recipe.training, accelerator
    )
    size = image_size(recipe.data, model)
    answered = answers(model, size)
    least = fewest_images(model, size, answered)
    data = open_data(recipe.data, size, recipe.training.seed, accelerator.device, progress)
    _check_classes(answered, data, f"set model.kwargs.num_classes={len(data.classes)}")
    if not (recipe.training.sync_batchnorm and accelerator.num_processes > 1):  # which counts all processes' images
        data.least = least
        _check_batches(data, recipe.data)
    rewriting = rewrites(recipe)
    _check_rewrites(rewriting, data.steps(), recipe.training.epochs)
    parts = model, data, recipe.training, accelerator, progress
    if recipe.lottery_ticket is not None:
        return TicketTrainer(*parts, recipe.lottery_ticket), size
    return Trainer(*parts, start_masks(recipe), schedule, rewriting), size


def k_schedule(recipe: Recipe) -> KSchedule | None:
    """Return the schedule of k that a recipe has; None if k is the same in all epochs."""
    given = None if recipe.surgery == "none" else recipe.surgery.k_schedule
    return None if given is None else KSchedule.of(given)


def rewrites(recipe: Recipe) -> list[Rewrite]:
    """Return when a recipe gives weights other values. They are drawn again before they are copied."""
    if recipe.surgery == "none":
        return []
    both: tuple[type[Rewrite], ...] = Redraw, Recycle
    return [kind.of(given) for kind in both if (given := getattr(recipe.surgery, kind.key)) is not None]


def first_file(recipe: Recipe) -> str | None:
    """Return the file that a recipe starts from, an address on the Hub with the commit if that is known."""
    file, commit = recipe.model.init_from, recipe.model.init_commit
    if commit is None:
        return file
    if not is_address(file):
        raise RecipeError(f"model.init_commit is {commit}, and model.init_from is {file}; expected an address hf://…")
    return str(replace(Address.parse(str(file)), revision=commit))


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the commit of `model.init_from` that the run in `folder` began with, if there is one."""
    if not is_address(recipe.model.init_from) or not (folder / "recipe.yaml").is_file():
        return recipe
    recorded = read_yaml(folder / "recipe.yaml").get("model")
    if not isinstance(recorded, dict) or recorded.get("init_from") != recipe.model.init_from:
        return recipe
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"init_commit": recorded.get("init_commit")})}
    )


def with_first_file(recipe: Recipe) -> Recipe:
    """Return the recipe with the seed of the file that it starts from, and with its commit if it is on the Hub."""
    file, surgery = first_file(recipe), recipe.surgery
    if file is None or (surgery == "none" and not is_address(file)):
        return recipe
    opened = Artifact.open(file)
    if opened.remote is not None:
        commit = opened.remote.address.revision
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_commit": commit})})
    if surgery == "none":
        return recipe
    seed = opened.manifest.seed
    if "seed" in surgery.model_fields_set and surgery.seed != seed:
        raise RecipeError(f"surgery.seed is {surgery.seed}; expected {seed}, the seed of model.init_from, {file}")
    return recipe.model_copy(update={"surgery": surgery.model_copy(update={"seed": seed})})


def _network(recipe: Recipe) -> nn.Module:
    """Build a recipe's network: converted, or plain for `surgery: none`; filled from `model.init_from` if it is set."""
    model, file = _fresh_network(recipe), first_file(recipe)
    if file is not None:
        base = weights_file(recipe.model.pretrained)
        if recipe.surgery == "none":
            load(file, model, base=base)
        else:
            start_from(model, file, base=base)
    return model


def _fresh_network(recipe: Recipe) -> nn.Module:
    described = recipe.model
    if recipe.surgery == "none" or described.pretrained:
        model = build(described.name, pretrained=described.pretrained, **described.kwargs)
        return convert(model, **recipe.surgery.arguments) if recipe.surgery != "none" else model
    return convert(architecture_of(described.name, **described.kwargs), **recipe.surgery.arguments)


def image_size(data: Data, model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of a network's images: the recipe's, or else the network's own."""
    size = data.input_size or input_size(model)
    if size is None:
        raise DataError(
            "the network does not say which images it expects; set data.input_size to [channels, height, width]"
        )
    return tuple(size)  # type: ignore[return-value]


def _check_classes(answered: int, data: Batches, remedy: str) -> None:
    """Raise `DataError` unless the network has one output per class; say the `remedy`."""
    if data.classes and answered != len(data.classes):
        raise DataError(
            f"the data set has {len(data.classes)} classes, and the network has {answered} outputs; {remedy}"
        )
    data.fit_to(answered)


def _check_batches(data: Batches, config: Data) -> None:
    """Raise `DataError` if there are no batches of as many images as the network needs at a time."""
    images = data.counts[TRAIN]
    few = f"data.batch_size is {config.batch_size}" if config.batch_size < data.least else ""
    if images is not None and images < data.least:
        few = f"the data set has {images} training image"
    if few:
        raise DataError(
            f"{few}; the network has batch norms over maps of 1 × 1, which train on {data.least} images at a time or "
            "more"
        )


def _check_rewrites(rewriting: Sequence[Rewrite], steps: int | None, epochs: int) -> None:
    """Raise `RecipeError` if a run of `steps` steps an epoch, if that is known, ends before weights are rewritten."""
    for rewrite in rewriting:
        if steps is not None and rewrite.every > steps * epochs:
            raise RecipeError(
                f"surgery.{rewrite.key}.every is {rewrite.every:,}; expected at most {steps * epochs:,}, the steps of "
                f"the run, so that there are {rewrite.called}"
            )


def start_masks(recipe: Recipe) -> dict[str, Tensor]:
    """Return the masks that a dense run keeps its weights in if it starts from a file; otherwise none."""
    file = first_file(recipe)
    return stored_masks(file) if file is not None and recipe.surgery == "none" else {}
