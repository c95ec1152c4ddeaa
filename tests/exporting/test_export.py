"""`export`: what other runtimes compute is what the network computes, and anything else is not written."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import popup_surgery as ps
from networks import NETS, input_shape
from popup_surgery.exporting import onnx_file
from popup_surgery.exporting.check import check_export
from popup_surgery.models.libraries import architecture_of
from support import GOLDEN, Outcome, slow_except, write_digit

Cli = Callable[..., Outcome]
GOLD = GOLDEN / "golden.popup.safetensors"


def refused(outcome: Outcome, *patterns: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), outcome.err


@pytest.fixture(scope="module")
def onnx(first: ps.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of two epochs of digits."""
    path = tmp_path_factory.mktemp("onnx") / "digits.onnx"
    ps.export(first.file, path)
    return path


def run(path: Path, inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def test_an_onnx_file_computes_what_the_network_does(onnx: Path, first: ps.Result) -> None:
    model = ps.load(first.file)
    for count in (1, 2, 5):
        images = torch.randn(count, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(onnx, images), model(images), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_says_how_it_is_used_and_nothing_of_this_machine(onnx: Path) -> None:
    session = onnxruntime.InferenceSession(onnx)
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 1, 8, 8])
    assert (found.name, found.shape) == ("logits", ["batch", 10])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]
    preparation = json.loads(metadata["preparation"])
    assert (preparation["mode"], preparation["height"], preparation["mean"]) == ("L", 8, [0.306])
    for path in (torch.__file__, ps.__file__, str(Path.cwd())):
        assert path.encode() not in onnx.read_bytes()


def test_evaluate_and_predict_of_an_onnx_file(onnx: Path, first: ps.Result, cli: Cli, tmp_path: Path) -> None:
    assert cli("evaluate", onnx).out == cli("evaluate", first.file).out
    write_digit(tmp_path / "4.png", 4)
    assert cli("predict", onnx, tmp_path / "4.png").out == cli("predict", first.file, tmp_path / "4.png").out
    refused(cli("evaluate", onnx, "--base", first.file), "an ONNX file has all of its weights")
    refused(cli("inspect", onnx), "an ONNX file; popup-surgery evaluate and predict take")


def test_a_program_of_torch_export(first: ps.Result, tmp_path: Path) -> None:
    done = ps.export(first.file, tmp_path / "net.pt2")
    assert (done.network, done.difference) == ("popup_surgery/conv2", 0)
    program, model = torch.export.load(tmp_path / "net.pt2").module(), ps.load(first.file)
    for count in (1, 4):
        images = torch.randn(count, 1, 8, 8)
        assert torch.equal(program(images), model(images))
    assert str(Path(ps.__file__).parent).encode() not in (tmp_path / "net.pt2").read_bytes()


def test_another_suffix_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ps.ConversionError, match=r"export writes \.safetensors, \.onnx, \.pt2 files"):
        ps.export(tmp_path / "nowhere", tmp_path / "net.tflite")


class Doubled(nn.Linear):
    """A network of the user's."""

    def forward(self, x: Tensor) -> Any:
        return {"a": super().forward(x), "b": 2 * x}


def test_a_network_of_the_users_own_stays_as_it_is(tmp_path: Path) -> None:
    model = ps.convert(nn.Sequential(nn.Dropout(), Doubled(6, 3)).half(), 0.5).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ps.export(model, tmp_path / "net.onnx", example=torch.randn(2, 6))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    x = torch.randn(4, 6)
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), ps.bake(model).eval().float()(x)["a"])
    with pytest.raises(ps.ConversionError, match="does not say which inputs it takes; pass `example`"):
        ps.export(model, tmp_path / "other.onnx")


class Attends(nn.Linear):
    """Attention over tensors of `axes` axes, some of which broadcast."""

    def __init__(self, axes: int) -> None:
        super().__init__(2 * 3 * 4 * 5, 2 * 3 * 4 * 5)
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        query = (
            super().forward(x).unflatten(1, {3: (24, 5), 4: (6, 4, 5), 5: (2, 3, 4, 5), 6: (1, 2, 3, 4, 5)}[self.axes])
        )
        key = query.flip(-2) if self.axes < 5 else query[..., :1, :, :]
        mask = torch.ones(query.shape[-2], query.shape[-2]).tril().bool()  # no row is all False
        if self.axes == 5:
            mask = mask | (key[..., :1, :1] > 0)
        return F.scaled_dot_product_attention(query, key.expand(query.shape), attn_mask=mask, value=query)


