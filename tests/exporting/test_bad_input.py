"""Exports of hostile or unlucky users: one sentence each, at the earliest moment, and nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import popup_surgery as ps
from popup_surgery.experiment import export as exporting
from popup_surgery.exporting import needed, to_onnx
from popup_surgery.exporting.onnx_file import ABOUT
from support import GOLDEN, PATIENCE, Outcome, recipe, slow_except, write_digit, write_images

Cli = Callable[..., Outcome]
GOLD = GOLDEN / "golden.popup.safetensors"
X = torch.randn(2, 4)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An existing file, which must stay, alone in its folder."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "net.onnx"
    path.write_text("precious")
    return path


def kept(target: Path) -> bool:
    return [(file.name, file.read_text()) for file in target.parent.iterdir()] == [(target.name, "precious")]


def unused(*_: object, **__: object) -> Any:
    raise AssertionError("the long work was begun")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing, which takes long, fails the test."""
    monkeypatch.setattr(exporting, "trace", unused)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ((X, X), "a tuple of 2; expected one tensor: only networks with one input"),
        ([X], "a list of 1; expected one tensor"),
        ({"x": X}, "a dict of 1; expected one tensor"),
        (X.numpy(), "a ndarray; expected one tensor"),
        (torch.tensor(1.0), "one number, .* expected a dense tensor of at least one input"),
        (X[:0], "0 × 4, .* at least one input"),
        (X.to_sparse(), ".*sparse_coo"),
        (X.to("meta"), ".*on meta"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_examples_that_are_refused(example: Any, says: str, target: Path) -> None:
    with pytest.raises(ps.ConversionError, match=f"example is {says}"):
        ps.export(nn.Linear(4, 3), target, example=example)
    assert kept(target)


class Own(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.made, self.l = forward, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.made(self.l(x))


class Two(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y


class No(nn.Linear):
    def forward(self) -> Tensor:  # type: ignore[override]
        return super().forward(torch.ones(1, 4))


class Counts(nn.Linear):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Two(4, 3), "the Two does not take an input of 2 × 4: .*missing 1 required positional argument"),
        (No(4, 3), "the No does not take an input of 2 × 4: "),
        (Own(lambda y: "text"), "the Own returns no tensor"),
        (Own(lambda y: y.to_sparse()), "the Own returns a tensor of the layout torch.sparse_coo"),
        (Own(lambda y: y + torch.rand(())), "differ from pass to pass, because it draws random numbers or changes"),
        (Counts(), "differ from pass to pass"),
        (Own(lambda y: y / 0), "are not finite"),
        (nn.Linear(4, 3).to("meta"), "the Linear is on the meta device"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_networks_that_are_refused_before_the_work(model: nn.Module, says: str, target: Path) -> None:
    with pytest.raises(ps.ConversionError, match=says):
        ps.export(model, target, example=X)
    assert kept(target)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda y: (y, 3.5), r"the network returns 3\.5 beside its tensors"),
        (lambda y: (y, y.shape[0]), "beside its tensors; an ONNX file returns tensors only"),
        (lambda y: y.view(2, 3), "its code works for one number of inputs alone"),
        (lambda y: torch.complex(y, y), "outputs are 1 × 3 × 2, and the network's complex 1 × 3"),
    ],
)
def test_networks_that_are_refused(forward: Callable[..., Any], says: str, target: Path) -> None:
    with pytest.raises(ps.ConversionError, match=says):
        ps.export(Own(forward), target, example=X)
    assert kept(target)


class Any_(Own):
    def forward(self, *inputs: Tensor) -> Any:
        return super().forward(*inputs)


