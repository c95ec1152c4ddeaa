"""Packed exports: the weights stay exact, everything that stays in float32 has its reason, and the classes stay."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import popup_surgery as ps
from popup_surgery.config.schema import Data
from popup_surgery.data.in_memory import InMemory
from popup_surgery.experiment.packed import _calibration
from popup_surgery.exporting import packing
from popup_surgery.exporting.packing import block_of, eight_bits, ternary, two_bits
from popup_surgery.exporting.regions import Regions
from support import Outcome, slow_except

Cli = Callable[..., Outcome]


def some_ternary(inner: int, outputs: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    signs = generator.integers(-1, 2, (inner, outputs)).astype(np.float32)
    return signs * generator.random(outputs, np.float32)


@pytest.mark.parametrize(("inner", "block"), [(384, 128), (512, 128), (640, 128), (704, 64)])
def test_two_bits_are_the_weights_to_the_bit(inner: int, block: int) -> None:
    matrix = some_ternary(inner, 5)
    matrix[:, 3] = 0
    assert block_of(inner) == block
    scale = ternary(matrix)
    assert scale is not None
    codes, scales, zeros = two_bits(matrix, scale, block)
    assert (codes.shape, scales.shape, zeros.shape) == (
        (5, inner // block, block // 4), (5, inner // block), (5, -(-(inner // block) // 4)),
    )  # fmt: skip
    four = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(5, inner // block, block)
    back = (four.astype(np.float32) - 1) * scales[..., None]
    assert np.array_equal(back.reshape(5, inner).T, matrix)
    assert set(zeros.reshape(-1)) == {0b01010101}


def test_what_is_ternary() -> None:
    matrix = some_ternary(64, 3)
    scale = ternary(matrix)
    assert scale is not None
    assert np.array_equal(scale, np.abs(matrix).max(axis=0))
    matrix[5, 1] = np.nextafter(np.abs(matrix[:, 1]).max(), np.float32(1))
    assert ternary(matrix) is None
    codes, step = eight_bits(matrix, None)
    assert np.abs(codes * step - matrix).max() <= step.max() / 2
    assert np.abs(codes).max() == 64


@pytest.mark.parametrize("inner", [100, 320, 448])
def test_inner_sizes_that_are_slow_at_two_bits(inner: int) -> None:
    assert block_of(inner) is None


class Mixed(nn.Sequential):
    """Products and convolutions of all kinds, on 12 × 12 pixels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, padding=1, groups=64),
            nn.Conv2d(64, 12, 1), nn.Flatten(),
            nn.Linear(768, 160), nn.ReLU(), nn.Linear(160, 640), nn.ReLU(), nn.Linear(640, 160), nn.ReLU(),
            nn.Linear(160, 7), nn.ReLU(), nn.Linear(7, 5),
        )  # fmt: skip


@pytest.fixture
def mixed() -> nn.Sequential:
    model = ps.bake(ps.convert(Mixed(), 0.5)).eval()
    assert isinstance(model, Mixed)
    return model


def test_each_layer_is_packed_or_has_a_reason(mixed: nn.Sequential, tmp_path: Path) -> None:
    with torch.no_grad():
        mixed.get_parameter("10.weight").add_(torch.rand(160, 640))  # as pretrained weights
    example = torch.randn(2, 3, 12, 12)
    done = ps.export(mixed, tmp_path / "net.onnx", example=example, packed=True)
    assert {layer.name: (layer.how, layer.packed) for layer in done.layers} == {
        "0": ("int8, activations too", True),
        "2": ("int8, activations too", True),
        "3": ("a grouped convolution", False),
        "4": ("a convolution too small to gain", False),
        "6": ("2 bits", True),
        "8": ("int8", True),
        "10": ("not ternary", False),
        "12": ("a product too small to gain", False),
        "14": ("an inner size below 32", False),
    }
    (bits,) = [layer for layer in done.layers if layer.name == "6"]
    assert bits.before == 768 * 160 * 4
    assert bits.after < 0.1 * bits.before
    assert done.time is not None
    assert done.difference is not None
    assert 1e-4 < done.difference < 0.1
    weights = {each.name: each for each in onnx.load(tmp_path / "net.onnx").graph.initializer}
    kept = mixed.get_parameter("10.weight").detach().numpy()
    assert np.array_equal(numpy_helper.to_array(weights["10.weight"]), kept)