class Clamps(nn.Linear):
    """Bounds of one tensor that are tensors, twice."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def __init__(self) -> None:
        super().__init__(4, 4)
        for name, value in {"a": -0.2, "b": 0.1, "c": -0.1, "d": 0.2}.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return torch.clamp(x, self.a, self.b), torch.clamp(x, self.c, self.d)


TRANSLATED = [*(Attends(axes) for axes in (3, 4, 5, 6)), Clamps()]


@pytest.mark.parametrize("model", slow_except(TRANSLATED, TRANSLATED[-2:]), ids=repr)
def test_what_the_translation_alone_gets_wrong(model: nn.Linear, tmp_path: Path) -> None:
    done = ps.export(model, tmp_path / "net.onnx", example=torch.randn(1, model.in_features))
    assert done.difference is not None
    assert done.difference <= 1e-6


class Decides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class NotFinite(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (
            Decides(4, 2),
            torch.randn(1, 4),
            r"the Decides cannot be exported: its code decides by the values of tensors",
        ),
        (NotFinite(4, 2), torch.randn(1, 4), "outputs for random inputs are not finite"),
        (nn.Linear(4, 2), torch.randn(1, 5), "the Linear does not take an input of 2 × 5"),
    ],
)
def test_a_network_that_cannot_be_exported(model: nn.Module, example: Tensor, says: str, tmp_path: Path) -> None:
    with pytest.raises(ps.ConversionError, match=says):
        ps.export(model, tmp_path / "net.onnx", example=example)
    assert not list(tmp_path.iterdir())


class Chaotic(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).tanh()
        for _ in range(400):
            y = 1 - 2 * y * y
        return y


def test_a_network_that_rounding_decides_is_told_so() -> None:
    model = Chaotic(4, 2)
    with pytest.raises(ps.ConversionError, match=r"nothing was written: .*; float32 alone changes this network's by"):
        check_export(model, lambda given: [model(given).detach() + 0.1], torch.rand(1, 4))


def test_an_export_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from popup_surgery.experiment import export as module

    real = module.to_onnx

    def wrong(program: Any, *names: Any) -> Any:
        return real(module.trace(nn.Linear(4, 2), torch.randn(1, 4)), *names)

    monkeypatch.setattr(module, "to_onnx", wrong)
    (tmp_path / "net.onnx").write_text("precious")
    model = nn.Linear(4, 2)
    with pytest.raises(
        ps.ConversionError, match=r"nothing was written: .* differ from the network's by .* allowed 0\.0001"
    ):
        ps.export(model, tmp_path / "net.onnx", example=torch.randn(1, 4))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "precious")]


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_or_old_package_is_one_sentence(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    refused(cli("export", GOLD, "-o", tmp_path / "net.onnx"), rf"the package {name} is not installed; run pip install")
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="0.4.1+cpu"))
    refused(cli("export", GOLD, "-o", tmp_path / "net.onnx"), rf"{name} is 0\.4\.1\+cpu; expected .* or newer: run pip")
    assert not list(tmp_path.iterdir())


def test_onnx_files_that_are_not_ours(onnx: Path, cli: Cli, tmp_path: Path) -> None:
    data = onnx.read_bytes()
    theirs = data.replace(onnx_file.ABOUT.encode(), b"somebody_elses_word_")
    for name, content, says in (
        ("theirs", theirs, "popup-surgery export did not write this ONNX file"),
        ("cut", data[: len(data) // 2], "this ONNX file is damaged, or cut off"),
        ("text", data.replace(b'"architecture"', b'"architectur_"'), "has no architecture"),
    ):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        refused(cli("evaluate", tmp_path / f"{name}.onnx"), re.escape(str(tmp_path / f"{name}.onnx")), says)
    (tmp_path / "words.onnx").write_text("words\nand more\n")
    refused(cli("predict", tmp_path / "words.onnx", "4.png"), "a text file")


FAMILIES = (
    "timm/test_resnet", "timm/test_vit", "timm/test_convnext", "timm/test_efficientnet", "timm/test_mambaout",
    "timm/test_nfnet", "timm/test_byobnet", "timm/regnetx_002", "timm/mobilenetv3_small_050", "timm/hiera_tiny_224",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_export(name: str, tmp_path: Path) -> None:
    model = ps.convert(architecture_of(name, **NETS[name]), 0.5)
    done = ps.export(model, tmp_path / "net.onnx", example=torch.randn(1, *input_shape(name)))
    assert done.difference is not None
    assert done.difference <= 1e-4
