"""A run from recipe to artifact, and an artifact's accuracy: where training and artifacts meet."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .. import __version__
from ..artifact import inspect, load, save, start_from, stored_masks
from ..atomic import write_atomically
from ..config import Recipe
from ..config.schema import Data, override, parse_data
from ..data.open import Batches, Progress, ambient_seed, open_data, open_image, warn_of_skipped
from ..errors import DataError, RecipeError
from ..learners import get_learner
from ..masking.convert import bake, convert
from ..models.build import architecture, build, build_bare, input_size
from ..plots import draw_curve, draw_masks
from ..training.distributed import numerics, start
from ..training.lottery_ticket import TicketFit
from ..training.run_folder import RunFolder, asked_to_stop, flat
from ..training.trackers import add, add_table, tracked
from ..training.trainer import Epoch, Fit, accuracy_of


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


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of an artifact, 0 … 1, over `images` images of the data set `data`."""

    accuracy: float
    images: int
    data: str
    images_per_second: float


def quiet(total: int | None, what: str) -> Any:
    """A `Progress` that shows nothing."""
    return nullcontext(lambda: None)


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress = quiet,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train a mask as a recipe says, and write recipe.yaml, metrics.jsonl, the pictures and the artifact.

    Args:
        recipe: a `Recipe`, the name of a shipped one, a YAML file, or plain values.
        overrides: `key=value` of any recipe key, such as `training.epochs=3`.
        output: a folder that holds no run yet; `runs/<recipe>` if not given.
        data_dir: the data set's folder, in place of the recipe's `data.root`.
        resume: go on with the run in `output` from its newest whole checkpoint; start one where there is none.
        progress, after_epoch: called while it runs, to show something.

    Raises:
        RecipeError, UnknownName: what is wrong with the recipe, all of it.
        DataError: the data set is missing, or is not what the network expects; an image cannot be read; a worker
            process of the loader died.
        RunError: `output` holds a run already, or one of another recipe; another process runs in it; the loss is not
            finite.
        Stopped: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint is kept.
        PopupError: the folder cannot be written.
    """
    name = "run"
    if isinstance(recipe, str | Path):
        name = Path(recipe).stem if Path(recipe).suffix else str(recipe)
        recipe = Recipe.load(recipe, overrides)
    else:
        values = recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else recipe
        recipe = Recipe.parse(override(values, overrides))
    recipe = with_seed(recipe)
    if data_dir is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(data_dir)})})
    folder = Path(output) if output is not None else Path("runs") / name
    run = run_folder(folder, recipe, name.rsplit("/", 1)[-1])
    file = run.results[-1]
    if resume and run.finished:
        return _finished(run, recipe)

    accelerator = start(recipe.training, folder)
    main = accelerator.is_main_process
    with (
        run.held(resume) if main else nullcontext(),
        tracked(accelerator, folder, flat(recipe.dump())) if main else nullcontext(),
        numerics(recipe.training),
        ambient_seed([recipe.training.seed]),
        asked_to_stop() as stop,
    ):
        fit, size = prepare(recipe, accelerator, progress if main else quiet)
        (checkpoint,) = broadcast_object_list([run.begin() if main else None])
        if checkpoint is not None:
            fit.restore(checkpoint)

        def ended(epoch: Epoch) -> None:
            if main:
                run.add(epoch)
                if accelerator.trackers:
                    add(accelerator, epoch, fit.layers())
                after_epoch(epoch)

        history = fit.run(ended, run.keep, stop)
        model = accelerator.unwrap_model(fit.model, keep_fp32_wrapper=False).cpu()
        if main:
            _write_results(run, recipe, model, fit, size)
            weights, kept = _counts(model, fit.masks())
            result = {"accuracy": history[-1].accuracy, "weights": weights, "kept": kept, "file": file}
            add_table(accelerator, result)
            run.finish()
        accelerator.wait_for_everyone()
    found = _counts(model, fit.masks())
    return Result(bake(model).eval(), history[-1].accuracy, tuple(history), folder, folder / file, *found)


def evaluate(
    path: str | Path,
    *,
    data: Data | None = None,
    data_dir: str | Path | None = None,
    base: str | Path | nn.Module | None = None,
    progress: Progress = quiet,
) -> Evaluation:
    """Accuracy of the network in a popup artifact on the validation images of the data set it was trained on.

    Args:
        path: the file.
        data: another data set; without it the one that the file's provenance names.
        data_dir: the data set's folder.
        base: the weights under the mask, as for `load`.

    Raises:
        ArtifactError: the file is damaged, or its architecture is `custom`.
        DataError: the file names no data set, or the data set is missing or is not what the network expects; an
            image cannot be read.
    """
    data = data_of(path, data, data_dir)
    model = load(path, base=base).to("cuda" if torch.cuda.is_available() else "cpu")
    batches = open_for(model, data, progress, train=False)
    began = time.perf_counter()
    accuracy, images = accuracy_of(model, batches.validation(), nullcontext)
    if batches.skipped:
        warn_of_skipped(batches.skipped, batches.left_out)
    return Evaluation(accuracy, images, data.name, images / (time.perf_counter() - began))


def predict(
    path: str | Path, images: Sequence[str | Path], *, base: str | Path | nn.Module | None = None, top: int = 5
) -> list[list[tuple[str, float]]]:
    """The `top` most probable classes of each image, by name where the file has names, with probabilities of 0 … 1.

    Args:
        path: an artifact that `train` wrote, which knows how images are prepared for its network.
        images: files that Pillow reads.
        base: the weights under the mask, as for `load`.

    Raises:
        ArtifactError: as `load`.
        DataError: an image cannot be read, or the file does not say how images are prepared.
    """
    data, model = recorded_data(path), load(path, base=base)
    size = _input_size(data, model)
    batch = torch.stack([open_image(Path(image), data, size) for image in images])
    with torch.inference_mode():
        probabilities = model(batch).float().softmax(1)
    classes = inspect(path).provenance.get("classes") or [str(i) for i in range(probabilities.shape[1])]
    values, indices = probabilities.topk(min(top, len(classes)))
    return [
        [(str(classes[i]), float(value)) for i, value in zip(row, found, strict=True)]
        for row, found in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def data_of(path: str | Path, data: Data | None, data_dir: str | Path | None) -> Data:
    """`data`, or what a file's provenance names, in the folder `data_dir` where it is given."""
    data = recorded_data(path) if data is None else data
    return data if data_dir is None else data.model_copy(update={"root": str(data_dir)})


