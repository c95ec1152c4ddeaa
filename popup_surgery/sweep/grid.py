"""A sweep: a grid over any recipe keys × seeds. All its runs are checked before the first one starts."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..config.catalog import find, is_sweep
from ..config.keys import fingerprint
from ..config.overrides import assign, parse_setting
from ..config.schema import with_plugins
from ..config.yaml import read_yaml
from ..data.folders import recognised
from ..errors import PopupError, RecipeError, nearest
from ..experiment.setup import run_folder, with_first_file
from ..plugins import load_plugins
from ..training.run_folder import Kind, RunFolder
from .names import as_text, find_folder, titles

KEYS = ("recipe", "set", "seeds", "label", "grid")  # the first three may also stand beside `runs`, for all of them
TOP = ("runs", "base", "bank")  # keys of the whole sweep
SEEDS = ("surgery.seed", "training.seed")
WEIGHTS = "model.pretrained"
LIMIT = 100_000  # runs; more is taken for a mistake


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        label: label of its grid.
        point: number of its grid point in the sweep. Runs of one point differ only in their seeds.
        values: values of the grid's keys.
        seed: seed of this run; the recipe's own `training.seed` if the sweep sets no seeds.
        recipe: the complete recipe.
        title: what varies in its sweep, such as `k=0.3,seed=1`; the name of a new folder begins with it.
    """

    label: str
    point: int
    values: Mapping[str, Any]
    seed: int
    recipe: Recipe
    title: str = ""

    @cached_property
    def name(self) -> str:
        """A hash of everything that affects the run's result. The name of its folder ends with it."""
        return fingerprint(self.recipe)[:16]

    def with_threads(self, threads: int | None) -> "Run":
        """Return this run with as many threads; with those of its recipe if None. Its name stays."""
        if threads is None:
            return self
        training = self.recipe.training.model_copy(update={"threads": threads})
        return replace(self, recipe=self.recipe.model_copy(update={"training": training}))

    def folder(self, output: Path) -> RunFolder:
        """Return the run's folder in the sweep's folder `output`: the one there, whatever stands before the hash."""
        new = f"{self.title}-{self.name}" if self.title else self.name
        return run_folder(output / find_folder(output, self.name, new), self.recipe, "recipe")

    def __str__(self) -> str:
        return f"{' '.join([self.label, *_settings(self.values)])} seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    They follow the order of the file, grid by grid. Within a grid seeds vary fastest, then the last key.

    Attributes:
        base: the run of a dense network, which comes first. All others start from its weights.
        bank: put the masks of all runs in one bank at the end (`evaluate_bank`).
    """

    name: str
    runs: tuple[Run, ...]
    base: Run | None = None
    bank: bool = False

    @property
    def everything(self) -> tuple[Run, ...]:
        """All runs, the base first."""
        return (self.base, *self.runs) if self.base is not None else self.runs

    @classmethod
    def load(
        cls,
        name: str | Path,
        settings: Sequence[str] = (),
        *,
        seeds: int | list[int] | None = None,
        data_dir: str | Path | None = None,
        output: str | Path | None = None,
    ) -> "Sweep":
        """Load the sweep in a YAML file, or make one over a recipe from `settings` and `seeds`.

        Args:
            name: a sweep file, or a recipe as for `train`.
            settings: `key=value` sets a key in every grid; `key=[value, …]` makes it a key of every grid. Both override
                what the file says of the key. `base.key=value` sets a key of the base's recipe. With
                `model.pretrained=…`, there is no base.
            seeds: how many, counted from 0, or a list; overrides the file's.
            data_dir: the data set's folder, in place of the recipes' `data.root`.
            output: the sweep's folder, where the base's weights will be. Default: `runs/sweeps/<name>`.

        Raises:
            RecipeError, UnknownName: the sweep is not valid. The message lists all mistakes in its recipes.
        """
        path = find(name)
        values = read_yaml(path, "recipe, set, grid and seeds, or runs")
        if isinstance(plugins := values.pop("plugins", []) if is_sweep(values) else [], list):
            load_plugins(map(str, plugins), path.parent)
        else:
            raise RecipeError(f"{name}: plugins is {plugins!r}; expected a list of Python files and modules")
        if {"model", "training"} & values.keys():
            values, path = {"recipe": str(name)}, Path()
        return cls.parse(values, str(name), settings, seeds=seeds, data_dir=data_dir, output=output, folder=path.parent)

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        name: str = "sweep",
        settings: Sequence[str] = (),
        *,
        seeds: int | list[int] | None = None,
        data_dir: str | Path | None = None,
        output: str | Path | None = None,
        folder: Path = Path(),
    ) -> "Sweep":
        """Make a sweep from plain values.

        Args:
            values: the content of a sweep file.
            name: name of the sweep in messages.
            settings, seeds, data_dir, output: as for `load`.
            folder: recipe files are relative to it.

        Raises:
            RecipeError, UnknownName: as for `load`.
        """
        output = default_folder(_stem(name)) if output is None else Path(output)
        given, base = _with_base(values, name, dict(map(parse_setting, settings)), data_dir, output, folder)
        runs: list[Run] = []
        mistakes: dict[str, None] = {}
        for where, entry in _entries(values, name):
            if base is not None and WEIGHTS in (_mapping(entry, "set", where) | _mapping(entry, "grid", where)):
                raise RecipeError(f"{where}: {WEIGHTS} and base are given, and base sets it too; leave out one of them")
            grid = _Grid(where, entry, given, seeds)
            if len(runs) + grid.size > LIMIT:
                raise RecipeError(f"{where} makes {grid.size:,} runs; expected at most {LIMIT:,} in a sweep")
            plain = _read(grid.recipe, folder, data_dir)
            first = runs[-1].point + 1 if runs else 0
            for (number, point), seed in itertools.product(enumerate(grid.points(), first), grid.seeds):
                try:
                    recipe = _recipe(plain, grid.fixed | point, seed)
                except PopupError as error:
                    mistakes |= dict.fromkeys(_mistakes(error, point))
                    continue
                runs.append(Run(grid.label, number, point, recipe.training.seed if seed is None else seed, recipe))
        if mistakes:
            head = f"{name} has {len(mistakes)} mistakes:\n" if len(mistakes) > 1 else f"{name}: "
            raise RecipeError(head + "\n".join(mistakes))
        _check_distinct(runs, name)
        titled = [replace(run, title=title) for run, title in zip(runs, titles(runs), strict=True)]
        bank = values.get("bank", False)
        if not isinstance(bank, bool):
            raise RecipeError(f"{name}: bank is {bank!r}; expected true or false")
        if bank:
            check_bank(titled, name)
        return cls(_stem(name), tuple(_with_places(titled, name)), base, bank)


class _Grid:
    """One entry of a sweep, checked as far as possible without its recipe."""

    def __init__(self, where: str, entry: Mapping[str, Any], given: dict[str, Any], seeds: Any) -> None:
        if "recipe" not in entry:
            raise RecipeError(f"{where}: recipe is missing")
        self.recipe = _text(entry, "recipe", where)
        self.label = _text(entry, "label", where) if "label" in entry else _stem(self.recipe)
        fixed, grid = _mapping(entry, "set", where), _mapping(entry, "grid", where)
        if both := fixed.keys() & grid.keys():
            raise RecipeError(f"{where}: {min(both)} is in set and in grid; expected it in one of them")
        for key, values in grid.items():
            if not isinstance(values, list):
                raise RecipeError(f"{where}: grid {key} is {values!r}; expected a list of values")
        lists = {key: value for key, value in given.items() if isinstance(value, list)}
        self.fixed = {key: value for key, value in (fixed | given).items() if key not in lists}
        self.grid = {key: values for key, values in grid.items() if key not in given} | lists
        for key, values in self.grid.items():
            if not values:
                raise RecipeError(f"{where}: grid {key} is an empty list; expected one value or more")
        self.seeds = _seeds(entry.get("seeds") if seeds is None else seeds, where)
        for key in SEEDS:
            if self.seeds != (None,) and key in self.fixed | self.grid:
                raise RecipeError(f"{where}: {key} and seeds are given, and seeds sets it too; leave out one of them")

    @property
    def size(self) -> int:
        """Number of runs of the grid."""
        return len(self.seeds) * math.prod(map(len, self.grid.values()))

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield the grid's values by key, for each of its points."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def _entries(values: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the grids of a sweep, each with its name for messages."""
    if "runs" not in values:
        _check_keys(values, (*KEYS, *TOP), name)
        yield name, values
        return
    _check_keys(values, (*KEYS[:3], *TOP), name, " beside runs")
    runs = values["runs"]
    if not isinstance(runs, list) or not runs:
        raise RecipeError(f"{name}: runs is {runs!r}; expected a list of grids, each with recipe, set, grid or label")
    shared = _mapping(values, "set", name)
    for number, entry in enumerate(runs, 1):
        where = f"{name}, grid {number}"
        if not isinstance(entry, dict):
            raise RecipeError(f"{where} is {entry!r}; expected recipe, set, grid, seeds or label")
        _check_keys(entry, KEYS, where)
        rest = {key: values[key] for key in ("recipe", "seeds") if key in values}
        yield where, rest | entry | {"set": shared | _mapping(entry, "set", where)}


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str, which: str = "") -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: {key} is not a key of a sweep{which}; nearest: {nearest(str(key), known)}")


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = entry.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise RecipeError(f"{where}: {key} is {value!r}; expected values by recipe key, such as training.epochs: 3")
    return value


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}: {key} is {value!r}; expected a name")
    return value


