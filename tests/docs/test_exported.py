"""docs/exported.md: every network of the list is there, at least 90 % of timm's export, and the others say why not."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from networks import TIMM
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
    assert list(ROWS) == [f"timm/{name}" for name in TIMM]
    for row in ROWS.values():
        assert row.get("refused") or row["difference"] <= 1e-4, row


def test_at_least_90_percent_of_timms_files_export() -> None:
    assert sum("difference" in row for row in ROWS.values()) >= 0.9 * len(TIMM)


def test_the_page_shows_what_was_found(script: ModuleType) -> None:
    page = script.as_markdown(FOUND["networks"], FOUND["versions"])
    assert page == (ROOT / "docs/exported.md").read_text()
    assert script.as_json(FOUND["networks"], FOUND["versions"]) == (ROOT / "docs/exported.json").read_text()
    shown = set(re.findall(r"^(?:- |\| )(timm/\w+)", page, re.MULTILINE))
    assert shown == set(ROWS)


@pytest.mark.slow
def test_the_script_tries_again_what_did_not_export(tmp_path: Path) -> None:
    call: list[Any] = [sys.executable, ROOT / "benchmarks/exports.py", "--only", "test_resnet", "--folder", tmp_path]
    found = []
    for more in (["--seconds", "1"], [], ["--again"], ["--again", "--seconds", "1"]):
        subprocess.run([*call, *more], check=True)
        (row,) = json.loads((tmp_path / "exported.json").read_text())["networks"]
        found.append(row.get("failed", row.get("difference")))
    assert found[:2] == ["its process took too long"] * 2
    assert found[2] == found[3] <= 1e-4
    assert "test_resnet" in (tmp_path / "exported.md").read_text()
