"""Reproduction of the paper's figures and tables. Each is a sweep in recipes/paper and a picture of it."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact import Artifact, repack
from ..atomic import check_writable, write_atomically
from ..config.catalog import find
from ..config.keys import flat
from ..config.overrides import parse_setting
from ..config.yaml import read_yaml
from ..errors import PopupError, RecipeError, RunError, unknown
from ..sweep import Engine, Outcome, Report, Run, Sweep, as_text, execute, points
from ..sweep.archive import Archive
from ..training.run_folder import Kind
from .figures import FIGURES, NET, PAPER, Figure
from .picture import draw
from .rounded import rounded
from .table import as_json, as_markdown, panel_of, rows, short

__all__ = ["FIGURES", "PAPER", "SCALES", "Protocol", "Reproduction", "redraw", "reproduce", "sweep_of"]


@dataclass(frozen=True)
class Protocol:
    """What a scale changes of a figure's protocol.

    Attributes:
        settings: recipe settings that differ.
        seeds: number of seeds; the sweep's own if None.
        networks: networks that run if the user chooses none; all if empty.
    """

    settings: tuple[str, ...] = ()
    seeds: int | None = None
    networks: tuple[str, ...] = ()


# By scale, and the protocols of figures.
SCALES: dict[str, dict[str, Protocol]] = {
    "full": {},
    "small": {
        "cifar10": Protocol(
            ("data.max_train=4000", "data.batch_size=32", "data.max_validation=2000", "training.epochs=5"), 2
        ),
        "imagenet": Protocol((
            "data.max_train=2500", "data.max_validation=500", "training.epochs=5", "training.warmup_epochs=1",
            "data.input_size=[[3, 64, 64]]", "data.batch_size=32", "data.workers=2", "training.precision=float32",
        )),
        "equal-bytes": Protocol(
            ("data.max_train=10000", "data.max_validation=2000", "data.batch_size=64", "training.epochs=20",
             "model.kwargs.width=0.25", "surgery.redraw=[{every: 100, share: 0.1}]"),
            networks=("conv4",),
        ),
    },
    "tiny": {
        "cifar10": Protocol(
            ("data.max_train=32", "data.max_validation=16", "training.epochs=1", "data.batch_size=16"), 1
        ),
        "imagenet": Protocol((
            "data.max_train=8", "data.max_validation=4", "training.epochs=1", "training.warmup_epochs=0",
            "data.input_size=[[3, 32, 32]]", "data.batch_size=4", "data.workers=0", "training.precision=float32",
        )),
        "equal-bytes": Protocol(
            ("data.max_train=32", "data.max_validation=16", "training.epochs=2", "data.batch_size=16",
             "model.kwargs.width=0.25", "surgery.k_schedule=[{kind: cubic, start: 0.5, epochs: 1}]",
             "surgery.redraw=[{every: 1, share: 0.1}]"), 1, ("conv4",),
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reproduction:
    """The outcomes of all runs of a figure, its table as Markdown, and the files written."""

    outcomes: tuple[Outcome, ...]
    table: str
    files: tuple[Path, ...]


def sweep_of(
    figure: str,
    scale: str = "full",
    settings: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    seeds: int | list[int] | None = None,
    data_dir: str | Path | None = None,
) -> Sweep:
    """Return the runs of a figure as a sweep.

    Args:
        figure: a key of `FIGURES`.
        scale: a key of `SCALES`.
        settings: `key=value`, or `key=[value, …]` in place of the figure's own values, as for a sweep.
        only: series and networks to run, by their labels. If no series is given, all series run; likewise networks.
        seeds: how many, counted from 0, or a list, in place of the scale's.
        data_dir: the data set's folder. For CIFAR-10 it is torchvision's, or one with train/ and validation/, each with
            a folder of images for each class.

    Raises:
        UnknownName: there is no such figure, scale, series or network.
        RecipeError: the settings are not valid, `only` leaves no run, or two runs would have the same place in the
            figure.
    """
    found, protocol = _look_up(figure, scale)
    seeds = protocol.seeds if seeds is None else seeds
    file = find(found.sweep)
    values = read_yaml(file)
    settings = _apply(values["runs"], [*protocol.settings, *settings])
    _choose(values["runs"], only, protocol.networks)  # before the settings are checked: they may apply only to these
    if not values["runs"]:
        raise RecipeError(
            f"{figure} has no run of {' and '.join(only)} together; expected a series and a network that it has"
        )
    sweep = Sweep.parse(values, figure, settings, seeds=seeds, data_dir=data_dir, folder=file.parent)
    taken: dict[tuple[Any, ...], Run] = {}
    for run in sweep.runs:
        x = run.point if found.x == "stored" else run.values.get(NET if found.x == "kept" else found.x)
        other = taken.setdefault((run.label, panel_of(found, run.values), as_text(x), run.seed), run)
        if other is not run:
            one, two = flat(other.recipe.dump()), flat(run.recipe.dump())
            key = next(key for key in one | two if one.get(key) != two.get(key))
            raise RecipeError(
                f"{figure} would have {run} twice, with {key} {one.get(key)!r} and {two.get(key)!r}; choose "
                "networks with --only, and run other grids with popup-surgery sweep"
            )
    return sweep


def reproduce(
    figure: str,
    scale: str,
    sweep: Sweep,
    output: str | Path,
    engine: Engine | None = None,
    report: Report = lambda outcomes, changed: None,
    settings: Sequence[str] = (),
) -> Reproduction:
    """Run the unfinished runs of `sweep`, and write the figure and its table.

    The figure is written as PNG and SVG, the table as Markdown and JSON.

    Args:
        figure, scale, settings: as given to `sweep_of` to make `sweep`. The figure and its table state the settings.
        output: a folder; figures share the runs in it.
        engine, report: as for `sweep.execute`.

    Raises:
        RunError, Stopped, PopupError: as for `sweep.execute`.
    """
    _look_up(figure, scale)
    output = Path(output)
    if os.path.isdir(output):  # a new folder has room for any
        _check(_files(figure, scale, output))
    if FIGURES[figure].x == "stored":
        for run in sweep.runs:
            _code(run, output)
    outcomes = execute(sweep, output, engine, report)
    more = rounded(outcomes, output) if FIGURES[figure].rounded else []
    return _show(figure, scale, outcomes, _note(sweep, scale, settings), output, more)


def _code(run: Run, output: Path) -> None:
    """Code a finished run's masks as its recipe says. They may not be if another figure has made it."""
    recipe, folder = run.recipe, run.folder(output)
    if recipe.surgery == "none" or folder.kind is not Kind.ARTIFACT or not folder.finished:
        return
    artifact = Artifact.open(folder.final)
    if recipe.surgery.encoding not in {weight.encoding for weight in artifact.manifest.masked}:
        repack(artifact, folder.final, encoding=recipe.surgery.encoding)


