"""What the weights, the mask and the statistics of a subnetwork contribute, measured by replacing them."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import Artifact, Manifest
from ..artifact.planes import Bits
from ..config.schema import Data
from ..data.batches import Batches, Progress, quiet
from ..errors import ConversionError
from ..experiment.evaluate import class_names, data_of
from ..experiment.setup import open_for
from ..plots import Group
from ..torch_compat import BatchNorm
from ..training.evaluation import accuracy_of
from ..weights.fill import fill, pieces_of
from ..weights.source import source_of

VALUES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # as in "Weight Agnostic Neural Networks", NeurIPS 2019
BATCHES = 100  # of training images, for new statistics

AS_IT_IS, SEEDS, SHUFFLED, INVERTED, SHARED = "as it is", "other seeds", "mask shuffled", "mask inverted", "all weights"


@dataclass(frozen=True)
class Variation:
    """One variant of a subnetwork, and its accuracy.

    Attributes:
        change: what differs from the file: `as it is` (nothing), `other seeds`, `mask shuffled`, `mask inverted`, or
            `all weights`, which then share one value.
        value: the shared value, or the seed of the weights or of the shuffle; None if there is neither.
        accuracy: accuracy on the validation images, 0 … 1.
        recalibrated: the accuracy with BatchNorm's running statistics recomputed from training images; None if the
            network has no such statistics.
    """

    change: str
    value: float | None
    accuracy: float
    recalibrated: float | None


@dataclass(frozen=True)
class Sanity:
    """The result of `sanity` on `images` images of the data set `data`. `chance` is 1 / classes, or 0 if unknown."""

    variations: tuple[Variation, ...]
    images: int
    data: str
    chance: float

    def groups(self) -> list[Group]:
        """Group the accuracies by change, and those of `all weights` by shared value too."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for one in self.variations:
            name = f"{one.change} {one.value:g}".replace("-", "−") if one.change == SHARED else one.change
            accuracies, recalibrated = found.setdefault(name, ([], []))
            accuracies.append(one.accuracy)
            recalibrated += [] if one.recalibrated is None else [one.recalibrated]
        return [Group(name, *both) for name, both in found.items()]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: its head, and a row for each group."""
        groups = self.groups()
        lines: list[tuple[str, ...]] = [("network", "accuracy", "with new statistics")]
        for group in groups:
            several = f" ({len(group.accuracies)})" if len(group.accuracies) > 1 else ""
            lines.append((group.name + several, _percent(group.accuracies), _percent(group.recalibrated)))
        return lines if groups[0].recalibrated else [line[:2] for line in lines]

    def notes(self) -> list[str]:
        """Return what stands below the table."""
        chance = f"; chance is {100 * self.chance:.2f} %" if self.chance else ""
        notes = [f"{self.images:,} validation images of {self.data}{chance}"]
        if all(one.change != SEEDS for one in self.variations):
            notes.insert(0, f"{SEEDS}: not measured, because the weights are pretrained and no seed draws them")
        return notes

    def __str__(self) -> str:
        """Return the table, with a line for each group."""
        lines = self.rows()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, *self.notes()])


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    spread = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.2f}{spread} %"


def sanity(
    path: str | Path | Artifact,
    *,
    data: Data | None = None,
    data_dir: str | Path | None = None,
    base: str | Path | nn.Module | None = None,
    repeats: int = 5,
    values: Sequence[float] = VALUES,
    progress: Progress = quiet,
) -> Sanity:
    """Measure the accuracy of the subnetwork in a popup artifact, and of variants in which one part is replaced.

    The variants are: weights drawn from other seeds under the same mask, unless all are pretrained; the mask shuffled
    within each layer; the mask inverted; and one shared value for all weights. Learnt signs belong to the mask: they
    stay with it, move with it, and multiply a shared value; an inverted mask has none. If the network has BatchNorm, it
    and each variant are also measured with their own running statistics, from at most 100 batches of training images.

    Args:
        path: the file, or an open `Artifact`.
        data, data_dir, base: as for `evaluate`. Training images are read only if there is BatchNorm.
        repeats: number of other seeds, which follow the file's seed, and number of shuffles.
        values: values of the shared weight.

    Raises:
        ArtifactError, DataError: as for `evaluate`.
        ConversionError: `repeats` is not an integer of at least 1.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ConversionError(f"repeats is {repeats!r}; expected an integer from 1")
    artifact = Artifact.open(path)
    data, manifest = data_of(artifact, data, data_dir), artifact.manifest
    model = artifact.network(base=base, masked=False).to("cuda" if torch.cuda.is_available() else "cpu")
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    batches = open_for(model, data, progress, train=bool(norms), classes=class_names(artifact))
    parts = _Parts(manifest, model, artifact.contents.decode())
    changes = _changes(manifest, repeats, values)
    found, images = [], 0
    with progress(len(changes), "measuring") as advance:
        for change, value in changes:
            parts.put(change, value)
            accuracy, images = accuracy_of(model, batches.validation(), nullcontext)
            recalibrated = None
            if norms:
                with _new_statistics(model, norms, batches):
                    recalibrated, _ = accuracy_of(model, batches.validation(), nullcontext)
            found.append(Variation(change, value, accuracy, recalibrated))
            advance()
    classes = len(batches.classes or manifest.provenance.get("classes") or [])
    return Sanity(tuple(found), images, data.title, 1 / classes if classes else 0.0)


