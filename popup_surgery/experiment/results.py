"""What a run gave, and the files that it ends with."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .. import __version__
from ..artifact import inspect, load, save
from ..atomic import write_atomically
from ..config import Recipe
from ..data.batches import Batches
from ..learners import get_learner
from ..masking.bake import bake
from ..models.build import build, build_meta
from ..models.libraries import architecture_of
from ..plots import draw_curve, draw_masks
from ..training.evaluation import accuracy_of
from ..training.metrics import Epoch
from ..training.run_folder import RunFolder
from ..training.trainer import Trainer
from .setup import start_masks


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        model: the plain network, with its effective weights, in eval mode.
        accuracy: of the last epoch on the validation images, 0 … 1; where the learner samples, of that epoch's sample.
        history: every epoch.
        output: the run's folder.
        file: the artifact in it; or the weights, dense, where they were trained.
        weights, kept: masked weights and how many take part; a dense run keeps all.
    """

    model: nn.Module
    accuracy: float
    history: tuple[Epoch, ...]
    output: Path
    file: Path
    weights: int
    kept: int


def counts(run: RunFolder) -> tuple[int, int]:
    """Masked weights and how many take part in the file of a finished run; of a dense run all."""
    file, recipe = run.path / run.results[-1], run.recipe
    if file.name.endswith(".popup.safetensors"):
        manifest = inspect(file)
        return manifest.weights, manifest.kept
    other = _masks_file(run)
    found = load_file(other) if other is not None else start_masks(recipe)
    return mask_counts(build_meta(architecture_of(recipe.model.name, **recipe.model.kwargs)), found)


def write_dense(model: nn.Module, path: Path) -> int:
    """Write a plain network's `state_dict` as safetensors, tied tensors each in full. Returns the number of tensors."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    write_atomically(path, serialize(tensors, metadata={"format": "pt"}))
    return len(tensors)


def write_results(
    run: RunFolder, recipe: Recipe, model: nn.Module, trainer: Trainer, size: tuple[int, int, int]
) -> None:
    file, history = run.results[-1], trainer.history
    name = file.partition(".")[0]
    draw_curve(run.path / "curve.png", name, [epoch.train_accuracy for epoch in history], [e.accuracy for e in history])
    if "masks.png" in run.results:
        layers = trainer.layers()
        draw_masks(
            run.path / "masks.png",
            name,
            [layer.name.removesuffix(".weight") for layer in layers],
            [layer.density for layer in layers],
            [layer.overlap for layer in layers],
        )
    if file.endswith(".popup.safetensors"):
        accuracy = history[-1].accuracy
        surgery = recipe.surgery
        # where a learner samples, the file holds another network than the last epoch's sample
        if surgery != "none" and get_learner(surgery.learner).samples:
            accuracy, _ = accuracy_of(
                bake(model).to(trainer.accelerator.device), trainer.data.validation(), nullcontext
            )
        save(
            model,
            run.path / file,
            provenance=_provenance(recipe, accuracy, len(history), trainer.data),
            probe=(1, *size),
        )
        return
    if (other := _masks_file(run)) is not None:
        write_atomically(other, serialize({key: mask.cpu() for key, mask in trainer.masks().items()}))
    write_dense(bake(model), run.path / file)


def _masks_file(run: RunFolder) -> Path | None:
    """The file beside dense weights that says which of them take part."""
    return next((run.path / name for name in run.results if name.endswith(".masks.safetensors")), None)


def mask_counts(model: nn.Module, found: Mapping[str, Tensor]) -> tuple[int, int]:
    """Weights that the masks `found` are for, and how many take part; without masks all, twice."""
    if not found:
        return (count := sum(parameter.numel() for parameter in model.parameters())), count
    return sum(mask.numel() for mask in found.values()), sum(int(mask.sum()) for mask in found.values())


def finished_result(run: RunFolder, recipe: Recipe) -> Result:
    """The result of a run that has ended, from its folder."""
    run.check_recipe()
    run.finish()  # a run that was killed after its last file has left its checkpoints
    file = run.path / run.results[-1]
    history = tuple(Epoch(**line) for line in run.history())
    described = recipe.model
    if not file.name.endswith(".popup.safetensors"):
        model = build(described.name, pretrained=file, **described.kwargs)
    else:
        base = described.pretrained
        model = load(file, base=base if isinstance(base, str) and inspect(file).base is not None else None)
    return Result(model.eval(), history[-1].accuracy, history, run.path, file, *counts(run))


def _provenance(recipe: Recipe, accuracy: float, epochs: int, data: Batches) -> dict[str, Any]:
    import numpy
    import timm

    values = recipe.dump()
    values["data"]["root"] = None
    if isinstance(weights := values["model"]["pretrained"], str):
        values["model"]["pretrained"] = Path(weights).name
    if file := values["model"]["init_from"]:
        values["model"]["init_from"] = Path(file).name
    software = {
        "popup_surgery": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
    return {
        "recipe": values,
        "accuracy": accuracy,
        "epochs": epochs,
        "classes": data.classes,
        "software": software,
    }