def redraw(figure: str, archive: str | Path, output: str | Path) -> Reproduction:
    """Write a figure and its table from the finished runs in an archive, as `reproduce` does. Nothing is run.

    The figure's note states the device that the archive names, and how many of the figure's runs the archive has.

    Args:
        figure: a key of `FIGURES`.
        archive: a file by `write_archive`, for example from `benchmarks/gpu.py`.
        output: a folder; it is created if needed.

    Raises:
        UnknownName: there is no such figure.
        RunError: the file is not an archive of runs, or has no run of the figure.
        PopupError: `output` cannot be written.
    """
    found = Archive.open(archive)
    scale, settings = str(found.about.get("scale", "full")), [str(each) for each in found.about.get("settings", ())]
    seeds = sorted({outcome.run.seed for outcome in found.outcomes})
    wanted = sweep_of(figure, scale, seeds=seeds or None)
    places = {_place(run): number for number, run in enumerate(wanted.runs)}
    chosen = {
        places[_place(outcome.run)]: replace(outcome, run=replace(outcome.run, point=wanted.runs[number].point))
        for outcome in found.outcomes
        if (number := places.get(_place(outcome.run))) is not None
    }
    if not chosen:
        labels = "; ".join(dict.fromkeys(outcome.run.label for outcome in found.outcomes)) or "no runs"
        raise RunError(f"{archive} has no run of {figure}; it has {labels}")
    outcomes = [chosen[number] for number in sorted(chosen)]
    note = _note(Sweep(figure, tuple(outcome.run for outcome in outcomes)), scale, settings)
    device = found.about.get("device", "an unknown device")
    note += f"\n{len(outcomes)} of {len(wanted.runs)} runs of these seeds, on {device}"
    if FIGURES[figure].rounded:
        note += "\nwithout pruned and rounded dense networks, because an archive has no dense weights"
    files = _files(figure, scale, Path(output))
    if any(os.path.exists(file) and os.path.samefile(file, archive) for file in files):
        raise PopupError(f"{archive} would be written over; choose another folder with --output")
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PopupError(f"{output} cannot be written: {error.strerror}") from error
    _check(files)
    return _show(figure, scale, outcomes, note, output)


