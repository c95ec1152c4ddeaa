"""The finished runs of a sweep in one file, to draw figures from on another machine.

An archive is a ZIP file. It has `archive.json` with the numbers of every run and, for each run, `<name>/recipe.yaml`,
`<name>/metrics.jsonl` and its popup artifact. Dense weights are not included.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..config import Recipe
from ..config.yaml import parse_yaml
from ..errors import PopupError, RunError
from ..training.run_folder import Kind
from .grid import Run
from .results import Numbers, Outcome, State

FORMAT = 1
_LARGEST = 1 << 26  # bytes of one text member of an archive


@dataclass(frozen=True)
class Archive:
    """Finished runs and how they were made.

    Attributes:
        about: the writer's description of them, such as `device`, `scale` and `settings`.
        outcomes: the runs with their numbers, in the sweep's order.
    """

    about: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Archive":
        """Read an archive.

        Raises:
            RunError: the file cannot be read, or is not an archive of runs.
        """
        try:
            with zipfile.ZipFile(path) as file:
                values = json.loads(_text(file, "archive.json"))
                if values["format"] != FORMAT:
                    raise RunError(f"{path} has the format {values['format']}; this version reads {FORMAT}")
                return cls(dict(values["about"]), tuple(_outcome(file, each) for each in values["runs"]))
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
        except RunError:
            raise
        except (PopupError, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not an archive of a sweep's runs: {error}") from error


def write_archive(
    path: str | Path, outcomes: Sequence[Outcome], output: Path, about: Mapping[str, Any], limit: int | None = None
) -> list[str]:
    """Write the finished runs of a sweep to an archive.

    Args:
        path: the archive.
        outcomes: the outcomes of the sweep's runs. A run may be there under several labels; its files are written once.
        output: the sweep's folder.
        about: a description of the runs, of plain values.
        limit: maximum size of the file in bytes. Artifacts that do not fit are left out, those of the last runs first.

    Returns the names of the runs whose artifacts were left out.

    Raises:
        PopupError: the archive cannot be written, or a run cannot be read.
    """
    done = [outcome for outcome in outcomes if outcome.state is State.FINISHED and outcome.numbers is not None]
    runs = [
        {"name": o.run.name, "label": o.run.label, "values": o.run.values, "seed": o.run.seed}
        | {"numbers": asdict(o.numbers)}  # type: ignore[arg-type]
        for o in done
    ]
    memory, left_out = io.BytesIO(), []
    try:
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive.json", json.dumps({"format": FORMAT, "about": dict(about), "runs": runs}, indent=1))
            folders = {outcome.run.name: outcome.run.folder(output) for outcome in done}
            for run, folder in folders.items():
                for name in ("recipe.yaml", "metrics.jsonl"):
                    file.write(folder.path / name, f"{run}/{name}")
            for name, folder in folders.items():
                if folder.kind is not Kind.ARTIFACT:
                    continue
                artifact = folder.final
                if limit is not None and memory.tell() + artifact.stat().st_size + 400 * len(done) + 4096 > limit:
                    left_out.append(name)
                else:
                    file.write(artifact, f"{name}/{artifact.name}", zipfile.ZIP_STORED)
    except OSError as error:
        raise PopupError(f"{error.filename} cannot be read: {error.strerror}") from error
    write_atomically(path, memory.getvalue())
    return left_out


def _outcome(file: zipfile.ZipFile, values: Mapping[str, Any]) -> Outcome:
    name = f"{values['name']}/recipe.yaml"
    recipe = Recipe.parse(parse_yaml(_text(file, name), name), name)
    run = Run(str(values["label"]), 0, dict(values["values"]), int(values["seed"]), recipe)
    return Outcome(run, State.FINISHED, Numbers(**{key: float(x) for key, x in values["numbers"].items()}))


def _text(file: zipfile.ZipFile, name: str) -> str:
    with file.open(name) as member:
        data = member.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"{name} is larger than {_LARGEST:,} bytes")
    return data.decode()
