"""The paper's figures and tables, each one sweep of recipes/paper and a picture of it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..config.catalog import find
from ..config.keys import flat
from ..config.overrides import parse_setting
from ..config.yaml import read_yaml
from ..errors import PopupError, RecipeError, RunError, unknown
from ..sweep import Engine, Outcome, Report, Run, Sweep, as_text, execute, points
from ..sweep.archive import Archive
from .figures import FIGURES, NET, Figure
from .picture import draw
from .table import as_json, as_markdown, panel_of, rows, short

__all__ = ["FIGURES", "SCALES", "Reproduction", "Scale", "redraw", "reproduce", "sweep_of"]


@dataclass(frozen=True)
class Scale:
    """How much of the paper's protocol is run.

    Attributes:
        cifar10, imagenet: settings of the recipes that differ from the paper's.
        seeds: how many for CIFAR-10; the paper's where None, and for ImageNet, where these are one.
    """

    cifar10: tuple[str, ...] = ()
    imagenet: tuple[str, ...] = ()
    seeds: int | None = None


SCALES = {
    "full": Scale(),
    "small": Scale(
        ("data.max_train=4000", "data.batch_size=32", "data.max_validation=2000", "training.epochs=5"),
        (
            "data.max_train=2500", "data.max_validation=500", "training.epochs=5", "training.warmup_epochs=1",
            "data.input_size=[[3, 64, 64]]", "data.batch_size=32", "data.workers=2", "training.precision=float32",
        ),
        2,
    ),
    "tiny": Scale(
        ("data.max_train=32", "data.max_validation=16", "training.epochs=1", "data.batch_size=16"),
        (
            "data.max_train=8", "data.max_validation=4", "training.epochs=1", "training.warmup_epochs=0",
            "data.input_size=[[3, 32, 32]]", "data.batch_size=4", "data.workers=0", "training.precision=float32",
        ),
        1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reproduction:
    """What came of it: the outcomes of all runs, and the files that show them."""

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
    """The runs behind a figure.

    Args:
        figure: a key of `FIGURES`.
        scale: a key of `SCALES`.
        settings: `key=value`, or `key=[value, …]` in place of the figure's own values, as for a sweep.
        only: series and networks to run, by their labels; all of the kind that none is given of.
        seeds: how many, from 0, or which, in place of the scale's.
        data_dir: the data set's folder; for CIFAR-10 torchvision's, or one of train/ and validation/ with a folder of
            images for each class.

    Raises:
        UnknownName: no such figure, scale, series or network.
        RecipeError: what is wrong with the settings, or `only` leaves no run, or two runs of the figure would have
            the same place in it.
    """
    found, chosen = _look_up(figure, scale)
    own = chosen.imagenet if found.imagenet else chosen.cifar10
    if not found.imagenet and data_dir is not None and (Path(data_dir) / "train").is_dir():
        own = ("data.name=folder", *own)
    seeds = chosen.seeds if seeds is None and not found.imagenet else seeds
    file = find(f"paper/{found.sweep}")
    values = read_yaml(file)
    settings = _apply(values["runs"], [*own, *settings])
    _choose(values["runs"], only)  # before the settings are checked, which may be for these alone
    if not values["runs"]:
        raise RecipeError(f"{figure} has no run of {' and '.join(only)} together; expected a series with its network")
    sweep = Sweep.parse(values, figure, settings, seeds=seeds, data_dir=data_dir, folder=file.parent)
    taken: dict[tuple[Any, ...], Run] = {}
    for run in sweep.runs:
        x = run.values.get(NET if found.x == "kept" else found.x)
        other = taken.setdefault((run.label, panel_of(found, run.values), as_text(x), run.seed), run)
        if other is not run:
            one, two = flat(other.recipe.dump()), flat(run.recipe.dump())
            key = next(key for key in one | two if one.get(key) != two.get(key))
            raise RecipeError(
                f"{figure} would have {run} twice, with {key} {one.get(key)!r} and {two.get(key)!r}; expected one of "
                "them: choose networks by --only, and run other grids by popup-surgery sweep"
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
    """Run what of `sweep` is not finished, and write the figure, as PNG and SVG, and its table, as Markdown and JSON.

    Args:
        figure, scale, settings: as for `sweep_of`, which made `sweep`; the figure and its table say the settings.
        output: a folder; figures share the runs in it.
        engine, report: as for `sweep.execute`.

    Raises:
        RunError, Stopped, PopupError: as `sweep.execute`.
    """
    _look_up(figure, scale)
    output = Path(output)
    outcomes = execute(sweep, output, engine, report)
    return _show(figure, scale, outcomes, _note(sweep, scale, settings), output)


def redraw(figure: str, archive: str | Path, output: str | Path) -> Reproduction:
    """Write a figure and its table from the finished runs in an archive, as `reproduce` does; nothing is run.

    The note under the figure says the device that the archive names, and how many of the figure's runs are there.

    Args:
        figure: a key of `FIGURES`.
        archive: a file that `write_archive` wrote, as `benchmarks/gpu.py` does.
        output: a folder; it is made if it is not there.

    Raises:
        UnknownName: no such figure.
        RunError: the file is no archive of runs, or has no run of the figure.
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
        labels = "; ".join(dict.fromkeys(outcome.run.label for outcome in found.outcomes)) or "no run at all"
        raise RunError(f"{archive} has no run of {figure}; it has {labels}")
    outcomes = [chosen[number] for number in sorted(chosen)]
    note = _note(Sweep(figure, tuple(outcome.run for outcome in outcomes)), scale, settings)
    device = found.about.get("device", "an unknown device")
    note += f"\n{len(outcomes)} of {len(wanted.runs)} runs of these seeds, on {device}"
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PopupError(f"{output} cannot be written: {error.strerror}") from error
    return _show(figure, scale, outcomes, note, output)


