"""A model card of an artifact: its text, its metadata, text of a stranger in it, and text of an owner beside it."""

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import nn

from hub_server import card_errors
from popup_surgery import build, convert, model_card, save
from popup_surgery.artifact import Artifact
from popup_surgery.config import Recipe
from popup_surgery.errors import ArtifactError, HubError, PopupError
from popup_surgery.sharing.card import Card, renew
from popup_surgery.sharing.metadata import to_yaml
from popup_surgery.sharing.picture import draw_picture
from popup_surgery.sharing.sanity_table import sanity_file, write_sanity
from support import GOLDEN, Outcome

TINY = GOLDEN / "finished" / "tiny" / "tiny.popup.safetensors"
PRETRAINED = GOLDEN / "artifacts" / "pretrained.popup.safetensors"
RENDER = MarkdownIt("commonmark", {"html": True}).enable("table")


def body(card: str) -> list[Any]:
    """The tokens of a card's text."""
    return RENDER.parse(ModelCard(card).text)


def fences(card: str, language: str) -> list[str]:
    return [token.content for token in body(card) if token.type == "fence" and token.info == language]


def test_what_a_card_says(tmp_path: Path) -> None:
    text = model_card(TINY, "me/masks", license="mit")
    assert not list(card_errors(ModelCard(text).data.to_dict()))
    (lines,) = fences(text, "python")
    assert lines.splitlines() == [
        "import torch, popup_surgery as ps",
        'network = ps.load("hf://me/masks/tiny.popup.safetensors")',
        "scores = network(torch.zeros(1, 1, 8, 8))",
    ]
    for said in (
        "# masks", "## tiny.popup.safetensors", "license: mit", "| seed | 0 |", "| learner | `edge_popup` |",
        "`popup_surgery/conv2` (img_size=8, in_chans=1, width=0.05)", "517 of 1,031 (50.1 %) in 5 layers",
        "| k, the share that is kept | 0.5 |",
        "signed_kaiming_constant, not scaled", "4,588 bytes; as dense float32 4,124 bytes", "| accuracy | 44.50 % |",
        "digits, validation", "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9", "](tiny.popup.png)",
    ):  # fmt: skip
        assert said in text, said
    (recipe,) = fences(text, "yaml")
    whole = Artifact.open(TINY).manifest.provenance["recipe"]
    assert Recipe.parse(yaml.safe_load(recipe)) == Recipe.parse(whole), "what is left out has its default"
    namespace: dict[str, Any] = {}
    exec(lines.replace("hf://me/masks/tiny.popup.safetensors", str(TINY)), namespace)
    assert namespace["scores"].shape == (1, 10)


def test_lines_that_need_more(tmp_path: Path) -> None:
    assert 'base="weights.safetensors"' in fences(model_card(PRETRAINED), "python")[0]
    assert "They are in no library and not in this repository" in model_card(PRETRAINED)
    save(convert(nn.Sequential(nn.Linear(4, 3)), 0.5), tmp_path / "own.popup.safetensors")
    text = model_card(tmp_path / "own.popup.safetensors")
    assert 'ps.load("own.popup.safetensors", model)' in text
    assert "`model` is your own network, a `Sequential`" in text


def test_a_sanity_table_beside_the_file_is_in_its_card(tmp_path: Path) -> None:
    file = Path(shutil.copy(TINY, tmp_path))
    manifest = Artifact.open(file).manifest
    rows = [("network", "accuracy"), ("as it is", "44.50 %"), ("mask | shuffled", "<b>9.00 %</b>")]
    write_sanity(sanity_file(file), manifest, rows, ["359 images"])
    text = model_card(file)
    assert "| as it is | 44.50 % |" in text
    assert "<b>" not in text
    shutil.copy(PRETRAINED, file)
    assert "as it is" not in model_card(file), "it is the table of another artifact"
    shutil.copy(TINY, file)
    for broken in ("", "[]", "{", '{"table": 3}', '{"table": [[]], "notes": [], "manifest_sha256": ""}'):
        sanity_file(file).write_text(broken)
        assert "as it is" not in model_card(file)


