"""The programs under examples/ run as they stand, each in a process and a working directory of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import popup_surgery as ps
from support import GOLDEN, ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, folder: Path, *arguments: object) -> str:
    """What a program prints; a warning stops it."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    # examples/ comes first on sys.path; the package under test comes from where this process has it
    path = os.pathsep.join([str(Path(ps.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b[01]\.\d{4}\b", output)]


def digests(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(recorded|rebuilt) +([0-9a-f]{64})$", output, re.MULTILINE))


def test_each_example_is_tested_and_fits_on_one_screen() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {"own_loop", "timm_pieces", "pretrained_mask", "read_without_library"}
    assert max(lengths.values()) <= 60, lengths


@pytest.mark.slow
def test_own_loop_and_the_file_that_it_leaves(tmp_path: Path) -> None:
    output = run("own_loop", tmp_path)
    live, saved = accuracies(output)
    assert live == saved > 0.95
    assert "kept      7,312 of 14,624 weights\n" in output
    file = tmp_path / "own_loop.popup.safetensors"
    manifest = ps.inspect(file)
    expected = {"recorded": manifest.weights_sha256, "rebuilt": manifest.weights_sha256}
    assert digests(run("read_without_library", tmp_path, file)) == expected


@pytest.mark.slow
def test_timm_pieces(tmp_path: Path) -> None:
    live, average, saved = accuracies(run("timm_pieces", tmp_path))
    assert average == saved > 0.9
    assert live > 0.9
    assert ps.verify(tmp_path / "timm_pieces.popup.safetensors")


@pytest.mark.slow
def test_pretrained_mask(tmp_path: Path) -> None:
    own, before, masked = accuracies(run("pretrained_mask", tmp_path))
    assert own > 0.97
    assert before < 0.5
    assert masked > 0.85
    file, base = tmp_path / "five_to_nine.popup.safetensors", tmp_path / "backbone.safetensors"
    assert ps.verify(file, base=base)
    assert file.stat().st_size < base.stat().st_size / 10


def test_read_without_library_needs_numpy_alone(tmp_path: Path) -> None:
    code = (EXAMPLES / "read_without_library.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy"}
    recorded = ps.inspect(GOLDEN / "golden.popup.safetensors").weights_sha256
    output = run("read_without_library", tmp_path)
    assert output.startswith("9 tensors\n")
    assert digests(output) == {"recorded": recorded, "rebuilt": recorded}


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "unsigned_kaiming_constant"])
def test_read_without_library_knows_every_distribution(scheme: str, tmp_path: Path) -> None:
    model = ps.convert(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)), 0.5, scheme=scheme)
    manifest = ps.save(model, tmp_path / "net.popup.safetensors")
    found = digests(run("read_without_library", tmp_path, tmp_path / "net.popup.safetensors"))
    assert found == {"recorded": manifest.weights_sha256, "rebuilt": manifest.weights_sha256}
