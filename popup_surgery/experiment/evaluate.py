"""Run a file's network on images: measure its accuracy, and predict the classes of single images."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..artifact.reader import naming
from ..config.schema import Data, parse_data
from ..data.batches import Progress, quiet
from ..data.folders import recognised
from ..data.open import held, open_image
from ..data.reading import warn_of_skipped
from ..errors import DataError, RecipeError
from ..training.evaluation import accuracy_of
from ..training.outputs import logits_of
from .opened import Opened, open_result
from .setup import image_size, open_for


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of an artifact, 0 … 1, over `images` images of the data set `data`."""

    accuracy: float
    images: int
    data: str
    images_per_second: float


def evaluate(
    path: str | Path | Opened,
    *,
    data: Data | None = None,
    data_dir: str | Path | None = None,
    base: str | Path | nn.Module | None = None,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure the accuracy of the network in a file on the validation images of its data set.

    If the file and the data set both name their classes, labels are compared by name: the data set may have a part of
    the file's classes, in any order.

    Args:
        path: a popup artifact, as a file or an open `Artifact`; or dense weights or an ONNX file that a run or an
            export wrote. An ONNX file runs in ONNX Runtime, on the CPU.
        data: another data set. Default: the one that the network was trained on, which the file's provenance names.
        data_dir: the data set's folder.
        base: for a mask on pretrained weights: these weights, as for `load`.
        progress: shows the progress of long tasks: `with progress(total, what) as step`, then `step()` as they advance.

    Returns:
        The accuracy, 0 … 1, the number of images, the data set's name, and images per second.

    Raises:
        ArtifactError: the file is damaged, or its architecture is `custom`, which no library builds; or ONNX Runtime
            cannot run it.
        DataError: the file names no data set; the data set is missing or does not fit the network; or an image
            cannot be read.
    """
    artifact = open_result(path)
    data = data_of(artifact, data, data_dir)
    model = artifact.network(base=base).float().to("cuda" if torch.cuda.is_available() else "cpu")
    batches = open_for(model, data, progress, train=False, classes=class_names(artifact))
    began = time.perf_counter()
    with naming(artifact.path):
        accuracy, images = accuracy_of(model, batches.validation(), nullcontext)
    if batches.skipped:
        warn_of_skipped(batches.skipped, batches.left_out)
    return Evaluation(accuracy, images, data.title, images / (time.perf_counter() - began))


def predict(
    path: str | Path | Opened,
    images: Sequence[str | Path],
    *,
    base: str | Path | nn.Module | None = None,
    top: int = 5,
) -> list[list[tuple[str, float]]]:
    """Return the `top` most probable classes of each image, with probabilities in 0 … 1.

    Classes have names if the file has them.

    Args:
        path: an artifact that `train` wrote, as a file or an open `Artifact`, or an export of it. It records how images
            are prepared for its network.
        images: files that Pillow reads.
        base: the weights under the mask, as for `load`.

    Raises:
        ArtifactError: as for `load`.
        DataError: an image cannot be read, the file does not say how images are prepared, or the network does not
            classify them.
    """
    artifact = open_result(path)
    data, model = recorded_data(artifact), artifact.network(base=base).float()
    size = image_size(data, model)
    if not images:
        return []
    batch = torch.stack([open_image(Path(image), data, size) for image in images])
    logits = logits_of(model, batch).float()
    if not bool(logits.isfinite().all()):
        odd = images[int((~logits.isfinite()).any(1).nonzero()[0])]
        raise DataError(f"the outputs of {artifact.path} for {odd} are not finite")
    probabilities = logits.softmax(1)
    classes = class_names(artifact)
    if len(classes) != probabilities.shape[1]:
        classes = [str(i) for i in range(probabilities.shape[1])]
    values, indices = probabilities.topk(min(top, len(classes)))
    return [
        [(classes[i], float(value)) for i, value in zip(row, found, strict=True)]
        for row, found in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def data_of(
    path: str | Path | Opened, data: Data | None, data_dir: str | Path | None, overrides: Sequence[str] = ()
) -> Data:
    """Return `data`, or the data section in a file's provenance with overrides; with the folder `data_dir` if given."""
    data = recorded_data(path, overrides) if data is None else data
    return recognised(data if data_dir is None else data.model_copy(update={"root": str(data_dir)}))


def class_names(artifact: Opened) -> list[str]:
    """Return the names of a network's outputs, which its file's provenance has; empty if it has none."""
    names = artifact.manifest.provenance.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if len(set(names)) == len(names) else []


def recorded_data(path: str | Path | Opened, overrides: Sequence[str] = ()) -> Data:
    """Return the data section of the recipe in a file's provenance, with `data.key=value` overrides.

    The file may come from a stranger. Its folder and its permission to download are therefore ignored. If it was
    written before `data.same_size` was a key, that is what its run did.
    """
    artifact = open_result(path)
    path, recipe = artifact.path, artifact.manifest.provenance.get("recipe")
    section = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(section, dict) and not overrides:
        raise DataError(f"{path} does not say which data set it was trained on; pass --set data.name=NAME")
    section = section if isinstance(section, dict) else {}
    name = str(section.get("name"))
    if name.partition("/")[0] in ("hfds", "hfids", "wds") and not any("data.name" in o for o in overrides):
        raise DataError(f"{path} names the remote data set {name}; if you trust it, pass --set data.name={name}")
    section |= {"root": None, "download": False}
    if section.get("name") and "same_size" not in section:
        try:
            before = held(parse_data(section, (), str(path)))
        except RecipeError:  # overrides may mend it
            before = None
        section["same_size"] = None if before is None else "keep" if before else "crop"
    return parse_data(section, overrides, str(path))