def _seeds(value: Any, where: str) -> Sequence[int | None]:
    """Return the seeds of a sweep entry; None stands for those of the recipe."""
    if value is None:
        return (None,)
    if type(value) is int and value >= 1:
        return range(value)
    listed = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
    if listed and len(set(value)) == len(value):
        return tuple(value)
    raise RecipeError(
        f"{where}: seeds is {value!r}; expected their number, from 1, or a list of different integers from 0"
    )


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _stem(name: str) -> str:
    return Path(name).stem if _is_file(name) else name


def _read(recipe: str, folder: Path, data_dir: str | Path | None) -> dict[str, Any]:
    file = find(folder / recipe if _is_file(recipe) else recipe)
    values = with_plugins(read_yaml(file), file.parent)
    if data_dir is not None:
        assign(values, "data.root", str(Path(data_dir).absolute()))
    return values


def default_folder(name: str) -> Path:
    """Return the folder of a sweep that is given none."""
    return Path("runs/sweeps") / name


def _with_base(
    values: Mapping[str, Any],
    name: str,
    given: dict[str, Any],
    data_dir: str | Path | None,
    output: Path,
    folder: Path,
) -> tuple[dict[str, Any], Run | None]:
    """Return the settings of all grids, with the weights of the sweep's `base`, and its run; None if there is none."""
    where = f"{name}, base"
    own = {key.removeprefix("base."): given.pop(key) for key in list(given) if key.startswith("base.")}
    entry = values.get("base")
    if entry is None or WEIGHTS in given:
        if own:
            why = "the sweep has no base" if entry is None else f"{WEIGHTS} is given, so there is no base"
            raise RecipeError(f"{name}: base.{min(own)} is given, but {why}")
        return given, None
    if isinstance(entry, str):
        entry = {"recipe": entry}
    if not isinstance(entry, dict) or "recipe" not in entry:
        raise RecipeError(f"{name}: base is {entry!r}; expected a recipe, or a mapping with recipe and set")
    _check_keys(entry, ("recipe", "set"), where)
    recipe = _text(entry, "recipe", where)
    try:
        found = _recipe(_read(recipe, folder, data_dir), _mapping(entry, "set", where) | own, None)
    except PopupError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix('recipe: ')}") from error
    run = Run(f"base {_stem(recipe)}", 0, {}, found.training.seed, found, "base")
    if run.folder(output).kind is Kind.ARTIFACT:
        raise RecipeError(f"{where}: {recipe} learns a mask; expected a dense network: set surgery to none")
    return given | {WEIGHTS: str(run.folder(output).final)}, run