@pytest.mark.parametrize(
    ("model", "count"),
    [(Any_(lambda y: y), 1), (Own(lambda y: y.mean()), 1), (Own(lambda y: (None, {"a": y, "b": y.argmax(1)})), 2)],
)
def test_networks_that_are_unusual(
    model: nn.Module, count: int, target: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ps.export(model, target, example=X)
    assert len(onnxruntime.InferenceSession(target).get_outputs()) == count
    assert capfd.readouterr() == ("", "")


class Cache(nn.Linear):
    """Its output depends on no earlier one, but it stores it, in a buffer and in a graph."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("last", torch.zeros(3))
        self.graph = super().forward(X)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last.copy_(y[0])
        return y


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_network_keeps_its_state_and_dtype(dtype: torch.dtype, target: Path) -> None:
    model = Cache().to(dtype)
    ps.export(model, target, example=X)
    assert model.last.tolist() == [0, 0, 0]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert onnxruntime.InferenceSession(target).get_inputs()[0].type == "tensor(float)"


@pytest.mark.usefixtures("no_work")
def test_arguments_that_do_not_go_together(target: Path, cli: Cli) -> None:
    for more, says in (
        (
            {"data_dir": target.parent, "packed": True},
            "data_dir is .*; expected it only for a packed file",
        ),
        ({"base": GOLD}, "a base was given, and the network has weights of its own"),
    ):
        with pytest.raises(ps.ConversionError, match=says):
            ps.export(nn.Linear(4, 3), target, example=X, **more)
    refused(cli("export", GOLD, "-o", target, "--force", "--data-dir", "data"), "data_dir is data; expected it only")
    refused(
        cli("export", GOLD, "-o", target, "--force", "--input-size", 3, 10**6, 10**6), "expected at most .* numbers"
    )
    assert kept(target)


def refused(outcome: Outcome, *patterns: str) -> None:
    """The command said one sentence, and nothing else."""
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert outcome.err.count("\n") == 1, outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), outcome.err


@pytest.mark.slow
def test_weights_beyond_the_limit(target: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ps.bake(ps.convert(nn.Sequential(nn.Linear(384, 512), nn.Linear(512, 8)), 0.5))
    monkeypatch.setattr(to_onnx, "LARGEST", 200_000)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "trace", unused)
        with pytest.raises(ps.ConversionError, match=r"weights take .* GB, .*\.safetensors file, or a packed one$"):
            ps.export(model, target, example=torch.randn(1, 384))
    assert kept(target)
    done = ps.export(model, target, example=torch.randn(1, 384), packed=True)
    assert done.time is None
    assert target.stat().st_size < 200_000
    target.write_text("precious")
    monkeypatch.setattr(to_onnx, "LARGEST", 2000)
    with pytest.raises(ps.ConversionError, match=r"write a .pt2 or .safetensors file$"):
        ps.export(model, target, example=torch.randn(1, 384), packed=True)
    assert kept(target)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ps.Result:
    """A network of three classes, trained on a folder."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "three.yaml"
    path.write_text(json.dumps(recipe(images)))
    return ps.train(path, output=folder / "run")


@pytest.mark.slow
def test_the_folder_of_a_packed_export(
    trained: ps.Result, images: Path, target: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(target.parent.parent / "other" / "validation", ("cat", "fox"), count=1)
    bare = target.parent.parent / "bare"
    ps.save(ps.convert("timm/test_resnet", 0.5), bare)
    call = "export", trained.file, "-o", target, "--force", "--packed", "--data-dir"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "trace", unused)
        refused(
            cli(*call, target.parent.parent / "other"), "has the classes 'fox', which the network was not trained on"
        )
        refused(cli(*call, target.parent.parent / "nowhere"), "nowhere.* does not exist")
        refused(cli("export", bare, *call[2:], images), "does not say which data set it was trained on")
        refused(cli(*call, images, "--input-size", 3, 20, 20), "does not take images of 3 × 20 × 20")
    assert kept(target)
    outcome = cli(*call, images)
    assert "the same first class on" in outcome.out, outcome
    assert " of 6 validation images" in cli("evaluate", target, "--data-dir", images).out


@pytest.mark.slow
def test_an_export_for_images_of_another_size_says_so(images: Path, target: Path, cli: Cli) -> None:
    described = recipe(images, input_size=[3, 32, 32])
    described["model"] = {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}}
    (target.parent.parent / "three.yaml").write_text(json.dumps(described))
    file = ps.train(target.parent.parent / "three.yaml", output=target.parent.parent / "run").file
    assert cli("export", file, "-o", target, "--force", "--input-size", 3, 40, 48).status == 0
    assert " of 6 validation images" in cli("evaluate", target, "--data-dir", images).out
    assert cli("predict", target, next(images.rglob("*.png"))).status == 0


def graph(given: Any, returned: Any, *nodes: Any, constants: tuple[Any, ...] = ()) -> onnx.ModelProto:
    inputs = given if isinstance(given, list) else [given]
    made = helper.make_graph(list(nodes), "g", inputs, [returned], list(constants))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def value(name: str, kind: int = TensorProto.FLOAT, shape: Any = ("batch", 1, 8, 8)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, *inputs: str, out: str = "logits", **more: Any) -> Any:
    return helper.make_node(kind, list(inputs), [out], **more)