def _place(run: Run) -> tuple[str, str, int]:
    """Where a run stands in its figure."""
    return run.label, json.dumps(dict(run.values), sort_keys=True), run.seed


def _show(figure: str, scale: str, outcomes: Sequence[Outcome], note: str, output: Path) -> Reproduction:
    """Write the figure and its table into the folder `output`."""
    found, shown = FIGURES[figure], points(outcomes)
    table = rows(found, shown)
    text = as_markdown(found, table, note)
    files = [output / f"{figure}-{scale}{suffix}" for suffix in (".md", ".json", ".png", ".svg")]
    write_atomically(files[0], text.encode())
    write_atomically(files[1], as_json(found, table, note).encode())
    for path in files[2:]:
        draw(found, shown, note, path)
    return Reproduction(tuple(outcomes), text, tuple(files))


def _choose(entries: list[dict[str, Any]], only: Sequence[str]) -> None:
    """Leave the series and the networks of `only` in a figure's grids."""
    series = dict.fromkeys(entry["label"] for entry in entries)
    networks = dict.fromkeys(short(net) for entry in entries for net in entry.get("grid", {}).get(NET, []))
    for name in only:
        if name not in series | networks:
            raise unknown("series or network", name, series | networks)
    if series.keys() & only:
        entries[:] = [entry for entry in entries if entry["label"] in only]
    if networks.keys() & only:
        for entry in entries:
            entry["grid"][NET] = [net for net in entry["grid"][NET] if short(net) in only]
        entries[:] = [entry for entry in entries if entry["grid"][NET]]


def _apply(entries: list[dict[str, Any]], settings: Sequence[str]) -> list[str]:
    """Give a figure's grids the settings that not all its runs take; those that are left.

    These are values of the grids' keys, for the grids that have them, and keys of the surgery, of which dense runs have
    none.
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


def _look_up(figure: str, scale: str) -> tuple[Figure, Scale]:
    if figure not in FIGURES:
        raise unknown("figure", figure, FIGURES)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    return FIGURES[figure], SCALES[scale]


def _note(sweep: Sweep, scale: str, settings: Sequence[str]) -> str:
    """What was run, of all recipes of a sweep, and the settings that it was run with."""
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
