"""The recipes and sweeps that come with the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError, unknown

SHIPPED = next(
    folder
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
    if folder.is_dir()
)

SWEEPS = ("paper/", "many_tasks/")  # the names of sweeps begin with one of them


def find(name: str | Path) -> Path:
    """Return the file of a recipe or sweep.

    Args:
        name: the path of a YAML file, or the name of a shipped recipe or sweep.

    Raises:
        RecipeError: there is no such file.
        UnknownName: nothing of that name comes with the package.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"the recipe file {path} does not exist")
        return path
    if str(name) not in shipped() + shipped_sweeps():
        raise unknown("recipe", str(name), shipped() + shipped_sweeps())
    return SHIPPED / f"{name}.yaml"


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return [name for name in _files() if not name.startswith(SWEEPS)]


def shipped_sweeps() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    return [name for name in _files() if name.startswith(SWEEPS)]


def _files() -> list[str]:
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))


def is_sweep(values: Mapping[str, Any]) -> bool:
    """Return whether the mapping of a YAML file is a sweep and not a recipe."""
    return bool({"recipe", "runs"} & values.keys())
