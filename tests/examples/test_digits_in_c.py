"""The digits network in C, without Python, computes what PyTorch does."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import popup_surgery as ps
from native.decoder import COMPILER, NATIVE, SANITIZERS, STRICT
from popup_surgery import Result
from support import ROOT

EXAMPLE = ROOT / "examples" / "digits_in_c"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler: cc, or what CC names")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    path = tmp_path_factory.mktemp("digits_in_c") / "digits"
    sources = [EXAMPLE / "digits.c", NATIVE / "popup.c"]
    command = [COMPILER, *STRICT, *SANITIZERS, f"-I{NATIVE}", *map(str, sources), "-lm", "-o", str(path)]
    subprocess.run(command, check=True, timeout=120)
    return path


def logits(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^\d (-?\d+\.\d+)$", output, re.MULTILINE)]


def image(path: Path) -> Tensor:
    """A PGM file as the network's input, by the page's section 4."""
    numbers = [int(word) for word in path.read_text().split()[4:]]
    return (torch.tensor(numbers, dtype=torch.float32).reshape(1, 1, 8, 8) / 255 - 0.306) / 0.376


@pytest.mark.slow
def test_outputs_are_those_of_torch(program: Path, first: Result, tmp_path: Path) -> None:
    model = ps.load(first.file).eval()
    rng = np.random.default_rng(0)
    (tmp_path / "noise.pgm").write_text("P2 8 8 255\n" + " ".join(map(str, rng.integers(0, 256, 64))))
    for path in (EXAMPLE / "seven.pgm", tmp_path / "noise.pgm"):
        command = [str(program), str(first.file), str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        with torch.no_grad():
            expected = model(image(path))[0]
        torch.testing.assert_close(torch.tensor(logits(output)), expected, rtol=1e-5, atol=1e-4)
        assert output.endswith(f"this is a {int(expected.argmax())}\n")


def test_what_it_cannot_run(program: Path, first: Result, tmp_path: Path) -> None:
    other = ROOT / "tests" / "golden" / "golden.popup.safetensors"
    (tmp_path / "broken").write_bytes(first.file.read_bytes()[:-1])
    for file, message in [(other, "features.0.weight is missing"), (tmp_path / "broken", "the data has another size")]:
        command = [str(program), str(file), str(EXAMPLE / "seven.pgm")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr
