"""The recipes and sweeps that come with the package."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import RecipeError, unknown

SHIPPED = next(
    folder
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
    if folder.is_dir()
)


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
    return [name for name, sweep in _files().items() if not sweep]


def shipped_sweeps() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    return [name for name, sweep in _files().items() if sweep]


@cache
def _files() -> dict[str, bool]:
    """Return by name whether each shipped file is a sweep, which its keys say, as they do for `is_sweep`."""
    texts = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path.read_text() for path in SHIPPED.rglob("*.yaml")}
    return {name: bool(re.search(r"^(recipe|runs):", texts[name], re.M)) for name in sorted(texts)}


def is_sweep(values: Mapping[str, Any]) -> bool:
    """Return whether the mapping of a YAML file is a sweep and not a recipe."""
    return bool({"recipe", "runs"} & values.keys())
