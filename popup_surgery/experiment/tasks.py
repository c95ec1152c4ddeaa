"""Many tasks on one network: the accuracy of each on its own data, with and without being told the task."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..bank import MaskBank
from ..config.schema import Data
from ..data.batches import Batches, Progress, quiet
from ..errors import ArtifactError, ConversionError, PopupError
from ..training.evaluation import accuracy_of
from ..weights.source import source_of
from .evaluate import class_names, data_of
from .setup import open_for


@dataclass(frozen=True)
class TaskResult:
    """One task of a bank, on the validation images of its own data.

    Attributes:
        task: its name.
        kept: share of the masked weights that it keeps, 0 … 1; None if the file cannot be read.
        accuracy: with its mask, 0 … 1; None if it was not measured.
        inferred: accuracy where each batch is given to the task that `MaskBank.infer` finds; None if not measured.
        found: share of the images in batches whose task was found.
        images: number of images.
        data: name of the data set.
        problem: why the task is not in the bank, or was not measured; empty if it was.
    """

    task: str
    kept: float | None = None
    accuracy: float | None = None
    inferred: float | None = None
    found: float | None = None
    images: int = 0
    data: str = ""
    problem: str = ""


@dataclass(frozen=True)
class TaskTable:
    """The result of `evaluate_tasks`; as text a table.

    Attributes:
        tasks: in the order of the files.
        how: the way in which tasks were inferred, as in `Inference`; empty if they were not.
        fits: whether every file is for the one base.
    """

    tasks: tuple[TaskResult, ...]
    how: str = ""
    fits: bool = True

    def mean(self, what: str) -> float | None:
        """Return the mean of an attribute over the tasks that have it; None if none has."""
        found = [getattr(each, what) for each in self.tasks if getattr(each, what) is not None]
        return sum(found) / len(found) if found else None

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        means = {what: self.mean(what) for what in ("kept", "accuracy", "inferred", "found")}
        return {"tasks": [asdict(each) for each in self.tasks], "mean": means, "how": self.how, "fits": self.fits}

    def __str__(self) -> str:
        shares = ("kept", "accuracy", "inferred", "found")
        if all(each.accuracy is None for each in self.tasks):
            return "\n".join(f"{each.task}: {each.problem}" for each in self.tasks)
        rows = [["task", "kept", "accuracy", "not told", "task found", "images", "data"]]
        for each in self.tasks:
            numbers = [_percent(getattr(each, what)) for what in shares]
            rows.append([each.task, *numbers, f"{each.images:,}" if each.images else "–", each.data or "–"])
        if len(self.tasks) > 1:
            rows.append(["mean", *(_percent(self.mean(what)) for what in shares), "", ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        text += [f"{each.task}: {each.problem}" for each in self.tasks if each.problem]
        return "\n".join(text)


def evaluate_tasks(
    files: Mapping[str, str | Path | Artifact],
    *,
    base: nn.Module | str | Path | None = None,
    data: Mapping[str, Data] = MappingProxyType({}),
    data_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    how: str | None = None,
    strict: bool = True,
    progress: Progress = quiet,
) -> TaskTable:
    """Put files into one bank, and measure each on the validation images of its own data set.

    Each is measured twice: under its own mask, and with each batch given to the task that `MaskBank.infer` finds for
    it. An answer that is not told the task is right if it names the right class, by name if the files name their
    classes, and otherwise by number.

    Args:
        files: popup artifacts by the names of their tasks. The first gives the network and the base; for masks on
            pretrained weights, the first of those with most weights of the base, as heads of new sizes are not of it.
        base: for masks on pretrained weights: the network or the file that has these weights. Default: the library's.
        data: the data sets of tasks, in place of those that their files name.
        data_dir: folder of all data sets. Default: where each is by itself.
        overrides: `data.key=value` settings for the data that files name.
        how: as for `infer`.
        strict: raise an error for a file that cannot be used. Otherwise the table says why.
        progress: as for `evaluate`.

    Raises:
        ArtifactError: a file is damaged, or for another base than the first.
        DataError: a file names no data set, or the data set is missing or does not fit.
    """
    problems: dict[str, str] = {}
    opened: dict[str, Artifact] = {}
    bank: MaskBank | None = None
    for name, file in files.items():
        try:
            opened[name] = Artifact.open(file)
        except ArtifactError as error:
            if strict:
                raise
            problems[name] = str(error)
    for name in sorted(opened, key=lambda name: _of_base(opened[name]), reverse=True):
        try:
            if bank is None:
                bank = MaskBank(base) if isinstance(base, nn.Module) else MaskBank(opened[name], weights=base)
                bank.network.to("cuda" if torch.cuda.is_available() else "cpu")
            bank.add(name, opened[name])
        except (ArtifactError, ConversionError) as error:
            if strict:
                raise
            problems[name] = str(error)
    fits = not problems
    results = {}
    hows: set[str] = set()
    for name in files:
        kept = opened[name].manifest.kept / max(opened[name].manifest.weights, 1) if name in opened else None
        results[name] = TaskResult(name, kept, problem=problems.get(name, ""))
        if bank is not None and name in bank:
            try:
                results[name] = _measure(
                    bank,
                    name,
                    opened,
                    kept,
                    data_of(opened[name], data.get(name), data_dir, overrides),
                    how,
                    hows,
                    progress,
                )
            except PopupError as error:
                if strict:
                    raise
                results[name] = TaskResult(name, kept, problem=f"not evaluated: {error}")
    return TaskTable(tuple(results.values()), ", ".join(sorted(hows)), fits)


def _of_base(artifact: Artifact) -> int:
    """Return how many masked weights are those of a base."""
    return sum(entry.numel for entry in artifact.manifest.masked if source_of(entry.distribution).in_base)


def _measure(
    bank: MaskBank,
    name: str,
    files: Mapping[str, Artifact],
    kept: float | None,
    data: Data,
    how: str | None,
    hows: set[str],
    progress: Progress,
) -> TaskResult:
    """Return the row of one task, and add the way in which its task was inferred to `hows`."""
    with bank.using(name) as network:
        batches = open_for(network, data, progress, train=False, classes=class_names(files[name]))
        accuracy, images = accuracy_of(network, batches.validation(), nullcontext)
    if len(bank) == 1:
        return TaskResult(name, kept, accuracy, images=images, data=data.title)
    right, found, seen = _untold(bank, name, batches, {other: class_names(files[other]) for other in bank}, how, hows)
    return TaskResult(name, kept, accuracy, right / seen, found / seen, images, data.title)


def _untold(
    bank: MaskBank, name: str, batches: Batches, classes: Mapping[str, Sequence[str]], how: str | None, hows: set[str]
) -> tuple[int, int, int]:
    """Return how many images are classified correctly, how many are in batches whose task is found, and how many."""
    right = found = seen = 0
    for images, labels in batches.validation():
        result = bank.infer(images, how=how)
        outputs = bank.predict(images, result.task)
        assert isinstance(outputs, Tensor)
        answers = outputs.argmax(1)
        if result.task != name and classes[name] and classes[result.task]:
            answers = _renamed(answers, classes[result.task], classes[name])
        right += int((answers == labels).sum())
        found += len(labels) * (result.task == name)
        seen += len(labels)
        hows.add(result.how)
    return right, found, seen


def _renamed(answers: Tensor, theirs: Sequence[str], mine: Sequence[str]) -> Tensor:
    """Return answers as places in `mine`; −1 where the class is none of them."""
    places = {name: place for place, name in enumerate(mine)}
    return torch.tensor([places.get(name, -1) for name in theirs], device=answers.device)[answers]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
