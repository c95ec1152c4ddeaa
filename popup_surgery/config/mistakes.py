"""What is wrong with a recipe: for each key with a mistake, one sentence made from pydantic's errors."""

from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError, nearest
from .expected import expected, shown

_M = TypeVar("_M", bound=BaseModel)


class Missing(ValueError):
    """A missing key that the value of another key requires. The text is what was expected."""


def validated(cls: type[_M], values: Any, name: str) -> _M:
    """Build a section from plain values. The `RecipeError` has one sentence for each key with a mistake."""
    try:
        return cls.model_validate(values, context=values if isinstance(values, dict) else None)
    except ValidationError as error:
        by_key: dict[tuple[Any, ...], list[Any]] = {}
        for each in error.errors():
            if each["loc"][-1:] != ("literal['none']",):
                by_key.setdefault(_path(cls, each["loc"]), []).append(each)
        found = [_sentence(cls, key, errors, values) for key, errors in by_key.items()]
        head = f"{name} has {len(found)} mistakes:\n" if len(found) > 1 else f"{name}: "
        raise RecipeError(head + "\n".join(found)) from None


def _keys(path: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the keys of an error's path, without pydantic's names for a member of a union and for a validator."""
    for i, part in enumerate(path):
        if not (i == 1 and isinstance(part, str) and (part[:1].isupper() or part.startswith("function-"))):
            yield part


def _path(root: type[BaseModel], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path of the key that an error is about, without places within its value."""
    found: list[Any] = []
    section: type[BaseModel] | None = root
    for key in _keys(location):
        if section is None:
            break
        found.append(key)
        section = section_of(section, key)
    return tuple(found)


def section_of(root: type[BaseModel], key: Any) -> type[BaseModel] | None:
    """Return the section under a key, perhaps a member of a union; None if there is none."""
    kind = root.model_fields[key].annotation if key in root.model_fields else None
    found = (each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel))
    return next(found, None)


def _sentence(root: type[BaseModel], path: tuple[Any, ...], errors: list[Any], values: Any) -> str:
    """Turn pydantic's errors about one key into a sentence that names the key, its value and what was expected."""
    section = root
    for part in path[:-1]:
        section = section_of(section, part) or section
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
