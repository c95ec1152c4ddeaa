"""Text of a stranger shows in a card as it is, and means nothing there."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from popup_surgery.sharing.escape import MOST, clean, code, fence, markdown, table

RENDER = MarkdownIt("commonmark", {"html": True}).enable("table")
HOSTILE = [
    "a | b", "a || b", "`code`", "``", "<b>bold</b>", "<script>alert(1)</script>", "-->", "<!-- popup-surgery: end -->",
    "[a](javascript:alert(1))", "![a](https://example.org/a.png)", "**bold**", "_it_", "__init__", "a_b_c", "~~no~~",
    "# head", "- list", "1. list", "> quote", "\\", "\\|", "&lt;", "&#124;", "https://example.org/a", "www.example.org",
    "<https://example.org>", "me@example.org", "$$x$$", "\\\\(x\\\\)", "line\nline", "\r\n---\r\n", "\x1b[31mred",
    "\u202eevil", ":smile:", "^a^", "H~2~O", "{{ x }}", "@someone", "---", "***", "===", "+ a", "|",
    "a\\",
    "    code",
]  # fmt: skip


def text_of(tokens: list[Any]) -> str:
    """The text that a reader sees."""
    return "".join(token.content for token in tokens if token.type in ("text", "text_special", "code_inline"))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_known_tricks(hostile: str) -> None:
    check(hostile)


@given(st.text(max_size=120) | st.text(alphabet="`*_[]()<>!&#|~$\\:@-=+. \naw/hpt", max_size=60))
def test_any_text_is_only_text(text: str) -> None:
    check(text)


def check(text: str) -> None:
    for escape in (markdown, code):
        line = escape(text)
        assert "\n" not in line
        assert "<!--" not in line
        assert "-->" not in line
        for source in (f"see {line} here", f"## {line}x", f"| a | b |\n| --- | --- |\n| x{line}x | y |"):
            assert_only_text(source, text, line)


def assert_only_text(source: str, text: str, line: str) -> None:
    found = RENDER.parse(source)
    inline = [token for token in found if token.type == "inline"]
    assert len(inline) == (4 if source.startswith("|") else 1), "no cell more, no paragraph more"
    children = [child for token in inline for child in token.children or []]
    kinds = {child.type for child in children}
    html = [child.content for child in children if child.type == "html_inline"]
    assert html == (["<code>", "</code>"] if "<code>" in line else [])
    assert kinds <= {"text", "text_special", "code_inline", "html_inline"}
    shown, wanted = (re.sub(r"[\s\u2060]", "", each) for each in (text_of(children), clean(text)))
    assert wanted in shown


def test_addresses_are_not_made_into_links() -> None:
    for text in (
        "https://example.org",
        "www.example.org",
        "me@example.org",
        "HTTP://EXAMPLE.ORG",
        "mailto:me@example.org",
    ):
        shown = text_of(RENDER.parseInline(markdown(text))[0].children or [])
        assert not re.search(r"(?i)(https?|mailto):|www\.|\w@", shown)
        assert shown.replace("\u2060", "") == text


@given(st.text(max_size=1000))
def test_clean_text_is_one_short_line(text: str) -> None:
    found = clean(text)
    assert len(found) <= MOST
    assert found.isprintable()
    if len(text) <= MOST and text.isprintable():
        assert found == text


@given(st.text(alphabet="`~ \na-<>", max_size=80))
def test_a_fence_holds_any_code(text: str) -> None:
    (token,) = RENDER.parse(fence(text, "yaml"))
    assert token.type == "fence"
    assert token.content.rstrip() == text.rstrip()


def test_a_table() -> None:
    text = table([("a", markdown("b | c"))], ("", "head"))
    assert RENDER.render(text).count("<td>") == 2