def _changes(manifest: Manifest, repeats: int, values: Sequence[float]) -> list[tuple[str, float | None]]:
    """Return what is measured, in order: each change and its value."""
    drawn = any(source_of(entry.distribution).drawn for entry in manifest.masked)
    changes: list[tuple[str, float | None]] = [(AS_IT_IS, None)]
    changes += [(SEEDS, (manifest.seed + 1 + i) % 2**64) for i in range(repeats if drawn else 0)]
    changes += [*((SHUFFLED, i) for i in range(repeats)), (INVERTED, None), *((SHARED, float(v)) for v in values)]
    return changes


class _Parts:
    """The masked weights of `model` and their bits, to be combined in other ways. At first `model` has all weights."""

    def __init__(self, manifest: Manifest, model: nn.Module, bits: dict[str, Bits]) -> None:
        self.masked = manifest.masked
        self.weights = {entry.name: model.get_parameter(entry.name).detach() for entry in manifest.masked}
        self.first = {name: weight.clone() for name, weight in self.weights.items()}
        self.bits = bits
        for entry in manifest.masked:
            if (found := bits[entry.name].origins(entry.numel)) is not None:
                source = source_of(entry.distribution)
                values = source.values(entry.numel, entry.std, manifest.seed, entry.stream, None, found)
                fill(self.first[entry.name], values)

    def put(self, change: str, value: float | None) -> None:
        """Fill the network with its weights and masks after one change."""
        for place, entry in enumerate(self.masked):
            weight, bits, factor = self.first[entry.name], self.bits[entry.name], 1.0
            if change == SEEDS and (source := source_of(entry.distribution)).drawn:
                weight = torch.empty_like(weight)
                source.fill(weight, entry.std, int(value or 0), entry.stream)
            elif change == SHUFFLED:
                bits = bits.moved(np.random.default_rng([int(value or 0), place]).permutation(entry.numel))
            elif change == INVERTED:
                bits = Bits(~bits.mask)
            elif change == SHARED:
                weight, factor = torch.ones_like(weight), value or 0.0
            effective = bits.effective(piece.float().numpy() for piece in pieces_of(weight))
            # + 0 makes +0.0 of −0.0, where a negative factor meets a weight that does not take part
            fill(self.weights[entry.name], (piece * np.float32(factor) + np.float32(0) for piece in effective))


@contextmanager
def _new_statistics(model: nn.Module, norms: list[BatchNorm], batches: Batches) -> Iterator[None]:
    """Context manager: replace the running statistics of `norms` by averages over training images."""
    before: list[tuple[float | None, dict[str, Tensor]]] = []
    for norm in norms:
        before.append((norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}))
        norm.reset_running_stats()
        norm.momentum = None  # each batch counts the same
        norm.train()
    with torch.no_grad():
        for images, *_ in islice(batches.train(0), BATCHES):
            model(images)
    model.eval()
    try:
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.load_state_dict(buffers, strict=False)
