"""Measure each way to run the network of a file on this machine: time, memory and bytes, in PyTorch and in ONNX."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact
from ..artifact.restore import check_packable
from ..data.batches import Progress, quiet
from ..errors import ConversionError, PopupError
from ..exporting.check import difference
from ..exporting.needed import needed
from ..plots import Bars, draw_bars
from .export import example_for, export, known_data, random_images
from .machine import cores, load, processor
from .way_process import WayProcess

PLAIN = "pytorch"
TITLES = {
    PLAIN: "PyTorch",
    "pytorch_packed": "PyTorch, packed=True",
    "onnx": "ONNX, float32",
    "onnx_packed": "ONNX, --packed",
    "onnx_fast": "ONNX, --fast",
}


@dataclass
class Way:
    """One way to run a network. Sizes are in bytes, and None where they are not known.

    Attributes:
        name: `pytorch`, `pytorch_packed`, `onnx`, `onnx_packed` or `onnx_fast`.
        refused: why it was not measured, in a sentence; empty if it was.
        file: size of its file.
        held: by how much its process has grown once a first pass is over.
        peak: by how much its process has grown at most in a pass, by number of inputs.
        turns: seconds of a pass in each round, by number of inputs.
        difference: largest difference of its outputs from PyTorch's, as a share of the largest output; of an export,
            as `Exported` has it.
    """

    name: str
    refused: str = ""
    file: int | None = None
    held: int | None = None
    peak: dict[int, int | None] = field(default_factory=dict)
    turns: dict[int, list[float]] = field(default_factory=dict)
    difference: float | None = None

    @property
    def title(self) -> str:
        """What the table calls it."""
        return TITLES[self.name]

    def seconds(self, batch: int) -> float:
        """Return the median time of a pass."""
        return statistics.median(self.turns[batch])


@dataclass(frozen=True)
class Bench:
    """The result of `bench`.

    Attributes:
        network: library and name of the network.
        shape: of one input, without the batch.
        batches: the numbers of inputs, in ascending order.
        rounds, threads: as given.
        ways: all that were asked for, PyTorch's plain network first.
        processor, instructions: the processor's name, and those of its instructions that matter for products.
        cores: processors that this process may use.
        load: processes that ran or waited in the minute before; None where the system does not tell.
        versions: of torch and onnxruntime.
    """

    network: str
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    threads: int
    ways: tuple[Way, ...]
    processor: str
    instructions: tuple[str, ...]
    cores: int
    load: float | None
    versions: dict[str, str]

    @property
    def measured(self) -> list[Way]:
        """The ways that were measured."""
        return [way for way in self.ways if not way.refused]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON has it, with the median `seconds` of each way."""
        found = asdict(self)
        for way, told in zip(self.ways, found["ways"], strict=True):
            told["seconds"] = {batch: way.seconds(batch) for batch in way.turns}
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: its head, and a row for each number of inputs and way. × is the ratio to PyTorch's."""
        plain, *_ = self.measured
        lines: list[tuple[str, ...]] = [
            ("inputs", "way", "time of a pass", "peak memory", "in memory", "file", "outputs differ by")
        ]
        for batch in self.batches:
            for way in self.measured:
                held, file, off = "", "", ""  # the same for each number of inputs
                if batch == self.batches[0]:
                    held, file = _bytes(way.held, plain.held), _bytes(way.file, plain.file)
                    off = "" if way.difference is None else f"{100 * way.difference:.2g} %"
                seconds = _with_ratio(_time(way.seconds(batch)), way.seconds(batch), plain.seconds(batch))
                peak = _bytes(way.peak[batch], plain.peak[batch])
                lines.append((f"{batch:,}", way.title, seconds, peak, held, file, off))
        return lines

    def notes(self) -> list[str]:
        """Return what stands below the table."""
        notes = [f"{way.title}: not measured, because {way.refused}" for way in self.ways if way.refused]
        size = " × ".join(map(str, self.shape))
        several = "s, in which the ways took turns" if self.rounds > 1 else ""
        notes.append(f"{self.network}, inputs of {size}; medians of {self.rounds} round{several}")
        load = "unknown" if self.load is None else f"{self.load:.1f}"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)} on {self.cores} core{'s' * (self.cores > 1)}"
        notes.append(f"{self.processor} ({', '.join(self.instructions)}); {threads}, load before {load}")
        if self.load is not None and self.load + self.threads > self.cores + 0.5:
            notes.append("other processes used the cores too, so the ratios count and not the times")
        return notes

    def __str__(self) -> str:
        """Return the table."""
        lines = self.rows()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, *self.notes()])

    def draw(self, path: str | Path) -> None:
        """Draw a bar for each way, of its times and sizes, as a PNG, SVG or PDF by the suffix of `path`."""
        ways, last = self.measured, self.batches[-1]
        panels = []
        for batch in self.batches:
            times = [way.seconds(batch) for way in ways]
            title = f"time of a pass,\n{batch:,} input{'s' * (batch > 1)}"
            panels.append(Bars(title, [*times], [_time(seconds) for seconds in times]))
        for title, sizes in (
            (f"peak memory,\n{last:,} input{'s' * (last > 1)}", [way.peak[last] for way in ways]),
            ("held in\nmemory", [way.held for way in ways]),
            ("file", [way.file for way in ways]),
        ):
            panels.append(Bars(title, [*sizes], [_size(size) for size in sizes]))
        title = f"{self.network}, {self.threads} thread{'s' * (self.threads > 1)}, {self.processor}"
        draw_bars(Path(path), title, [way.title for way in ways], panels)


