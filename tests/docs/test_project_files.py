"""The files around the code say what is so: paths exist, versions agree, and a wheel has the marker for types."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from support import ROOT
from test_architecture import ROWS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_path_in_contributing_exists() -> None:
    rows = re.findall(r"^\| (?!command|I want|---)(.*) \|$", CONTRIBUTING, re.MULTILINE)
    assert len(rows) > 20
    rooms = set()
    for file, test in (row.split(" | ")[-2:] for row in rows if row.count(" | ") == 2):
        for path in re.findall(r"`([^`]+)`", file):
            outside = path.startswith(("recipes/", "docs/", "examples/", "native/", "README"))
            assert (ROOT / ("" if outside else "popup_surgery") / path).exists(), path
            rooms |= set() if outside else {path.split("/")[0]}
        for path in re.findall(r"`([^`]+)`", test):
            assert (ROOT / path).exists(), path
    named = {room for row in ROWS for room in row if (ROOT / "popup_surgery" / room).is_dir()}
    assert not named - rooms, "the table leaves out a room"
    for path in re.findall(r"\]\(([^)#]+)\)|`((?:scripts|\.ci|tests)/\w+(?:/\w+)*(?:\.py)?)`", CONTRIBUTING):
        assert (ROOT / "".join(path)).exists(), path


def test_the_one_test_that_contributing_runs_exists() -> None:
    ((file, name),) = re.findall(r"(tests/\S+\.py)::(\w+)", CONTRIBUTING)
    assert f"def {name}(" in (ROOT / file).read_text()


def test_the_scripts_run_the_tools_of_the_environment(tmp_path: Path) -> None:
    """In a copy whose `.venv` has tools that print how they were called."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "mypy", "pytest", "mkdocs"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    said = {}
    for script in (ROOT / "scripts").iterdir():
        assert os.access(script, os.X_OK), script
        copy = tmp_path / "scripts" / script.name
        copy.write_bytes(script.read_bytes())
        command = ["bash", str(copy), *([] if script.name == "check" else ["-x"])]
        said[script.name] = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True).stdout
    assert said == {
        "check": "ruff format --check .\nruff check .\nmypy\n",
        "test": "pytest -q -n 2 --dist loadfile -x\n",
        "docs": "mkdocs build --strict -x\n",
    }


def test_the_oldest_torch_is_that_of_the_project() -> None:
    bounds = dict(line.split(">=") for line in PROJECT["project"]["dependencies"])
    oldest = re.findall(r"^(\w+)==([\d.]+)\.\*$", (ROOT / ".github/oldest.txt").read_text(), re.MULTILINE)
    assert dict(oldest) == {name: bounds[name] for name in ("torch", "torchvision")}


def test_the_workflow_runs_everything_on_every_python_of_the_project() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    matrix = job["strategy"]["matrix"]
    stated = [line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert matrix["python"] == stated
    assert PROJECT["project"]["requires-python"] == f">={stated[0]}"
    assert matrix["torch"] == ["newest"]
    assert matrix["include"] == [{"python": stated[0], "torch": "oldest"}]
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_a_wheel_has_the_marker_for_types() -> None:
    assert (ROOT / "popup_surgery" / "py.typed").is_file()
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["popup_surgery"], "force-include": {"recipes": "popup_surgery/recipes"}}


def test_the_source_archive_has_what_contributing_names() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in included)
    assert {"examples", "scripts", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"} <= set(included)


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "popup_surgery/__init__.py"}
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
