"""Text from a stranger's file, made harmless in Markdown, HTML, code fences and tables."""

import re
from typing import Any

MOST = 200  # characters of one piece of text

# Every ASCII character that Markdown, HTML, or the Hub's formulas, mentions and links may take for more than itself.
_SPECIAL = re.compile(r"[^\w\s.,%=/-]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", re.ASCII)
_PLAIN = re.compile(r"[\w./-]+", re.ASCII)
# Renderers look for addresses after they have resolved such characters. An invisible word joiner breaks those.
_LINKS = re.compile(r"(?i)www(?=\.)|(?:https?|ftp|mailto|xmpp)(?=&#58;)|(?<=\S)(?=&#64;)")


def clean(value: Any, most: int = MOST) -> str:
    """Return a value as one line of at most `most` printable characters."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(value)[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown(value: Any, most: int = MOST) -> str:
    """Return one line of Markdown, also for a cell of a table, that shows the value and means nothing else."""
    text = _SPECIAL.sub(lambda found: found[0] if found[0] > "\x7f" else f"&#{ord(found[0])};", clean(value, most))
    return _LINKS.sub("\\g<0>\u2060", text)


def code(value: Any, most: int = MOST) -> str:
    """Return the value in type of fixed width."""
    text = clean(value, most)
    return f"`{text}`" if _PLAIN.fullmatch(text) else f"<code>{markdown(text, most)}</code>"


def fence(text: str, language: str = "") -> str:
    """Return a block of code, whose fence is longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