def open_for(model: nn.Module, data: Data, progress: Progress, train: bool) -> Batches:
    """The images of `data` for a plain network, on its device; `DataError` where they are not for it."""
    size = _input_size(data, model)
    batches = open_data(data, size, 0, next(model.parameters()).device, progress, train=train)
    _check_classes(model, batches, size)
    return batches


def recorded_data(path: str | Path, overrides: Sequence[str] = ()) -> Data:
    """The data section of the recipe in a file's provenance, with `data.key=value` overrides.

    Neither a folder nor leave to download is taken from the file, which a stranger may have written.
    """
    recipe = inspect(path).provenance.get("recipe")
    section = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(section, dict) and not overrides:
        raise DataError(f"{path} does not say what data it was trained on; name it with --set data.name=NAME")
    section = section if isinstance(section, dict) else {}
    name = str(section.get("name"))
    if name.partition("/")[0] in ("hfds", "hfids", "wds") and not any("data.name" in o for o in overrides):
        raise DataError(
            f"{path} names the remote data set {name}; fetch it with --set data.name={name} if you trust it"
        )
    return parse_data(section | {"root": None, "download": False}, overrides, str(path))


def run_folder(path: Path, recipe: Recipe, stem: str) -> RunFolder:
    """The folder of a run, which ends with the file `<stem>.popup.safetensors`, or dense `<stem>.safetensors`."""
    dense = recipe.surgery == "none" or get_learner(recipe.surgery.learner).learns_weights
    masked = recipe.surgery != "none" or recipe.lottery_ticket is not None
    pictures = ("curve.png", "masks.png") if masked else ("curve.png",)
    masks = (f"{stem}.masks.safetensors",) if masked and dense else ()
    return RunFolder(path, recipe, (*pictures, *masks, f"{stem}.safetensors" if dense else f"{stem}.popup.safetensors"))


def counts(run: RunFolder) -> tuple[int, int]:
    """Masked weights and how many take part in the file of a finished run; of a dense run all."""
    file, recipe = run.path / run.results[-1], run.recipe
    if file.name.endswith(".popup.safetensors"):
        manifest = inspect(file)
        return manifest.weights, manifest.kept
    other = _masks_file(run)
    found = load_file(other) if other is not None else _start_masks(recipe)
    return _counts(build_bare(architecture(recipe.model.name, **recipe.model.kwargs)), found)


