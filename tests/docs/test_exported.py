"""docs/exported.md: every network of the list is there, at least 90 % of timm's export, and the others say why not."""

import importlib.util
import json
import re
from types import ModuleType
from typing import Any

import pytest

from networks import NETS, TIMM
from support import ROOT

FOUND = json.loads((ROOT / "docs/exported.json").read_text())
ROWS: dict[str, dict[str, Any]] = {row["network"]: row for row in FOUND["networks"]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exports", ROOT / "benchmarks/exports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_network_exports_or_is_refused_for_a_reason() -> None:
    assert list(ROWS) == list(NETS)
    for row in ROWS.values():
        assert row.get("refused") or row["difference"] <= 1e-4, row


def test_at_least_90_percent_of_timms_files_export() -> None:
    exported = [name for name in TIMM if "difference" in ROWS[f"timm/{name}"]]
    assert len(exported) >= 0.9 * len(TIMM)


def test_the_page_shows_what_was_found(script: ModuleType) -> None:
    page = script.as_markdown(FOUND["networks"], FOUND["versions"])
    assert page == (ROOT / "docs/exported.md").read_text()
    assert script.as_json(FOUND["networks"], FOUND["versions"]) == (ROOT / "docs/exported.json").read_text()
    shown = set(re.findall(r"^(?:- |\| )((?:timm|torchvision)/\w+)", page, re.MULTILINE))
    assert shown == set(NETS)


def test_a_network_in_a_process_of_its_own(script: ModuleType) -> None:
    row = script.in_process("timm/test_resnet", 300, 6)
    assert row["difference"] <= 1e-4
    assert (row["input"], row["arguments"]) == ([3, 64, 64], {"num_classes": 10})
    assert "its process took too long" in script.in_process("timm/test_resnet", 1, 6)["failed"]
    assert "UnknownName" in script.in_process("timm/unheard_of", 300, 6)["failed"]
