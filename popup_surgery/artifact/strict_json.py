"""JSON from a stranger: bounded before it is parsed, and refused where two readers could disagree about it."""

import json
import math
import re
from typing import Any

from ..errors import ArtifactError

DEPTH = 32
DIGITS = 32
# what a text may have, so that its values stay within some 150 MiB; no network comes near
LIMITS = {"objects and lists": 250_000, "commas": 500_000, "strings": 1_000_000}
# possessive, so that no input makes it look twice; a string without an end is one to the end of the text
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


def parse(text: str, what: str) -> Any:
    """The value of a JSON text that `what` names in messages.

    Raises:
        ArtifactError: no JSON; a duplicate key, a lone surrogate, a NaN or infinity, a number over 32 characters, more
            than 32 levels, or so many values that it could only mean harm.
    """
    _bound(text, what)

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
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise ArtifactError(f"{what} has the key {key!r} twice")
                seen.add(key)
        return result

    try:
        value = json.loads(
            text, parse_int=number(int), parse_float=number(float), parse_constant=constant, object_pairs_hook=pairs
        )
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{what} is not JSON: {error.msg} at character {error.pos}") from None
    if "\\u" in text or not text.isascii():
        _check_characters(value, what)
    return value


def canonical(value: Any) -> str:
    """The one text of a JSON value that the format allows."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _bound(text: str, what: str) -> None:
    """Check depth and counts before anything is made of the text."""
    depth = 0
    counts = dict.fromkeys(LIMITS, 0)
    for token in _TOKENS.finditer(text):
        first = text[token.start()]
        if first in "]}":
            depth -= 1
            continue
        kind = "strings" if first == '"' else "commas" if first == "," else "objects and lists"
        if kind == "objects and lists":
            depth += 1
            if depth > DEPTH:
                raise ArtifactError(f"{what} is nested deeper than {DEPTH} levels")
        counts[kind] += 1
        if counts[kind] > LIMITS[kind]:
            raise ArtifactError(f"{what} has more than {LIMITS[kind]:,} {kind}, more than any network needs")


def _check_characters(value: Any, what: str) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise ArtifactError(f"{what} has half a surrogate pair; expected whole characters") from None