def check_bank(runs: Sequence[Run], name: str) -> None:
    """Raise `RecipeError` if a bank cannot hold the masks of all runs, as far as their recipes say."""
    for run in runs:
        if run.folder(Path()).kind is not Kind.ARTIFACT:
            raise RecipeError(f"{name}: bank is true, and {run} trains a dense network; expected runs that learn masks")
        for key, value in _network(run).items():
            if value != (first := _network(runs[0])[key]):
                raise RecipeError(
                    f"{name}: bank is true, and {key} is {first!r} in {runs[0]} and {value!r} in {run}; expected one "
                    "network for all runs of a bank"
                )


def _network(run: Run) -> dict[str, Any]:
    """Return the keys of a recipe that decide which weights its mask is for, except for the head's size."""
    model, surgery = run.recipe.model, run.recipe.surgery
    assert surgery != "none"
    kwargs = {key: value for key, value in model.kwargs.items() if key != "num_classes"}
    found: dict[str, Any] = {"model.name": model.name, "model.kwargs": kwargs, "model.pretrained": model.pretrained}
    if not model.pretrained:
        found |= {"surgery.seed": surgery.seed, "surgery.scheme": surgery.scheme, "surgery.scaled": surgery.scaled}
        found |= {"surgery.k": surgery.k} if surgery.scaled else {}  # it scales the weights
    return found