def test_a_picture_of_a_mask(tmp_path: Path) -> None:
    draw_picture(Artifact.open(TINY), tmp_path / "a.png")
    draw_picture(Artifact.open(TINY), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size < 100_000
    damaged = bytearray(TINY.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "c.safetensors").write_bytes(damaged)
    with pytest.raises(ArtifactError, match="keeps 42 weights; expected 41"):
        draw_picture(Artifact.open(tmp_path / "c.safetensors"), tmp_path / "c.png")


def test_the_command_prints_the_card_and_sends_nothing(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils.get_session", None)
    done = cli("card", TINY, "--repo", "me/masks", "--license", "apache-2.0")
    assert (done.status, done.out, done.err) == (0, model_card(TINY, "me/masks", license="apache-2.0"), "")
    for arguments, says in (
        ((TINY, "--repo", "masks"), "the repository is 'masks'; expected user/name"),
        ((TINY, "--license", "My Own"), "the license is 'My Own'; expected an identifier of the Hub's list"),
        ((GOLDEN / "artifacts" / "dense.safetensors",), "this is not a popup artifact: dense weights"),
    ):
        done = cli("card", *arguments)
        assert done.status == 2
        assert says in done.err


# text of a stranger

NAMES = [
    "a|b", "<script>alert(1)</script>", "`x`", "--> <!-- popup-surgery: end -->", "$$x$$", "[a](javascript:b)",
    "\x1b[2J", "**b**",
]  # fmt: skip
TRICKS = [
    "</code>", "<!-- popup-surgery: end -->", "\n<!-- popup-surgery: end -->\n", "```\n# heading\n```", "~~~",
    "\n---\nlicense: mit\n---\n", "\x1b[31m", "| a |", "<img src=x onerror=alert(1)>", "\u202e", "a: &x [*x]",
    "![a](https://example.org/a.png)", "x" * 5000, "<details>",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write an artifact whose provenance and names are a stranger's."""
    folder = tmp_path_factory.mktemp("hostile")
    net = nn.Sequential()
    for name in NAMES:
        net.add_module(name, nn.Linear(3, 3))
    net.__class__ = type("Net|<b>`\n", (nn.Sequential,), {})

    def write(provenance: dict[str, Any]) -> Path:
        save(convert(net, 0.5), folder / "a.popup.safetensors", provenance=provenance)
        return folder / "a.popup.safetensors"

    return write


def assert_harmless(text: str) -> None:
    """The card has the structure that this library gave it, whatever the file says."""
    assert not list(card_errors(ModelCard(text).data.to_dict()))
    card = Card.read(text)
    assert list(card.sections) == ["a.popup.safetensors"]
    assert card.after == ""
    assert text.count("<!-- popup-surgery: end -->\n") - text.count(" <!-- popup-surgery: end -->\n") == 1
    assert all(c.isprintable() or c in "\n\u2060" for c in text)
    tokens = body(text)
    headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    assert headings == ["masks", "a.popup.safetensors", "Recipe"]
    assert [token.info for token in tokens if token.type == "fence"] == ["bash", "python", "yaml"]
    assert all(token.content.startswith("<!-- popup-surgery: ") for token in tokens if token.type == "html_block")
    inline = [child for token in tokens for child in token.children or []]
    assert {child.content for child in inline if child.type == "html_inline"} <= {"<code>", "</code>"}
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/1911.13299", "https://github.com/popup-surgery/popup-surgery"]
    assert [child.attrs["src"] for child in inline if child.type == "image"] == ["a.popup.png"]


@pytest.mark.parametrize("trick", TRICKS)
def test_known_tricks(hostile: Callable[..., Path], trick: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = {
        "data": {"name": trick, "val_split": trick},
        "surgery": {"learner": trick},
        trick: [trick, {trick: trick}],
    }
    software = {"popup_surgery": trick}
    file = hostile({"accuracy": 0.5, "classes": [trick, trick + "2"], "recipe": recipe, "software": software})
    assert_harmless(model_card(file, "me/masks"))
    draw_picture(Artifact.open(file), file.with_suffix(".png"))


KEYS = st.text(max_size=8) | st.sampled_from(TRICKS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(TRICKS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, VALUES, VALUES, st.lists(VALUES, max_size=3))
def test_any_provenance(hostile: Callable[..., Path], a: Any, b: Any, c: Any, classes: Any) -> None:
    provenance = {"recipe": {"data": {"name": a, "val_split": b}, "surgery": {"learner": c}, "x": [a, b]}}
    try:
        file = hostile(provenance | {"classes": classes, "accuracy": a, "software": b})
    except (ArtifactError, UnicodeError):
        return  # what no file can say
    assert_harmless(model_card(file, "me/masks"))


# text of an owner

SECTIONS = {"a.popup.safetensors": "## a\n\nabout a\n", "sub/b--c.popup.safetensors": "## b\n\nabout b\n"}
OURS = {"library_name": "popup-surgery", "tags": ["supermask"]}


def test_a_new_card_and_its_parts() -> None:
    text = renew(None, SECTIONS, {}, OURS, name="masks")
    card = Card.read(text)
    assert card.text() == text
    assert card.sections == SECTIONS
    assert yaml.safe_load(card.yaml or "") == OURS
    assert not re.search(r"<!--(?:(?!-->).)*--(?!>)", text), "a comment has no --"


@pytest.mark.parametrize("owners", [
    "", "# Mine\n", "no line feed at the end", "---\nlicense: mit\n---\n# Mine\n\ntext\n", "---\n---\n",
    "\n\n\ntext\n\n\n", "---\r\n# ours\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\nwith\r\n",
    "---\nlicense: mit\ntags: [mine]\n---",
])  # fmt: skip
def test_text_of_the_owner_stays(owners: str) -> None:
    first = renew(owners, SECTIONS, {}, OURS, name="masks")
    text = ModelCard(owners).text if "---" in owners else owners
    assert text in first
    assert ("\r\n" in first) == ("\r\n" in owners)
    assert "\n" not in first.replace("\r\n", "") or "\r\n" not in owners
    if "license" in owners:
        assert ModelCard(first).data.get("license") == "mit"
    assert renew(first, SECTIONS, OURS, OURS, name="masks") == first, "a second push changes nothing"
    edited = first + "below the part\n"
    again = renew(edited, {"a.popup.safetensors": "## a\n\nnew\n"}, OURS, OURS, name="masks")
    assert text in again
    assert "below the part" in again
    assert "about b" not in again
    assert "new" in again


@pytest.mark.parametrize(
    "marks", ["begin", "end", "begin begin end", "end begin", "begin end end", "begin end begin end"]
)
def test_marks_that_are_broken_are_refused(marks: str) -> None:
    text = "# Mine\n\n" + "".join(f"<!-- popup-surgery: {mark} -->\ntext\n" for mark in marks.split())
    with pytest.raises(
        PopupError, match=r"me/x: README.md has of popup-surgery's marks .*; expected one begin and then one end"
    ):
        renew(text, SECTIONS, {}, OURS, name="x", what="me/x: README.md")


def test_a_license_that_is_asked_for_replaces_the_owners() -> None:
    text = f"---\n{to_yaml({'license': 'mit'})}\n---\n"
    assert ModelCard(renew(text, SECTIONS, {}, OURS, name="x")).data.get("license") == "mit"
    assert (
        ModelCard(renew(text, SECTIONS, {}, OURS, name="x", license="apache-2.0")).data.get("license") == "apache-2.0"
    )


def test_metadata_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(PopupError, match=r"README.md has metadata that is not YAML: .*; mend it first"):
        renew("---\na: [\n---\n", SECTIONS, {}, OURS, name="x")


def test_a_network_of_a_library_whose_base_is_on_the_hub(tmp_path: Path) -> None:
    """The base's tag alone is recorded here; its weights are those at hand."""
    from popup_surgery.models.architecture import Base, note_origin

    model = build("timm/resnet10t", num_classes=4)
    note_origin(model, base=Base("timm", "1.0", "resnet10t", "c3_in1k"), pretrained="c3_in1k")
    save(convert(model, 0.5, scheme="pretrained", scaled=False), tmp_path / "r.popup.safetensors")
    text = model_card(tmp_path / "r.popup.safetensors")
    data = ModelCard(text).data
    assert (data.get("base_model"), data.get("base_model_relation")) == ("timm/resnet10t.c3_in1k", "adapter")
    assert "[timm/resnet10t.c3_in1k](https://huggingface.co/timm/resnet10t.c3_in1k)" in text
    assert "whose pretrained weights stay as they were" in text
    with pytest.raises(HubError, match="the repository is 'x'"):
        model_card(tmp_path / "r.popup.safetensors", "x")