@pytest.mark.slow
def test_options_of_packing(mixed: nn.Sequential, tmp_path: Path) -> None:
    with torch.no_grad():
        mixed.get_parameter("10.weight").add_(torch.rand(160, 640))
    example = torch.randn(2, 3, 12, 12)
    fast = ps.export(mixed, tmp_path / "fast.onnx", example=example, fast=True)
    assert [layer.how for layer in fast.layers if layer.name in "68"] == ["int8", "int8"]
    rounded = ps.export(mixed, tmp_path / "fast.onnx", example=example, rounded=True)
    assert [layer.packed for layer in rounded.layers if layer.name in ("3", "10")] == [False, True]


def test_a_packed_file_takes_any_number_of_inputs(mixed: nn.Sequential, tmp_path: Path) -> None:
    ps.export(mixed, tmp_path / "net.onnx", example=torch.randn(1, 3, 12, 12), packed=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for count in (1, 2, 9):
        images = torch.randn(count, 3, 12, 12)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = mixed(images).detach()
        assert (torch.from_numpy(found) - expected).abs().max() < 0.2 * expected.abs().max()


def test_only_onnx_files_are_packed(cli: Cli, artifact: Path) -> None:
    outcome = cli("export", artifact, "-o", "net.pt2", "--packed")
    assert (outcome.status, outcome.err) == (2, "error: only .onnx files are packed; the path is net.pt2\n")


@pytest.mark.slow
def test_a_network_of_small_layers_stays_as_it_is(cli: Cli, artifact: Path) -> None:
    outcome = cli("export", artifact, "-o", "packed.onnx", "--packed")
    assert "too small to gain" in outcome.out
    assert "takes 1.00 × the time of the float32 file" in outcome.out
    assert "same first class on 100.00 %" in outcome.out
    cli("export", artifact, "-o", "plain.onnx")
    assert Path("packed.onnx").read_bytes() == Path("plain.onnx").read_bytes()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack small layers too."""
    monkeypatch.setattr(packing, "LEAST_WORK", 0)
    monkeypatch.setattr(Regions, "worth", lambda self, candidates: set(candidates))


@pytest.mark.slow
@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("how", slow_except(["--packed", "--fast"], ["--packed"]))
def test_digits_keep_their_classes(how: str, cli: Cli, artifact: Path) -> None:
    """The trained digits: at most 0.3 points lost, and the same first class on 99 % of the images."""
    outcome = cli("export", artifact, "-o", "net.onnx", how)
    assert outcome.status == 0, outcome.err
    found = re.search(
        r"accuracy ([\d.]+) %, of the network ([\d.]+) %; the same first class on ([\d.]+) %", outcome.out
    )
    assert found is not None, outcome.out
    packed, plain, same = map(float, found.groups())
    assert packed >= plain - 0.3
    assert same >= 99
    assert cli("evaluate", "net.onnx").out.startswith(f"{packed:.2f} % of 359")
    assert Path("net.onnx").stat().st_size < 40_000


def test_activations_have_the_ranges_of_all_classes() -> None:
    """A folder has one class after the other."""
    labels = torch.arange(10).repeat_interleave(40)
    images = labels.byte()[:, None, None, None].expand(-1, 1, 8, 8)
    splits = {"train": (images, labels), "validation": (images, labels)}
    data = InMemory(Data(batch_size=24), (1, 8, 8), 0, torch.device("cpu"), splits, list("0123456789"))
    shown = torch.cat(list(_calibration(torch.empty(0), data)))
    assert len(shown) == 32
    assert len(shown[:, 0, 0, 0].unique()) == 10


@pytest.mark.slow
def test_a_packed_file_is_the_same_each_time(mixed: nn.Sequential, tmp_path: Path) -> None:
    example = torch.randn(1, 3, 12, 12)
    for name in ("a.onnx", "b.onnx"):
        ps.export(mixed, tmp_path / name, example=example, packed=True)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