def _recipe(base: dict[str, Any], settings: Mapping[str, Any], seed: int | None) -> Recipe:
    """Return the recipe `base` with the settings and the seed of one run."""
    values = copy.deepcopy(base)
    for key, value in copy.deepcopy(dict(settings)).items():
        assign(values, key, value)
    if seed is not None:
        assign(values, "training.seed", seed)
        model, surgery = values.get("model"), values.get("surgery")
        if isinstance(surgery, dict):  # a dense network has no other seed
            surgery["seed"] = seed
            if isinstance(model, dict) and model.get("init_from"):
                del surgery["seed"]  # the seed is that of the file
    recipe = with_first_file(Recipe.parse(values))
    return recipe.model_copy(update={"data": recognised(recipe.data)})


def _mistakes(error: PopupError, point: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sentences of an error, each with the grid's values unless it begins with one of them."""
    first, *more = str(error).split("\n")
    for sentence in more or [first.removeprefix("recipe: ")]:
        tell = point and not sentence.startswith(
            tuple(f"{key} {verb}" for key in point for verb in ("is", "has no value"))
        )
        yield f"{sentence} (with {', '.join(_settings(point))})" if tell else sentence


def _check_distinct(runs: Sequence[Run], name: str) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        other = seen.setdefault(run.name, run)
        if other is not run:
            same = "is there twice" if str(run) == str(other) else f"is the same run as {other}"
            raise RecipeError(f"{name}: {run} {same}; remove one of them")


def _with_places(runs: Sequence[Run], name: str) -> Iterator[Run]:
    """Yield the runs, each with a file of its own in the repository on the Hub that it is pushed to."""
    seen: set[Any] = set()
    for run in runs:
        if (hub := run.recipe.hub) is None:
            yield run
            continue
        if hub.path is None:
            path = f"{'-'.join(filter(None, [run.title, run.name]))}.popup.safetensors"
            hub = hub.model_copy(update={"path": path})
        place = hub.repo, hub.revision, hub.path
        if place in seen:
            raise RecipeError(
                f"{name}: hub.path is {hub.path!r} for several runs; remove it, and each run goes to a file of its own"
            )
        seen.add(place)
        yield replace(run, recipe=run.recipe.model_copy(update={"hub": hub}))


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={as_text(value)}" for key, value in values.items()]
