"""What a recipe key takes, in the words of an error message: `an integer from 1`."""

import json
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_ONE = {int: "an integer", float: "a number", str: "a string", type(None): "null"}
_MANY = {int: "integers", float: "numbers", str: "strings"}


def expected(field: FieldInfo) -> str:
    """Return what a key takes, with an example if the field has one."""
    example = f"; for example {shown(field.examples[0])}" if field.examples else ""
    return _one(field.annotation, field.metadata) + example


def shown(value: Any) -> str:
    """Return a value as YAML has it, cut to 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one(kind: Any, limits: Iterable[Any] = ()) -> str:
    *first, last = _choices(kind, list(limits))
    comma = "," if len(first) > 1 and get_origin(kind) is not Literal else ""
    return f"{', '.join(first)}{comma} or {last}" if first else last


def _choices(kind: Any, limits: list[Any]) -> list[str]:
    """Return what a type allows, one text for each of its members."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _choices(arguments[0], [*_limits(arguments[1:]), *limits])
    if origin in (Union, UnionType):
        return [choice for part in arguments for choice in _choices(part, limits)]
    if origin is Literal:
        return [shown(word) for word in arguments]
    if origin is list:
        count = next((f"{limit.min_length} " for limit in limits if hasattr(limit, "min_length")), "")
        return [f"a list of {count}{_many(arguments[0])}"]
    if origin is dict:
        return [f"a mapping from names to {'values' if arguments[1] is Any else _many(arguments[1])}"]
    if kind is bool:
        return ["true", "false"]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [f"a section with keys such as {_and(list(kind.model_fields)[:3])}"]
    if any(getattr(limit, "allow_inf_nan", None) is False for limit in limits) and not _range(kind, limits):
        return ["a finite number"]
    return [_ONE[kind] + _range(kind, limits)]


def _many(kind: Any) -> str:
    limits: list[Any] = []
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        limits = _limits(more)
    if get_origin(kind) is Literal:
        return f"any of {_one(kind)}"
    return _MANY[kind] + _range(kind, limits)


def _limits(metadata: Iterable[Any]) -> list[Any]:
    return [limit for each in metadata for limit in getattr(each, "metadata", [each])]


def _range(kind: Any, limits: list[Any]) -> str:
    """Return the limits of a number: ` from 1`, ` above 0 and below 1`."""
    words = {"gt": "above", "ge": "from", "le": "up to", "lt": "below"}
    found = {name: getattr(limit, name) for name in words for limit in limits if hasattr(limit, name)}
    if found.keys() == {"ge", "le"}:
        return f" from {found['ge']:,} to {found['le']:,}"
    if kind is int and found.keys() == {"ge", "lt"}:
        return f" from {found['ge']:,} to {_number(found['lt'])} - 1"
    return " and".join(f" {words[name]} {value:,}" for name, value in found.items())


def _number(value: int) -> str:
    power = value.bit_length() - 1
    return f"2**{power}" if value == 2**power else f"{value:,}"


def _and(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
