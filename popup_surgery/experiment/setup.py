"""Build what a recipe describes: network, data, trainer and folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..artifact import inspect, load, start_from, stored_masks
from ..config import Recipe
from ..config.schema import Data
from ..data.batches import Batches, Progress
from ..data.open import open_data
from ..errors import DataError, RecipeError
from ..learners import get_learner
from ..masking.convert import convert
from ..models.architecture import input_size
from ..models.build import build
from ..models.libraries import architecture_of
from ..models.pretrained import weights_file
from ..training.lottery_ticket import TicketTrainer
from ..training.run_folder import Kind, RunFolder
from ..training.trainer import Trainer


def open_for(model: nn.Module, data: Data, progress: Progress, train: bool, classes: Sequence[str] = ()) -> Batches:
    """Open the images of `data` for a plain network, on its device. `classes` are the names of its outputs, if known.

    Raises:
        DataError: they do not fit the network, or are of other classes.
    """
    size = image_size(data, model)
    batches = open_data(data, size, 0, next(model.parameters()).device, progress, train=train)
    if classes:
        batches.name_by(list(classes))
    _check_classes(
        model, batches, size, "choose a data set with the file's classes: --set data.name=NAME, --data-dir DIR"
    )
    return batches


def run_folder(path: Path, recipe: Recipe, stem: str) -> RunFolder:
    """Return the folder of a run. Its files are named after `stem`."""
    dense = recipe.surgery == "none" or get_learner(recipe.surgery.learner).learns_weights
    masked = recipe.surgery != "none" or recipe.lottery_ticket is not None
    kind = Kind.ARTIFACT if not dense else Kind.MASKED_WEIGHTS if masked else Kind.WEIGHTS
    return RunFolder(path, recipe, kind, stem)


def prepare(recipe: Recipe, accelerator: Accelerator, progress: Progress) -> tuple[Trainer, tuple[int, int, int]]:
    """Return a trainer with a recipe's network, data and optimiser, ready for the first step; and the images' size."""
    model = _network(recipe)
    size = image_size(recipe.data, model)
    data = open_data(recipe.data, size, recipe.training.seed, accelerator.device, progress)
    _check_classes(model, data, size, f"set model.kwargs.num_classes={len(data.classes)}")
    parts = model, data, recipe.training, accelerator, progress
    if recipe.lottery_ticket is not None:
        return TicketTrainer(*parts, recipe.lottery_ticket), size
    return Trainer(*parts, start_masks(recipe)), size


def with_seed(recipe: Recipe) -> Recipe:
    """Return the recipe with the seed of the file that it starts from."""
    file, surgery = recipe.model.init_from, recipe.surgery
    if file is None or surgery == "none":
        return recipe
    seed = inspect(file).seed
    if "seed" in surgery.model_fields_set and surgery.seed != seed:
        raise RecipeError(f"surgery.seed is {surgery.seed}; expected {seed}, the seed of model.init_from, {file}")
    return recipe.model_copy(update={"surgery": surgery.model_copy(update={"seed": seed})})


def _network(recipe: Recipe) -> nn.Module:
    """Build a recipe's network: converted, or plain for `surgery: none`; filled from `model.init_from` if it is set."""
    model, file = _fresh_network(recipe), recipe.model.init_from
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
        return convert(model, **recipe.surgery.model_dump()) if recipe.surgery != "none" else model
    return convert(architecture_of(described.name, **described.kwargs), **recipe.surgery.model_dump())


def image_size(data: Data, model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of a network's images: the recipe's, or else the network's own."""
    size = data.input_size or input_size(model)
    if size is None:
        raise DataError(
            "the network does not say which images it expects; set data.input_size to [channels, height, width]"
        )
    return tuple(size)  # type: ignore[return-value]


def _check_classes(model: nn.Module, data: Batches, size: tuple[int, int, int], remedy: str) -> None:
    """Raise `DataError` unless the network takes images of `size` and has one output per class; say the `remedy`."""
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *size, device=device))
    except RuntimeError as error:
        shape = " × ".join(map(str, size))
        raise DataError(
            f"the network does not take images of {shape}; set data.input_size to a size that it takes: {error}"
        ) from error
    if data.classes and tuple(output.shape) != (1, len(data.classes)):
        found = output.shape[1] if output.ndim == 2 else f"of {tuple(output.shape[1:])}"
        raise DataError(f"the data set has {len(data.classes)} classes, and the network has {found} outputs; {remedy}")
    if output.ndim == 2:
        data.fit_to(output.shape[1])


def start_masks(recipe: Recipe) -> dict[str, Tensor]:
    """Return the masks that a dense run keeps its weights in if it starts from a file; otherwise none."""
    file = recipe.model.init_from
    return stored_masks(file) if file is not None and recipe.surgery == "none" else {}
