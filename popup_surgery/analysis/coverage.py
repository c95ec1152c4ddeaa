"""What conversion would do to every network of a library, one row each."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

from ..masking.planning import plan
from ..models.build import build_meta
from ..models.libraries import architecture_of, names
from ..plugins import loaded_plugins, restore_plugins


@dataclass(frozen=True)
class Row:
    """What conversion would do to one network.

    Attributes:
        name: the network's name, with its library.
        layers: number of masked weight tensors; tied ones count once.
        parameters: number of the network's parameters, each counted once.
        masked, generated, constant, left: shares of the parameters, 0 … 1.
        of_weights: of everything that looks like a weight, the share that is masked, as in `Coverage.of_weights`.
        missed: number of elements of each weight that is left, by `state_dict` key.
        seconds: time to build the network without memory and to plan.
        refused: why the network cannot be converted; empty if it can.
    """

    name: str
    layers: int = 0
    parameters: int = 0
    masked: float = 0.0
    generated: float = 0.0
    constant: float = 0.0
    left: float = 0.0
    of_weights: float = 0.0
    missed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str = ""


def look(name: str) -> Row:
    """Return the row of one network. The network is built without memory and then discarded."""
    began = time.perf_counter()
    try:
        planned = plan(build_meta(architecture_of(name)))
    except Exception as error:  # building a library's network may raise anything
        return Row(name, refused=f"{type(error).__name__}: {' '.join(str(error).split())}")
    seconds = round(time.perf_counter() - began, 2)
    coverage = planned.coverage
    masked, generated, constant, left = map(coverage.share, ("masked", "generated", "constant", "left"))
    of_weights, missed = coverage.of_weights, coverage.missed
    return Row(
        name, len(planned.masked), coverage.total, masked, generated, constant, left, of_weights, missed, seconds
    )


def survey(names: Sequence[str], jobs: int = 1) -> Iterator[Row]:
    """Yield the rows of networks, in order, made by `jobs` processes."""
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(loaded_plugins(),)
    ) as pool:
        yield from pool.map(look, names, chunksize=8)


def all_names(libraries: Sequence[str]) -> list[str]:
    """Return the name of every network of `libraries`, with its library's name."""
    return [f"{library}/{name}" for library in libraries for name in names(library)]


def as_json(rows: Sequence[Row], libraries: Sequence[str]) -> str:
    """Return the rows as JSON, one line each, with the libraries' versions."""
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    return f'{{"versions": {json.dumps(_versions(libraries))},\n"networks": [\n{lines}\n]}}\n'


def as_markdown(rows: Sequence[Row], libraries: Sequence[str]) -> str:
    """Return the rows as a Markdown table, after a list of what stands out."""
    versions = ", ".join(f"{library} {version}" for library, version in _versions(libraries).items())
    refused = [row for row in rows if row.refused]
    below = [row for row in rows if not row.refused and row.of_weights < 0.99]
    weights = sum(row.masked * row.parameters for row in rows)
    lines = [
        "# What conversion masks",
        "",
        f"{len(rows)} networks of {versions}, as `popup-surgery zoo` finds them. {len(refused)} are refused; of "
        f"{len(below)} less than 99 % of the weights are masked. Of all their parameters "
        f"{weights / max(sum(row.parameters for row in rows), 1):.2%} are masked.",
        "",
        "A *weight* is whatever a layer kind claims, and whatever else is not masked, generated or constant and has "
        "two dimensions or more above 1. Shares are of all parameters; *left* ones keep the value that the network "
        "gives them, are frozen, and stored in the file.",
        "",
    ]
    lines += [f"- {row.name} is refused: {row.refused}" for row in refused]
    lines += [f"- {row.name}: {row.of_weights:.2%}, without {', '.join(row.missed)}" for row in below]
    lines += [""] if refused or below else []
    lines += [
        "| network | layers | parameters | masked | of weights | generated | constant | left | seconds |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        shares = row.masked, row.of_weights, row.generated, row.constant, row.left
        cells = " | ".join(f"{share:.2%}" for share in shares)
        lines.append(f"| {row.name} | {row.layers} | {row.parameters:,} | {cells} | {row.seconds:.2f} |")
    return "\n".join(lines) + "\n"


def _begin(plugins: Mapping[str, bytes]) -> None:
    import torch

    torch.set_num_threads(1)
    restore_plugins(plugins)


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    return {library: import_module(library).__version__ for library in libraries}


def _rounded(row: Row) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(row).items()}
