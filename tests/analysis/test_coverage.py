"""Every network of timm and torchvision: planned without memory, and nearly all of its weights masked."""

import importlib.metadata
import json
import os

import pytest

import popup_surgery as ps
from popup_surgery.analysis.coverage import Row, all_names, as_json, as_markdown, look, survey
from popup_surgery.models.libraries import names
from support import ROOT

TABLE = ROOT / "docs" / "zoo.json"
SOME = {"timm/beit_base_patch16_224", "timm/resnet18", "timm/vit_tiny_patch16_224", "torchvision/maskrcnn_resnet50_fpn"}
BELOW: dict[str, str] = {}  # networks of which less than 99 % of the weights are masked, each with its reason


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """All networks, or some of each library, one after another in the order of the table."""
    names = all_names(["timm", "torchvision"])
    if request.param == "some":
        return [look(name) for name in names if name in SOME]
    return list(survey(names, min(4, os.cpu_count() or 1)))


def test_every_network_of_both_libraries_is_planned(rows: list[Row]) -> None:
    everything = len(names("timm")) + len(names("torchvision"))
    assert len(rows) in (len(SOME), everything)
    assert everything > 1000
    assert {row.name: row.refused for row in rows if row.refused} == {}


def test_all_but_a_hundredth_of_the_weights_are_masked(rows: list[Row]) -> None:
    assert {row.name for row in rows if row.of_weights < 0.99} == BELOW.keys()


def test_the_table_in_the_docs_is_true(rows: list[Row]) -> None:
    table = json.loads(TABLE.read_text())
    versions = {name: version.partition("+")[0] for name, version in table["versions"].items()}
    if versions != {name: importlib.metadata.version(name).partition("+")[0] for name in versions}:
        pytest.skip(f"the table is of {versions}, and other versions are installed")
    found = json.loads(as_json(rows, ["timm", "torchvision"]))["networks"]
    expected = [row for row in table["networks"] if row["name"] in {row.name for row in rows}]
    for row in (*found, *expected):
        row.pop("seconds")
    assert found == expected
    assert len(table["networks"]) == len(all_names(["timm", "torchvision"]))


def test_what_stands_out_is_listed_first() -> None:
    rows = [look("popup_surgery/fc"), look("popup_surgery/nothing")]
    assert rows[0].of_weights == 1
    assert "unknown architecture 'nothing'" in rows[1].refused
    text = as_markdown(rows, ["popup_surgery"])
    assert f"2 networks of popup_surgery {ps.__version__}" in text
    assert "- popup_surgery/nothing is refused: UnknownName: unknown architecture" in text
    assert "| popup_surgery/fc | 3 | 266,200 | 100.00% |" in text
