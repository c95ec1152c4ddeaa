"""JSON from a stranger: bounded before it is parsed, and refused where two readers could disagree about it."""

import json
import math
import re
from typing import Any

from ..errors import ArtifactError

DEPTH = 32
DIGITS = 32
_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def parse(raw: bytes, what: str) -> Any:
    """The value of a JSON text that `what` names in messages.

    Raises:
        ArtifactError: no UTF-8 or JSON; a duplicate key, a lone surrogate, a NaN or infinity, a number over 32
            characters, more than 32 levels, or so many values that it could only mean harm.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{what} is not UTF-8 (byte {error.start})") from None
    _bound(_STRINGS.sub('""', text), what)

    def number(kind: type) -> Any:
        def convert(digits: str) -> Any:
            if len(digits) > DIGITS:
                raise ArtifactError(f"{what} has a number of {len(digits)} characters; expected at most {DIGITS}")
            value = kind(digits)
            if not math.isfinite(value):
                raise ArtifactError(f"{what} has the number {digits}, which is infinite; expected a finite one")
            return value

        return convert

    def constant(name: str) -> Any:
        raise ArtifactError(f"{what} has the number {name}; expected a finite one")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in result if keys.count(key) > 1)
            raise ArtifactError(f"{what} has the key {twice!r} twice")
        return result

    try:
        value = json.loads(
            text, parse_int=number(int), parse_float=number(float), parse_constant=constant, object_pairs_hook=pairs
        )
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{what} is not JSON: {error.msg} at character {error.pos}") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ArtifactError(f"{what} has half a surrogate pair; expected whole characters") from None
    return value


def canonical(value: Any) -> str:
    """The one text of a JSON value that the format allows."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _bound(structure: str, what: str) -> None:
    """Check depth and counts on the text without its strings, before anything is made of it."""
    # 600 bytes is the most that a small object, its key and its place in a list were seen to take
    counts = structure.count("{") + structure.count("["), structure.count(",")
    if counts[0] > 250_000 or counts[1] > 1_000_000:
        raise ArtifactError(
            f"{what} has {counts[0]:,} objects and lists and {counts[1]:,} commas, more than any network"
        )
    depth = 0
    for bracket in _BRACKETS.finditer(structure):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEPTH:
            raise ArtifactError(f"{what} is nested deeper than {DEPTH} levels")