IMAGES = value("images")
ANYTHING = value("logits", shape=None)
TEN = numpy_helper.from_array(np.full((1, 10), np.nan, np.float32), "ten")
BYTES = value("logits", TensorProto.INT64, None)
SIXTEEN = value("images", TensorProto.FLOAT16), value("logits", TensorProto.FLOAT16, ("batch", 64))
GRAPHS = {
    "two inputs": (graph([IMAGES, value("more")], ANYTHING, node("Add", "images", "more")), "has 2 inputs"),
    "no input": (graph([], ANYTHING, node("Identity", "ten"), constants=(TEN,)), "has 0 inputs; expected one"),
    "another operator": (graph(IMAGES, ANYTHING, node("Evil", "images", domain="evil")), "cannot open it"),
    "integers": (graph(value("images", TensorProto.INT64), BYTES, node("Flatten", "images")), "cannot run it on an"),
    "another size": (graph(value("images", shape=("b", 3, 5, 5)), ANYTHING, node("Flatten", "images")), "Expected: 3"),
    "text": (
        graph(IMAGES, value("logits", TensorProto.STRING), node("Cast", "images", to=TensorProto.STRING)),
        "cannot run it on an input of 1 × 1 × 8 × 8",
    ),
    "maps": (graph(IMAGES, value("logits"), node("Identity", "images")), "returns a tensor of 1 × 1 × 8 × 8"),
    "one number": (graph(IMAGES, ANYTHING, node("ReduceMax", "images", keepdims=0)), "returns one number for 1 inputs"),
}


