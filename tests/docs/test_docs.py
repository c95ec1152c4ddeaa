"""The reader in docs/artifact-format.md reads what this library writes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import popup_surgery as ps
from popup_surgery import Result
from support import ROOT


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_numpy_reader_rebuilds_a_trained_network(digits_run: Result, tmp_path: Path) -> None:
    reader = tmp_path / "reader.py"
    (code,) = blocks("docs/artifact-format.md", "python")
    reader.write_text(code)
    script = f"import reader, numpy; numpy.savez('state.npz', **reader.read({str(digits_run.file)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    state = np.load(tmp_path / "state.npz")
    expected = ps.load(digits_run.file).state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def test_the_numpy_reader_needs_numpy_alone_and_40_lines() -> None:
    (code,) = blocks("docs/artifact-format.md", "python")
    imported = set(re.findall(r"^(?:import|from) (.*)", code, re.MULTILINE))
    assert imported == {"hashlib, json, math, statistics", "numpy as np"}
    lines = [
        line for line in code.split("if __name__")[0].splitlines() if line and not line.startswith(("import", "def"))
    ]
    assert len(lines) <= 41


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "unsigned_kaiming_constant"])
def test_the_numpy_reader_knows_every_distribution(scheme: str, tmp_path: Path) -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = ps.convert(net, 0.5, scheme=scheme, seed=9)
    ps.save(model, tmp_path / "net.popup.safetensors")
    (code,) = blocks("docs/artifact-format.md", "python")
    space: dict = {"__name__": "reader"}
    exec(code, space)
    state = space["read"](tmp_path / "net.popup.safetensors")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()
        assert state[name].shape == tuple(tensor.shape)