def bench(
    path: str | Path,
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    threads: int | None = None,
    fast: bool = False,
    input_size: tuple[int, int, int] | None = None,
    base: str | Path | None = None,
    progress: Progress = quiet,
) -> Bench:
    """Measure each way to run the network in a popup artifact on the CPU of this machine.

    The ways are the plain network in PyTorch, the same with `packed=True`, ONNX in float32, and ONNX with `--packed`;
    see `load` and `export`. Each has a process of its own. They run in turns; a turn has as many passes as fit into
    0.1 s, and at least one. Memory is counted from the time when everything is imported. The exports are made in a
    temporary folder. A way that the network or this machine does not have is listed with the reason.

    Args:
        path: the file.
        batches: numbers of inputs of a pass.
        rounds: turns of each way with each number of inputs.
        threads: threads of PyTorch and of ONNX Runtime. Default: as many as PyTorch uses in this process.
        fast: measure the export with `fast` too.
        input_size: channels, height and width of the images, if the file does not say them.
        base: for a mask on pretrained weights: the file of these weights, as for `load`.
        progress: as for `evaluate`.

    Raises:
        ArtifactError: the file is damaged, or not an artifact.
        ConversionError: a number is not an integer from 1, or the network does not take such inputs.
        PopupError: the plain network cannot be run, for example for want of memory.
    """
    threads = torch.get_num_threads() if threads is None else threads
    for name, number in (("rounds", rounds), ("threads", threads), *(("a batch", batch) for batch in batches)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConversionError(f"{name} is {number!r}; expected an integer from 1")
    if not batches:
        raise ConversionError("batches is empty; expected numbers of inputs, such as (1, 8)")
    sizes, before = tuple(sorted(set(batches))), load()
    artifact = Artifact.open(path)
    ways = [Way(name) for name in TITLES if fast or name != "onnx_fast"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="popup-surgery-bench-")))
        files = _Files(artifact, folder, input_size, base)
        started: dict[str, WayProcess] = {}
        advance = stack.enter_context(progress(len(ways) * (1 + rounds * len(sizes)), "measuring"))
        for way in ways:
            with _refusals(way):
                file = files.of(way)
                started[way.name] = stack.enter_context(WayProcess(folder / f"{way.name}.txt"))
                _open(way, started[way.name], file, files, sizes, threads)
            advance()
        for batch in sizes:
            for turn in range(rounds):
                for way in ways if turn % 2 else reversed(ways):
                    with _refusals(way):
                        if not way.refused:
                            way.turns.setdefault(batch, []).append(started[way.name].seconds(batch))
                    advance()
    architecture, versions = artifact.manifest.architecture, {"torch": str(torch.__version__)}
    with suppress(PopupError):
        versions["onnxruntime"] = needed("onnxruntime").__version__
    name, instructions = processor()
    return Bench(
        f"{architecture.library}/{architecture.name}", files.shape, sizes, rounds, threads, tuple(ways), name,
        instructions, cores(), before, versions,
    )  # fmt: skip