@pytest.fixture(scope="module")
def exported(first: ps.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "digits.onnx"
    ps.export(first.file, path)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    return {each.key: each.value for each in onnx.load(path).metadata_props}


def write(path: Path, model: onnx.ModelProto, metadata: dict[str, str]) -> Path:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.metadata_props[:]
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", GRAPHS)
def test_other_graphs(name: str, exported: Path, cli: Cli, tmp_path: Path) -> None:
    """With this library's metadata they are refused for what they are, and without it they are never opened."""
    model, says = GRAPHS[name]
    write_digit(tmp_path / "4.png", 4)
    path = write(tmp_path / "net.onnx", model, metadata_of(exported))
    for call in ("evaluate", path), ("predict", path, tmp_path / "4.png"):
        refused(cli(*call), says)
    write(path, model, {})
    for call in ("evaluate", path), ("predict", path, tmp_path / "4.png"):
        refused(cli(*call), "popup-surgery export did not write this ONNX file")


def test_a_constant_is_no_answer_for_each_image(exported: Path, cli: Cli, tmp_path: Path) -> None:
    nodes = node("ReduceMax", "images", out="m", keepdims=0), node("Mul", "m", "ten")
    path = write(tmp_path / "net.onnx", graph(IMAGES, ANYTHING, *nodes, constants=(TEN,)), metadata_of(exported))
    refused(cli("evaluate", path), r"net\.onnx: the ONNX graph returns 1 × 10 for \d+ inputs")
    write_digit(tmp_path / "4.png", 4)
    refused(cli("predict", path, tmp_path / "4.png"), r"the outputs of .*net\.onnx for .*4\.png are not finite")


def test_half_precision_of_somebody_else_runs(exported: Path, cli: Cli, tmp_path: Path) -> None:
    """As of a file that was converted afterwards."""
    write_digit(tmp_path / "4.png", 4)
    path = write(tmp_path / "net.onnx", graph(*SIXTEEN, node("Flatten", "images")), metadata_of(exported))
    assert cli("predict", path, tmp_path / "4.png").status == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{{{", "is not JSON"),
        ("[1]", "has no architecture or no provenance"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        ('{"architecture": {"library": 3}, "provenance": {}}', "has an architecture of"),
        ('{"architecture": {}, "architecture": {}}', "has the key 'architecture' twice"),
        ('{"a": NaN}', "has the number NaN"),
        ('"' + "x" * (17 << 20) + '"', r"its metadata has 17,\d+,\d+ bytes; expected at most 16,777,216"),
    ],
)
def test_metadata_of_strangers(text: str, says: str, exported: Path, cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", onnx.load(exported), {ABOUT: text})
    refused(cli("evaluate", path), re.escape(str(path)), says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_size": [1, 10**6, 10**6]}, r"data\.input_size is \[1, 1000000"),
        ({"input_size": [1, 9, 9]}, "does not take images of 1 × 9 × 9"),
        ({"workers": 10**9}, r"data\.workers is"),
        ({"name": "wds/evil"}, "names the remote data set wds/evil"),
    ],
)
def test_data_of_strangers(change: dict[str, Any], says: str, exported: Path, cli: Cli, tmp_path: Path) -> None:
    about = json.loads(metadata_of(exported)[ABOUT])
    about["provenance"]["recipe"]["data"] |= change
    path = write(tmp_path / "net.onnx", onnx.load(exported), {ABOUT: json.dumps(about)})
    write_digit(tmp_path / "4.png", 4)
    refused(cli("evaluate", path), says)
    refused(cli("predict", path, tmp_path / "4.png"), says)


@pytest.mark.parametrize("location", ["data.bin", "/etc/passwd", "../../../etc/passwd"])
def test_external_data(location: str, exported: Path, cli: Cli, tmp_path: Path) -> None:
    model = onnx.load(exported)
    for each in model.graph.initializer:
        if each.HasField("raw_data") and len(each.raw_data) > 1000:
            onnx.external_data_helper.set_external_data(each, location)
            each.data_location = TensorProto.EXTERNAL
            each.ClearField("raw_data")
    refused(
        cli("evaluate", write(tmp_path / "net.onnx", model, metadata_of(exported))), "net.onnx: .* cannot open it: "
    )


@pytest.mark.slow
def test_damaged_files(exported: Path, cli: Cli, tmp_path: Path) -> None:
    """Bits turned and ends cut off: an answer or one sentence, of the library's own errors."""
    data, random = exported.read_bytes(), np.random.default_rng(0)
    path, digit, refusals = tmp_path / "net.onnx", tmp_path / "4.png", 0
    write_digit(digit, 4)
    for turn in range(120):
        damaged = bytearray(data)
        for at in random.integers(0, 4000, 3):
            damaged[at if turn % 2 else -1 - at] ^= 1 << random.integers(8)
        path.write_bytes(damaged[: len(data) if turn % 3 else random.integers(len(data))])
        outcome = cli("predict", path, digit)
        assert outcome.status in (0, 2), outcome
        refusals += outcome.status == 2
        assert outcome.status == 0 or outcome.out == "", outcome
    assert refusals > 60


HIDING = """
import sys
from importlib.machinery import PathFinder
_, hidden, *calls = sys.argv
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == hidden else super().find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from popup_surgery.commands import main
for call in calls:
    sys.argv = ["popup-surgery", *call.split("|")]
    print("status", main(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", needed.OLDEST)
def test_without_a_package(name: str, first: ps.Result, exported: Path, tmp_path: Path) -> None:
    """In a process that really lacks it: other exports need none of them, and evaluate needs ONNX Runtime alone."""
    calls = [f"export|{first.file}|-o|net.{suffix}" for suffix in ("onnx", "pt2", "safetensors")]
    calls.append(f"evaluate|{exported}")
    done = subprocess.run(
        [sys.executable, "-c", HIDING, name, *calls], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    needs = name == "onnxruntime"
    assert re.findall(r"^status (\d)", done.stdout, re.M) == ["2", "0", "0", "2" if needs else "0"], done.stderr
    line = f"error: the package {name} is not installed; run pip install -U 'popup-surgery[onnx]'\n"
    assert done.stderr == line * (1 + needs)
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt2", "net.safetensors"}


def test_a_folder_that_python_takes_for_the_package(cli: Cli, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target.parent.parent / "onnx").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(target.parent.parent)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    refused(cli("export", GOLD, "-o", target, "--force"), "the package onnx is not installed, and .*/onnx is none")
    assert kept(target)


SMALL = """
from popup_surgery.exporting import packing, regions  # the digits are small, and would not be packed
packing.LEAST_WORK, regions.Regions.worth = 0, lambda self, candidates: set(candidates)
"""

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from popup_surgery.commands import main
import popup_surgery.experiment.export, onnxruntime.quantization
for call in sys.argv[1:]:
    limit, *words = call.split("|")
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    sys.argv = ["popup-surgery", *words]
    print("status", main(), flush=True)
"""


@pytest.mark.slow
def test_a_disk_that_is_full(first: ps.Result, target: Path) -> None:
    calls = [
        f"{limit}|export|{first.file}|-o|{target.with_suffix(suffix)}|--force{more}"
        for limit, suffix, more in ((4000, ".onnx", ""), (4000, ".pt2", ""), (8000, ".onnx", "|--packed"))
    ]
    temporary = target.parent.parent / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", SMALL + LIMITED, *calls],
        env=os.environ | {"TMPDIR": str(temporary)}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert re.findall(r"^status (\d)", done.stdout, re.M) == ["2", "2", "2"], done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 3, done.stderr
    assert re.search(r"net.onnx cannot be written: File too large; .*; the file that was there is unchanged", errors[0])
    assert re.search(r"net.pt2 cannot be written: File too large; [\d,]+ of [\d,]+ bytes did not fit$", errors[1])
    assert "File too large" in errors[2]
    assert kept(target)
    assert not [path for path in temporary.iterdir() if path.is_dir()]


INTERRUPTED = """
import os, signal, sys
import torch
from onnxruntime.quantization.calibrate import MinMaxCalibrater
from popup_surgery.commands import main
sys.argv = ["popup-surgery", *sys.argv[1:]]
for place, name in (
    (torch.export, "export"),
    (MinMaxCalibrater, "collect_data"),
    (os, "fsync"),
):
    real = getattr(place, name)
    def interrupted(*given, **named):
        if name != "fsync":
            real(*given, **named)
        os.kill(os.getpid(), signal.SIGINT)
    setattr(place, name, interrupted)
    print("status", main(), flush=True)
    setattr(place, name, real)
"""


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(first: ps.Result, target: Path) -> None:
    """While the network is traced, while activations are measured, and while the file is written."""
    temporary = target.parent.parent / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SMALL + INTERRUPTED, "export", first.file, "-o", target, "--force", "--packed"],
        env=os.environ | {"TMPDIR": str(temporary)}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert re.findall(r"^status (\d+)", done.stdout, re.M) == ["130"] * 3, done.stderr
    assert done.stderr == "interrupted\n" * 3
    assert kept(target)
    assert not [path for path in temporary.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_kill_leaves_the_old_file(first: ps.Result, target: Path) -> None:
    code = re.sub(r"\(torch.export.*\n|\(MinMax.*\n", "", INTERRUPTED).replace("SIGINT", "SIGKILL")
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(first.file), "-o", str(target), "--force"], timeout=PATIENCE
    )
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "precious"


@pytest.mark.parametrize("output", ["nowhere/net.onnx", "/proc/self/net.onnx", "folder.onnx", "net.onnx/net.onnx"])
@pytest.mark.usefixtures("no_work")
def test_places_that_cannot_be_written(output: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "net.onnx").write_text("precious")
    refused(cli("export", GOLD, "-o", output, "--force"), f"{output} cannot be written: ")
    with pytest.raises(ps.PopupError, match="cannot be written: embedded null byte"):
        ps.export(GOLD, "a\0b.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_except([torch.bfloat16, torch.float16, torch.float64], [torch.float64]))
def test_networks_of_other_dtypes_to_the_end(dtype: torch.dtype, first: ps.Result, tmp_path: Path, cli: Cli) -> None:
    """Their file, and its export, plain and packed, give the accuracy of the network in float32."""
    artifact = ps.Artifact.open(first.file)
    model = ps.convert(ps.build("popup_surgery/conv2", **artifact.manifest.architecture.kwargs).to(dtype), 0.5)
    ps.save(model, tmp_path / "net.popup.safetensors", provenance=dict(artifact.manifest.provenance))
    write_digit(tmp_path / "4.png", 4)
    accuracy = cli("evaluate", tmp_path / "net.popup.safetensors").out
    assert " of 359 validation images" in accuracy
    classes = cli("predict", tmp_path / "net.popup.safetensors", tmp_path / "4.png").out
    assert "4.png" in classes
    assert cli("export", tmp_path / "net.popup.safetensors", "-o", tmp_path / "net.onnx").status == 0
    assert cli("evaluate", tmp_path / "net.onnx").out == accuracy
    assert cli("predict", tmp_path / "net.onnx", tmp_path / "4.png").out == classes
    packed = cli("export", tmp_path / "net.popup.safetensors", "-o", tmp_path / "packed.onnx", "--packed")
    assert "the same first class on" in packed.out, packed
