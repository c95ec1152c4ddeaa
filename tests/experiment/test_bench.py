"""`bench`: what it measures of each way to run a file's network, what it says where there is none, what it leaves."""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import popup_surgery as ps
from hub_server import Hub
from popup_surgery.experiment import machine
from popup_surgery.experiment.way_process import WayProcess
from support import GOLDEN, PATIENCE, Outcome, slow_except

Cli = Callable[..., Outcome]
GOLD = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"  # of the digits
WAYS = ["pytorch", "pytorch_packed", "onnx", "onnx_packed"]


def refused(outcome: Outcome, *patterns: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), outcome.err


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.slow
def test_the_digits_in_every_way(first: ps.Result, cli: Cli, temporary: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    done = cli(
        "bench",
        first.file,
        "--batch",
        3,
        "--batch",
        1,
        "--batch",
        3,
        "--rounds",
        2,
        "--threads",
        1,
        "--json",
        "-o",
        picture,
    )
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["network"], found["shape"], found["batches"]) == ("popup_surgery/conv2", [1, 8, 8], [1, 3])
    assert (found["rounds"], found["threads"], found["cores"]) == (2, 1, machine.cores())
    assert found["instructions"]
    assert set(found["versions"]) == {"torch", "onnxruntime"}
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == WAYS
    small = "none of its layers is packed (a convolution too small to gain, a product too small to gain)"
    assert ways.pop("onnx_packed")["refused"] == small
    for way in ways.values():
        assert not way["refused"]
        for batch in ("1", "3"):
            assert len(way["turns"][batch]) == 2
            assert 0 < min(way["turns"][batch]) <= way["seconds"][batch] <= max(way["turns"][batch])
    assert ways["pytorch"]["file"] == ways["pytorch_packed"]["file"] == Path(first.file).stat().st_size
    assert ways["onnx"]["file"] > ways["pytorch"]["file"]
    if sys.platform == "linux":
        assert all(0 <= way["peak"]["1"] <= way["peak"]["3"] for way in ways.values())
        assert all(way["held"] is not None for way in ways.values())
    assert ways["pytorch"]["difference"] is None
    assert ways["pytorch_packed"]["difference"] == 0
    assert 0 < ways["onnx"]["difference"] < 1e-4
    with Image.open(picture) as image:
        assert image.size > (500, 200)
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_packed_file_is_measured(tmp_path: Path) -> None:
    ps.save(ps.convert(ps.build("timm/test_resnet"), 0.3), tmp_path / "net")
    ways = {way.name: way for way in ps.bench(tmp_path / "net", batches=(1,), rounds=2, threads=1).ways}
    packed, onnx = ways["onnx_packed"], ways["onnx"]
    assert not packed.refused
    assert packed.file is not None
    assert onnx.file is not None
    assert packed.file < onnx.file
    assert packed.difference is not None
    assert 1e-4 < packed.difference < 0.25


@pytest.mark.slow
def test_ways_that_there_are_not(tmp_path: Path, cli: Cli) -> None:
    """Weights that are not ternary, an input that is not 224 pixels wide, and no file that names it."""
    net = ps.build("timm/test_resnet", in_chans=4)
    ps.save(ps.convert(net, 0.5, scheme="kaiming_normal"), tmp_path / "net")
    done = cli("bench", tmp_path / "net", "--input-size", 4, 33, 40, "--batch", 2, "--rounds", 1, "--threads", 1)
    assert (done.status, done.err) == (0, "")
    head, plain, onnx, packed, small, note, *_ = done.out.splitlines()
    assert re.split(" {2,}", head)[:3] == ["inputs", "way", "time of a pass"]
    assert re.match(r"2 +PyTorch +[\d.,]+ ms  ", plain)
    assert re.match(r"2 +ONNX, float32 +[\d.,]+ ms × [\d.]+ ", onnx)
    assert re.match(r"PyTorch, packed=True: not measured, because the values of .* are normal, not one", packed)
    assert re.match(r"ONNX, --packed: not measured, because none of its layers is packed \(.*not ternary.*\)", small)
    assert note == "timm/test_resnet, inputs of 4 × 33 × 40; medians of 1 round"


def example(**more: object) -> ps.Bench:
    """A result without a measurement."""
    ways = (
        ps.Way("pytorch", "", 7_442, 20_000_000, {1: 30_000_000, 8: 40_000_000}, {1: [0.2, 0.1, 0.9], 8: [2.0]}),
        ps.Way("pytorch_packed", "it rains"),
        ps.Way("onnx", "", 98_000, None, {1: None, 8: None}, {1: [0.01234], 8: [1.0]}, 3e-7),
    )
    given = {"load": 0.25, "cores": 2, **more}
    return ps.Bench("timm/x", (3, 2, 2), (1, 8), 3, 2, ways, "A processor", ("avx2",), versions={}, **given)  # type: ignore[arg-type]


def test_the_table() -> None:
    assert str(example()).splitlines() == [
        "inputs  way            time of a pass   peak memory    in memory      file         outputs differ by",
        "1       PyTorch        200 ms           30 MB          20 MB          7,442 bytes",
        "1       ONNX, float32  12.3 ms × 0.062  not told here  not told here  98 kB × 13   3e-05 %",
        "8       PyTorch        2,000 ms         40 MB",
        "8       ONNX, float32  1,000 ms × 0.50  not told here",
        "PyTorch, packed=True: not measured, because it rains",
        "timm/x, inputs of 3 × 2 × 2; medians of 3 rounds, in which the ways took turns",
        "A processor (avx2); 2 threads on 2 cores, load before 0.2",
    ]
    assert str(example(load=1.5)).endswith(
        "\nother processes used the cores too, so the ratios count and not the times"
    )
    assert "load before unknown" in str(example(load=None))