@contextmanager
def _refusals(way: Way) -> Iterator[None]:
    """Context manager: note an error as the reason why a way is not measured; that of the plain network is raised."""
    try:
        yield
    except PopupError as error:
        if way.name == PLAIN:
            raise
        way.refused = str(error).removeprefix("nothing was written: ")


class _Files:
    """The files that are run: the artifact, and its exports in a temporary folder.

    Attributes:
        shape: of one input, without the batch.
    """

    def __init__(
        self, artifact: Artifact, folder: Path, input_size: tuple[int, int, int] | None, base: str | Path | None
    ) -> None:
        self.artifact, self.folder, self.base = artifact, folder, base
        model = artifact.network(base=base)
        given = None if input_size is None else random_images(input_size)
        self.example = example_for(model, artifact, known_data(artifact)) if given is None else given
        self.shape = tuple(self.example.shape[1:])

    def of(self, way: Way) -> Path:
        """Return the file of a way. An export is written first, and its difference noted.

        Raises:
            PopupError: the network cannot be held or exported in this way, or no layer of it is packed.
        """
        name = way.name
        if name == "pytorch_packed":
            check_packable(self.artifact.manifest)
        if not name.startswith("onnx"):
            return self.artifact.local()
        path, packed, fast = self.folder / f"{name}.onnx", name == "onnx_packed", name == "onnx_fast"
        done = export(self.artifact, path, example=self.example, base=self.base, packed=packed, fast=fast)
        if (packed or fast) and not any(layer.packed for layer in done.layers):
            reasons = ", ".join(sorted({layer.how for layer in done.layers}))
            raise ConversionError(f"none of its layers is packed ({reasons or 'none has weights'})")
        way.difference = done.difference
        return path


def _open(way: Way, process: WayProcess, file: Path, files: _Files, sizes: tuple[int, ...], threads: int) -> None:
    """Open a way's file in its process, and note what it takes and how its outputs differ."""
    outputs = files.folder / f"{way.name}.npy"
    kind = "onnx" if way.name.startswith("onnx") else way.name
    base = "" if files.base is None else str(files.base)
    found = process.open(file, kind, files.shape, sizes, threads, outputs, base)
    way.file, way.held, way.peak = file.stat().st_size, found["held"], found["peaks"]
    if way.name == "pytorch_packed":
        plain, ours = (torch.from_numpy(np.load(files.folder / f"{name}.npy")) for name in (PLAIN, way.name))
        with suppress(ConversionError):  # outputs that are not finite
            way.difference = difference([ours], [plain])


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _size(count: int | None) -> str:
    if count is None:
        return "not told here"
    if count < 10_000:
        return f"{count:,} bytes"
    return f"{count / 1e3:,.0f} kB" if count < 1e7 else f"{count / 1e6:,.0f} MB"


def _bytes(count: int | None, plain: int | None) -> str:
    return _with_ratio(_size(count), count, plain)


def _with_ratio(shown: str, value: float | None, plain: float | None) -> str:
    """Return a value with its ratio to PyTorch's; alone if it is the same, or is not known."""
    if not value or not plain or value == plain:
        return shown
    ratio = value / plain
    return f"{shown} × {ratio:.{0 if ratio > 10 else 2 if ratio > 0.1 else 3}f}"
