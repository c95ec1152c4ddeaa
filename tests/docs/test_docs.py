"""The reader in docs/artifact-format.md reads what this library writes."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import popup_surgery as ps
from popup_surgery import Result
from support import ROOT


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_numpy_reader_rebuilds_a_trained_network(digits_run: Result, tmp_path: Path) -> None:
    reader = tmp_path / "reader.py"
    code, *_ = blocks("docs/artifact-format.md", "python")
    reader.write_text(code)
    script = f"import reader, numpy; numpy.savez('state.npz', **reader.read({str(digits_run.file)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    state = np.load(tmp_path / "state.npz")
    expected = ps.load(digits_run.file).state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def reader(decoders: int = 0) -> dict[str, Any]:
    """The reader of the page, with the first of the decoders that follow it."""
    space: dict[str, Any] = {"__name__": "reader"}
    for code in blocks("docs/artifact-format.md", "python")[: 1 + decoders]:
        exec(code, space)
    return space


@pytest.mark.parametrize("k", [0.5, 0.3, 0.97, 0.01, 0.999, 1e-9, 1.0])
def test_the_page_decodes_what_the_library_writes(k: float, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(37, 101), torch.nn.Linear(101, 3), torch.nn.Linear(3, 1))
    model = ps.convert(net, {"*": k, "1": 0.3}, seed=4)
    ps.save(model, tmp_path / "net", encoding="range_coded")
    with pytest.raises(ValueError, match="needs a newer reader, or for coded masks the later parts of this one"):
        reader()["read"](tmp_path / "net")
    state = reader(1)["read"](tmp_path / "net")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def test_the_page_decodes_the_vectors() -> None:
    space = reader(1)
    for vector in json.loads((ROOT / "tests/golden/range_coded.json").read_text())["vectors"]:
        n, kept = vector["n"], vector["kept"]
        if "bytes" not in vector:  # only their digest, which tests/codecs/test_range_coded.py checks
            continue
        packed = space["UNPACK"]["range_coded"](
            np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8), n, {"kept": kept}
        )
        assert hashlib.sha256(packed.tobytes()).hexdigest() == vector["mask_sha256"], vector["mask"]


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "4:8", "1:8", "7:16"])
def test_the_page_decodes_masks_of_a_pattern(pattern: str, tmp_path: Path) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 9, 3), torch.nn.ConvTranspose2d(24, 4, 2, groups=2), torch.nn.Linear(37, 11)
    )
    model = ps.convert(net, pattern=pattern, seed=4)
    ps.save(model, tmp_path / "net", encoding="pattern_coded")
    for decoders in (0, 1):
        with pytest.raises(ValueError, match="needs a newer reader, or for coded masks the later parts of this one"):
            reader(decoders)["read"](tmp_path / "net")
    state = reader(2)["read"](tmp_path / "net")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def test_the_page_decodes_the_vectors_of_patterns() -> None:
    space = reader(2)
    for vector in json.loads((ROOT / "tests/golden/pattern_coded.json").read_text())["vectors"]:
        data = np.frombuffer(bytes.fromhex(vector["bytes"]), np.uint8)
        packed = space["UNPACK"]["pattern_coded"](data, vector["n"], vector)
        assert packed.tobytes().hex() == vector["packed"]


@pytest.mark.parametrize("encoding", ["bitpack", "range_coded"])
@pytest.mark.parametrize("learner", ["edge_popup", "signed"])
def test_the_page_reads_fixed_weights(encoding: str, learner: str, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(37, 101), torch.nn.Linear(101, 3), torch.nn.Linear(3, 1))
    model = ps.convert(net, 0.3, fixed={"dropped": 0.5, "kept": 0.1}, learner=learner, seed=2**63)
    ps.save(model, tmp_path / "net", encoding=encoding)
    with pytest.raises(ValueError, match="needs a newer reader"):
        reader(3)["read"](tmp_path / "net")
    state = reader(4)["read"](tmp_path / "net")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def test_the_page_decodes_the_vectors_of_fixed_weights() -> None:
    space = reader(4)
    for vector in json.loads((ROOT / "tests/golden/fixed.json").read_text(encoding="utf-8"))["vectors"]:
        if "bitpack" in vector:  # of large ones there are digests, which tests/artifact/test_fixed_files.py checks
            data = np.frombuffer(bytes.fromhex(vector["bitpack"]), np.uint8)
            packed = space["UNPACK"]["fixed"](data, vector["n"], {**vector, "encoding": "bitpack"})
            assert packed.tobytes().hex() == vector["mask"]


@pytest.mark.parametrize("scheme", ["kaiming_normal", "xavier_uniform"])
def test_the_page_reads_signs_of_draws(scheme: str, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(37, 101), torch.nn.Embedding(5, 4), torch.nn.Linear(101, 3))
    model = ps.convert(net, 0.3, learner="biprop", scheme=scheme)
    ps.save(model, tmp_path / "net")
    with pytest.raises(ValueError, match="needs a newer reader"):
        reader(4)["read"](tmp_path / "net")
    state = reader(5)["read"](tmp_path / "net")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "name", ["range_coded", "pattern_coded", "generation", "fixed", "binary", "coded_planes", "source"]
)
def test_the_page_reads_the_golden_artifact(name: str) -> None:
    file = ROOT / f"tests/golden/{name}.popup.safetensors"
    state = reader(7)["read"](file)
    for name, tensor in ps.load(file).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()


def test_the_numpy_reader_needs_numpy_alone_and_as_many_lines_as_the_pages_say() -> None:
    code, *decoders = blocks("docs/artifact-format.md", "python")
    assert re.findall(r"^(?:import|from) (.*)", "".join(decoders), re.MULTILINE) == ["bisect"]
    imported = set(re.findall(r"^(?:import|from) (.*)", code, re.MULTILINE))
    assert imported == {"hashlib, json, math, statistics", "numpy as np"}
    lines = len([line for line in code.splitlines() if line.strip()])
    assert lines <= 80
    for page in ("README.md", "docs/artifact-format.md", "docs/tutorials/share.md"):
        assert re.findall(r"reader (?:of|in) (\d+) lines", (ROOT / page).read_text()) == [str(lines)], page


def test_the_numpy_reader_reads_masks_on_pretrained_weights(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    base = {name: tensor.clone().numpy() for name, tensor in plain.state_dict().items()}
    model = ps.convert(plain, 0.5, scheme={"*": "pretrained", "2": "kaiming_normal"}, norm="train")
    ps.save(model, tmp_path / "net")
    read = reader()["read"]
    state = read(tmp_path / "net", base)
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()
    with pytest.raises(ValueError, match="the masks are for weights of custom/Sequential; pass them as base"):
        read(tmp_path / "net")
    with pytest.raises(ValueError, match="the masks are for other weights than those of the base"):
        read(tmp_path / "net", {**base, "0.weight": base["0.weight"] + 1})
    example = [sys.executable, str(ROOT / "examples" / "read_without_library.py"), str(tmp_path / "net")]
    told = subprocess.run(example, capture_output=True, text=True)
    assert told.returncode == 1
    assert re.fullmatch(r"\S+ has masks for pretrained weights; docs/artifact-format\.md has .*\n", told.stderr)


def test_the_numpy_reader_says_what_it_cannot_read(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    net(torch.randn(8, 5).bfloat16())
    ps.save(ps.convert(net, 0.5), tmp_path / "net")
    with pytest.raises(ValueError, match="NumPy has no BF16"):
        reader()["read"](tmp_path / "net")


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "unsigned_kaiming_constant"])
def test_the_numpy_reader_knows_every_distribution(scheme: str, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = ps.convert(net, 0.5, scheme=scheme, seed=9)
    ps.save(model, tmp_path / "net.popup.safetensors")
    state = reader()["read"](tmp_path / "net.popup.safetensors")
    for name, tensor in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == tensor.numpy().tobytes()
        assert state[name].shape == tuple(tensor.shape)
