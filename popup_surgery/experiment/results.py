"""The result of a run, and the files that it ends with."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .. import __version__
from ..artifact import inspect, load, save
from ..atomic import write_atomically
from ..config import Recipe
from ..hub import is_address
from ..learners import get_learner
from ..masking.bake import bake
from ..masking.ranking import parameter_of, score_name
from ..masking.walk import masked_weights
from ..models.build import build, build_meta
from ..models.libraries import architecture_of
from ..models.pretrained import weights_file
from ..plots import draw_curve, draw_masks
from ..training.evaluation import accuracy_of
from ..training.metrics import Epoch
from ..training.run_folder import Kind, RunFolder
from ..training.trainer import Trainer
from .dense import write_dense
from .setup import start_masks

if TYPE_CHECKING:
    from ..sharing.push import Pushed

log = logging.getLogger("popup_surgery")


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        model: the plain network, with its effective weights, in eval mode.
        accuracy: accuracy of the last epoch on the validation images, 0 … 1. If the learner samples, it is that of the
            epoch's sample.
        history: the metrics of every epoch.
        output: the run's folder.
        file: the artifact in that folder; or the file of dense weights, if weights were trained.
        weights, kept: number of masked weights, and how many of them take part. A dense run keeps all.
        pushed: where on the Hub the artifact is; None if the recipe does not ask for it, or if the push failed.
    """

    model: nn.Module
    accuracy: float
    history: tuple[Epoch, ...]
    output: Path
    file: Path
    weights: int
    kept: int
    pushed: "Pushed | None" = None


def counts(run: RunFolder) -> tuple[int, int]:
    """Return how many weights the file of a finished run masks, and how many take part; for a dense run, all."""
    if run.kind is Kind.ARTIFACT:
        manifest = inspect(run.final)
        return manifest.weights, manifest.kept
    recipe = run.recipe
    masks = load_file(run.masks) if run.masks is not None else start_masks(recipe)
    return mask_counts(build_meta(architecture_of(recipe.model.name, **recipe.model.kwargs)), masks)


def write_results(run: RunFolder, model: nn.Module, trainer: Trainer, size: tuple[int, int, int]) -> None:
    """Write the files that a run ends with. The one that marks its end comes last. `size` is that of the images."""
    _draw(run, trainer)
    if run.recipe.training.keep_scores:
        write_atomically(run.scores, serialize(_scores(model), metadata={"format": "pt"}))
    provenance = _provenance(run.recipe, _file_accuracy(run.recipe, model, trainer), trainer)
    if run.kind is Kind.ARTIFACT:
        encoding = run.recipe.surgery.encoding if run.recipe.surgery != "none" else "bitpack"
        save(model, run.final, provenance=provenance, probe=(1, *size), encoding=encoding)
        return
    if run.masks is not None:
        write_atomically(run.masks, serialize({key: mask.cpu() for key, mask in trainer.masks().items()}))
    write_dense(bake(model), run.final, provenance)


def _scores(model: nn.Module) -> dict[str, Tensor]:
    """Return the scores of a converted network under their `state_dict` keys, float32."""
    return {
        score_name(key): parameter_of(module, score_name(name)).detach().cpu().contiguous()
        for key, module, name, _ in masked_weights(model)
    }


def _draw(run: RunFolder, trainer: Trainer) -> None:
    history, layers = trainer.history, trainer.layers()
    curve, *masks = run.pictures
    draw_curve(curve, run.stem, [epoch.train_accuracy for epoch in history], [epoch.accuracy for epoch in history])
    for path in masks:
        names = [layer.name.removesuffix(".weight") for layer in layers]
        draw_masks(path, run.stem, names, [layer.density for layer in layers], [layer.overlap for layer in layers])


def _file_accuracy(recipe: Recipe, model: nn.Module, trainer: Trainer) -> float:
    """Return the accuracy of the network in the file. If the learner samples, it is not the last epoch's sample."""
    if recipe.surgery == "none" or not get_learner(recipe.surgery.learner).samples:
        return trainer.history[-1].accuracy
    return accuracy_of(bake(model).to(trainer.accelerator.device), trainer.data.validation(), nullcontext)[0]


def mask_counts(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many weights `masks` cover, and how many take part. Without masks, both are the parameter count."""
    if not masks:
        return (count := sum(parameter.numel() for parameter in model.parameters())), count
    return sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())


def finished_result(run: RunFolder) -> Result:
    """Read the result of a finished run from its folder."""
    run.check_recipe()
    if run.recipe.training.keep_scores and not run.scores.exists():
        log.warning("the run in %s ended without keeping its scores, which are gone", run.path)
    run.finish()  # a run that was killed after writing its last file still has its checkpoints
    history, described = tuple(Epoch(**line) for line in run.history()), run.recipe.model
    if run.kind is Kind.ARTIFACT:
        base = weights_file(described.pretrained) if inspect(run.final).base is not None else None
        model = load(run.final, base=base)
    else:
        model = build(described.name, pretrained=run.final, **described.kwargs)
    return Result(model.eval(), history[-1].accuracy, history, run.path, run.final, *counts(run))


def _provenance(recipe: Recipe, accuracy: float, trainer: Trainer) -> dict[str, Any]:
    """Return what the file records of the run. Paths are left out or shortened to file names."""
    import numpy
    import timm

    values = recipe.dump()
    values.pop("plugins", None)  # a file names no code
    values.pop("hub", None)  # where it goes is no part of how it was made
    values["data"]["root"] = None
    if isinstance(weights := values["model"]["pretrained"], str):
        values["model"]["pretrained"] = Path(weights).name
    if (file := values["model"]["init_from"]) and not is_address(file):
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
        "epochs": len(trainer.history),
        "classes": trainer.data.classes,
        "threads": torch.get_num_threads(),
        "software": software,
    }
