"""`key=value` settings of a recipe."""

import copy
from collections.abc import Iterable
from typing import Any

from ..errors import RecipeError
from .yaml import parse_yaml


def override(values: Any, overrides: Iterable[str]) -> Any:
    """Return a copy of a recipe's plain values with `key=value` overrides."""
    values = copy.deepcopy(values)
    for setting in overrides:
        assign(values, *parse_setting(setting))
    return values


def parse_setting(setting: str) -> tuple[str, Any]:
    """Split `key=value` into the key and the value. The value is parsed as YAML."""
    key, equals, value = setting.partition("=")
    key = key.strip()
    if not equals:
        raise RecipeError(f"--set {setting!r} has no value; expected key=value, such as training.epochs=3")
    if not key or key.endswith("."):
        raise RecipeError(f"--set {setting!r} has no key before the =; expected key=value, such as training.epochs=3")
    return key, parse_yaml(value, f"--set {setting}")


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a key such as `training.epochs`, in place."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[leaf] = value