def prepare(recipe: Recipe, accelerator: Accelerator, progress: Progress) -> tuple[Fit, tuple[int, int, int]]:
    """Network, data and optimiser of a recipe, ready for the first step, and the size of the images."""
    model = _network(recipe)
    size = _input_size(recipe.data, model)
    data = open_data(recipe.data, size, recipe.training.seed, accelerator.device, progress)
    _check_classes(model, data, size)
    parts = model, data, recipe.training, accelerator, progress
    if recipe.lottery_ticket is not None:
        return TicketFit(*parts, recipe.lottery_ticket), size
    return Fit(*parts, _start_masks(recipe)), size


def write_dense(model: nn.Module, path: Path) -> int:
    """Write a plain network's `state_dict` as safetensors, tied tensors each in full. Returns the number of tensors."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    write_atomically(path, serialize(tensors, metadata={"format": "pt"}))
    return len(tensors)


def with_seed(recipe: Recipe) -> Recipe:
    """The recipe, with the seed of the file that it goes on from."""
    file, surgery = recipe.model.init_from, recipe.surgery
    if file is None or surgery == "none":
        return recipe
    seed = inspect(file).seed
    if "seed" in surgery.model_fields_set and surgery.seed != seed:
        raise RecipeError(f"surgery.seed is {surgery.seed}; the subnetwork of model.init_from {file} is of seed {seed}")
    return recipe.model_copy(update={"surgery": surgery.model_copy(update={"seed": seed})})


def _network(recipe: Recipe) -> nn.Module:
    """The network of a recipe: converted, or for `surgery: none` plain; with the mask of the file it goes on from."""
    model, file = _fresh_network(recipe), recipe.model.init_from
    if file is not None:
        base = recipe.model.pretrained if isinstance(recipe.model.pretrained, str) else None
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
    return convert(architecture(described.name, **described.kwargs), **recipe.surgery.model_dump())


def _input_size(data: Data, model: nn.Module) -> tuple[int, int, int]:
    size = data.input_size or input_size(model)
    if size is None:
        raise DataError(
            "the network does not say what images it expects; set data.input_size: [channels, height, width]"
        )
    return tuple(size)  # type: ignore[return-value]


def _check_classes(model: nn.Module, data: Batches, size: tuple[int, int, int]) -> None:
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *size, device=device))
    except RuntimeError as error:
        shape = " × ".join(map(str, size))
        raise DataError(f"the network does not take images of {shape}: {error}") from error
    if data.classes and tuple(output.shape) != (1, len(data.classes)):
        found = output.shape[1] if output.ndim == 2 else f"of {tuple(output.shape[1:])}"
        raise DataError(
            f"the data set has {len(data.classes)} classes; the network has {found} outputs; set "
            f"model.kwargs.num_classes={len(data.classes)}"
        )


def _write_results(run: RunFolder, recipe: Recipe, model: nn.Module, fit: Fit, size: tuple[int, int, int]) -> None:
    file, history = run.results[-1], fit.history
    name = file.partition(".")[0]
    draw_curve(run.path / "curve.png", name, [epoch.train_accuracy for epoch in history], [e.accuracy for e in history])
    if "masks.png" in run.results:
        layers = fit.layers()
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
            accuracy, _ = accuracy_of(bake(model).to(fit.accelerator.device), fit.data.validation(), nullcontext)
        save(model, run.path / file, provenance=_provenance(recipe, accuracy, len(history), fit.data), probe=(1, *size))
        return
    if (other := _masks_file(run)) is not None:
        write_atomically(other, serialize({key: mask.cpu() for key, mask in fit.masks().items()}))
    write_dense(bake(model), run.path / file)


def _masks_file(run: RunFolder) -> Path | None:
    """The file beside dense weights that says which of them take part."""
    return next((run.path / name for name in run.results if name.endswith(".masks.safetensors")), None)


def _start_masks(recipe: Recipe) -> dict[str, Tensor]:
    """The masks that the weights of a dense run stay in, where it goes on from a file."""
    file = recipe.model.init_from
    return stored_masks(file) if file is not None and recipe.surgery == "none" else {}


def _counts(model: nn.Module, found: Mapping[str, Tensor]) -> tuple[int, int]:
    """Weights that the masks `found` are for, and how many take part; without masks all, twice."""
    if not found:
        return (count := sum(parameter.numel() for parameter in model.parameters())), count
    return sum(mask.numel() for mask in found.values()), sum(int(mask.sum()) for mask in found.values())


def _finished(run: RunFolder, recipe: Recipe) -> Result:
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