def test_the_picture(tmp_path: Path) -> None:
    for suffix in ("png", "svg", "pdf"):
        example().draw(tmp_path / f"bench.{suffix}")
    text = (tmp_path / "bench.svg").read_text()
    for words in ("ONNX, float32", "12.3 ms", "2,000 ms", "7,442 bytes", "not told here", "A processor"):
        assert words in text, words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch", 0), "Invalid value for .--batch."),
        (("--rounds", 0), "Invalid value for .--rounds."),
        (("--threads", -1), "Invalid value for .--threads."),
        (("-o", "bench.jpg"), r"-o is bench\.jpg; expected a name that ends in \.png or \.svg or \.pdf"),
        (("-o", "nowhere/bench.png"), r"nowhere/bench\.png cannot be written: No such file"),
        (("--input-size", 1, 0, 8), r"the input size is 1 × 0 × 8; expected three numbers from 1"),
        (("--base", "weights.safetensors"), "`base` was given, but the file's weights come from its seed"),
    ],
)
def test_bad_options(
    options: tuple[object, ...], says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("bench", GOLD, *options)
    assert outcome.status == 2
    assert re.search(says, outcome.err), outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (None, "the file does not exist"),
        (b"\x08\x0a\x12\x04ours", "an ONNX file; popup-surgery evaluate and predict take"),
        (b"words\nand more\n", "a text file"),
        (GOLD.read_bytes()[:-3], "golden"),
    ],
)
def test_bad_files(contents: bytes | None, says: str, cli: Cli, tmp_path: Path, temporary: Path) -> None:
    file = tmp_path / "golden"
    if contents is not None:
        file.write_bytes(contents)
    refused(cli("bench", file, "-o", tmp_path / "bench.png"), re.escape(str(file)), says)
    assert not (tmp_path / "bench.png").exists()
    assert not list(temporary.iterdir())


def test_a_picture_that_is_there_stays(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    picture.write_text("precious")
    refused(cli("bench", GOLD, "-o", picture), "exists already; pass --force")
    assert picture.read_text() == "precious"


@pytest.mark.parametrize(
    "wrong", [{"batches": [1, 0]}, {"batches": [True]}, {"batches": []}, {"rounds": 1.5}, {"threads": 0}]
)
def test_bad_arguments(wrong: dict[str, object]) -> None:
    with pytest.raises(ps.ConversionError, match=r"expected an integer from 1|expected numbers of inputs"):
        ps.bench(GOLD, **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_inputs_that_the_network_does_not_take(cli: Cli, temporary: Path) -> None:
    refused(cli("bench", GOLD, "--input-size", 7, 8, 8), "does not take an input of 1 × 7 × 8 × 8")
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_an_address_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/digits", {"digits.popup.safetensors": GOLD.read_bytes()})
    hub.here(monkeypatch, tmp_path / "home")
    found = ps.bench("hf://me/digits", batches=[1], rounds=1, threads=1)
    assert [way.name for way in found.measured] == [way for way in WAYS if way != "onnx_packed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["onnxruntime", "onnxscript"], ["onnxruntime"]))
def test_without_memory_for_one_way_and_packages_for_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = WayProcess.open

    def killed(self: WayProcess, file: Path, way: str, *more: object) -> object:
        if way == "pytorch_packed":
            os.kill(self._process.pid, signal.SIGKILL)
        return real(self, file, way, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(WayProcess, "open", killed)
    monkeypatch.setitem(sys.modules, name, None)
    found = ps.bench(GOLD, batches=[1], rounds=1, threads=1, fast=True)
    assert [way.name for way in found.measured] == ["pytorch"]
    assert [way.name for way in found.ways] == [*WAYS, "onnx_fast"]
    assert found.ways[1].refused == "its process was ended by signal 9, as happens where memory runs out"
    for way in found.ways[2:]:
        assert way.refused == f"the package {name} is not installed; run pip install -U 'popup-surgery[onnx]'"


def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.memory() is None or sys.platform == "linux"
    for name in ("_STATUS", "_CPUINFO", "_FORGET"):
        monkeypatch.setattr(machine, name, tmp_path / "proc" / name)
    assert machine.memory(forget=True) is None
    name, instructions = machine.processor()
    assert name
    assert instructions == (torch.backends.cpu.get_cpu_capability().lower(),)


def test_memory_that_was_used_and_returned_counts_for_the_peak() -> None:
    if (before := machine.memory(forget=True)) is None:
        pytest.skip("this system does not tell")
    with mmap.mmap(-1, 120 << 20) as block:  # other memory may be resident already, and may stay
        for _ in range(120):
            block.write(bytes(1 << 20))
    after = machine.memory()
    assert after is not None
    assert after.peak - before.peak > 100e6
    assert after.now - before.now < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_it_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, "-m", "popup_surgery", "bench", str(GOLD), "--rounds", "1000000", "--threads", "1"]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE
    while not list(folder.glob("*/onnx.npy")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, -signal.SIGINT)  # Python may end by the signal itself; a shell says 130 of both
    assert errors in ("", "interrupted\n")  # by version of typer
    assert [path.name for path in folder.iterdir() if path.name != ".ses"] == []  # that one is ONNX Runtime's own
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if _mentions(path, str(folder))]


def _mentions(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False