def _files(figure: str, scale: str, output: Path) -> list[Path]:
    """Return the files of a figure: table as Markdown and JSON, picture as PNG and SVG."""
    return [output / f"{figure}-{scale}{suffix}" for suffix in (".md", ".json", ".png", ".svg")]


def _check(files: Sequence[Path]) -> None:
    for file in files:
        check_writable(file)


def _place(run: Run) -> tuple[str, str, int]:
    """Return the place of a run in its figure: label, grid values and seed."""
    return run.label, json.dumps(dict(run.values), sort_keys=True), run.seed


def _show(
    figure: str, scale: str, outcomes: Sequence[Outcome], note: str, output: Path, more: Sequence[Outcome] = ()
) -> Reproduction:
    """Write the figure and its table into the folder `output`; of `more` outcomes too, which no run has."""
    found, shown = FIGURES[figure], points([*outcomes, *more])
    table = rows(found, shown)
    text = as_markdown(found, table, note)
    files = _files(figure, scale, output)
    write_atomically(files[0], text.encode())
    write_atomically(files[1], as_json(found, table, note).encode())
    for path in files[2:]:
        draw(found, shown, note, path)
    return Reproduction(tuple(outcomes), text, tuple(files))


def _choose(entries: list[dict[str, Any]], only: Sequence[str], usual: Sequence[str]) -> None:
    """Remove all series and networks that are not in `only` from the grids; `usual` are the networks if none is."""
    series = dict.fromkeys(entry["label"] for entry in entries)
    networks = dict.fromkeys(short(net) for entry in entries for net in entry.get("grid", {}).get(NET, []))
    for name in only:
        if name not in series | networks:
            raise unknown("series or network", name, series | networks)
    if series.keys() & only:
        entries[:] = [entry for entry in entries if entry["label"] in only]
    if not networks.keys() & only:
        only = usual
    if networks.keys() & only:
        for entry in entries:
            entry["grid"][NET] = [net for net in entry["grid"][NET] if short(net) in only]
        entries[:] = [entry for entry in entries if entry["grid"][NET]]


def _apply(entries: list[dict[str, Any]], settings: Sequence[str]) -> list[str]:
    """Apply those settings to a figure's grids that not all its runs take. Returns the other settings.

    Not all runs take the values of a grid key, which some grids lack, and the surgery keys, which dense runs lack.
    """
    left = []
    for setting in settings:
        key, value = parse_setting(setting)
        grids = [entry["grid"] for entry in entries if key in entry.get("grid", {})]
        if grids:
            for grid in grids:
                grid[key] = value if isinstance(value, list) else [value]
        elif key.startswith("surgery."):
            for entry in entries:
                own = entry.setdefault("set", {})
                if own.get("surgery") != "none":
                    own.pop(key, None)
                    entry.setdefault("grid" if isinstance(value, list) else "set", {})[key] = value
        else:
            left.append(setting)
    return left


def _look_up(figure: str, scale: str) -> tuple[Figure, Protocol]:
    if figure not in FIGURES:
        raise unknown("figure", figure, FIGURES)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    found = FIGURES[figure]
    return found, SCALES[scale].get(found.protocol, Protocol())


def _note(sweep: Sweep, scale: str, settings: Sequence[str]) -> str:
    """Describe what was run: scale, images, batch sizes, epochs and seeds of a sweep's recipes, and the settings."""
    data, seeds = [run.recipe.data for run in sweep.runs], len({run.seed for run in sweep.runs})

    def each(values: Iterable[int | None]) -> str:
        return " or ".join("all" if value is None else f"{value:,}" for value in dict.fromkeys(values))

    pixels = [d.input_size[-1] for d in data if d.input_size]
    images = f"{each(d.max_train for d in data)} training and {each(d.max_validation for d in data)} validation images"
    return (
        f"{scale}; {images}{f' of {each(pixels)} pixels' * bool(pixels)}; batch: {each(d.batch_size for d in data)}; "
        f"epochs: {each(run.recipe.epochs for run in sweep.runs)}; seeds: {seeds}"
        + (f"\nset: {'; '.join(settings)}" if settings else "")
    )
