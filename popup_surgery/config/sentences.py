"""One sentence for each key of a recipe that has a mistake."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError, nearest
from .expected import expected, shown

_S = TypeVar("_S", bound=BaseModel)
Sections = Mapping[str, type[BaseModel]]


class Missing(ValueError):
    """A missing key that the value of another key requires. The text is what was expected."""


def validated(cls: type[_S], values: Any, name: str, sections: Sections) -> _S:
    """Build a section from plain values. The `RecipeError` has one sentence for each key with a mistake.

    Args:
        sections: the sections of a recipe by name, and the recipe itself by "".
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        by_key: dict[tuple[Any, ...], list[Any]] = {}
        for each in error.errors():
            if each["loc"][-1:] != ("literal['none']",):
                by_key.setdefault(
                    tuple(part for part in each["loc"] if not str(part).startswith("function-wrap["))[:2], []
                ).append(each)
        found = [_sentence(key, errors, values, sections) for key, errors in by_key.items()]
        head = f"{name} has {len(found)} mistakes:\n" if len(found) > 1 else f"{name}: "
        raise RecipeError(head + "\n".join(found)) from None


def _sentence(path: tuple[Any, ...], errors: list[Any], values: Any, sections: Sections) -> str:
    """Turn pydantic's errors about one key into a sentence that names the key, its value and what was expected."""
    section = sections[path[0] if len(path) > 1 else ""]
    key = ".".join(map(str, path)) or "the recipe"
    if errors[0]["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key} is not a key of a recipe; nearest: {nearest(str(path[-1]), section.model_fields)}"
    own = next((error["ctx"]["error"] for error in errors if error["type"] == "value_error"), None)
    if own is not None and len(path) < 2:
        return str(own)  # it concerns several keys, and names them
    wanted = expected(section.model_fields[path[-1]]) if path else "the sections model, surgery, data and training"
    if errors[0]["type"] == "missing" or isinstance(own, Missing):
        return f"{key} is missing; expected {own or wanted}"
    for part in path:
        values = values[part]
    has = "has no value" if values is None else f"is {shown(values)}"
    if own is None:
        return f"{key} {has}; expected {wanted}"
    return f"{key} {has}{';' if str(own).startswith('expected') else ':'} {own}"
