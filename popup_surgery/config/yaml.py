"""YAML for recipes: 1e-4 is a number, 2:4 is text, and a duplicate key is an error."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import RecipeError


def read_yaml(path: Path, expected: str = "the sections model, surgery, data and training") -> dict[str, Any]:
    """Read the mapping in a YAML file; a `RecipeError` says what is `expected` in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} does not hold a mapping; expected {expected}")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return YAML text that `read_yaml` reads back to the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def _decimal(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Return a pattern of numbers without those in base 60, which have colons."""
    return re.compile(f"(?!.*:)(?:{pattern.pattern})", pattern.flags)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number and 2:4 as text, and refuses duplicate keys.

    YAML 1.1 reads 1e-4 as a string and 2:4 as 124, a number in base 60. It takes the last of several equal keys.
    """

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, _decimal(pattern) if tag.endswith((":int", ":float")) else pattern) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {min(twice)!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$", re.I), list("-+0123456789.")
    )


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML text; a `RecipeError` calls it `what`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
