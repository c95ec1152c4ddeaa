"""Parse JSON from a stranger.

Its size is checked before it is parsed, and a text that two readers could understand differently is refused.
"""

import json
import math
import re
from typing import Any

from ..errors import ArtifactError

DEPTH = 32
DIGITS = 32
# limits that keep the values of a text within about 150 MiB; no network comes near them
LIMITS = {"objects and lists": 250_000, "commas": 500_000, "strings": 1_000_000}
# possessive quantifiers, so that no input causes backtracking; an unterminated string runs to the end of the text
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


def parse(text: str, what: str) -> Any:
    """Parse a JSON text; messages call it `what`.

    Raises:
        ArtifactError: the text is not JSON, or it has a duplicate key, a lone surrogate, a NaN or infinity, a number
            over 32 characters, more than 32 levels of nesting, or more values than any network needs.
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
    """Return the one text that the format allows for a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _bound(text: str, what: str) -> None:
    """Check nesting depth and counts before the text is parsed."""
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
                raise ArtifactError(f"{what} is nested more than {DEPTH} levels deep")
        counts[kind] += 1
        if counts[kind] > LIMITS[kind]:
            raise ArtifactError(f"{what} has more than {LIMITS[kind]:,} {kind}, more than any network needs")


def _check_characters(value: Any, what: str) -> None:
    """Refuse strings with half a surrogate pair."""
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
