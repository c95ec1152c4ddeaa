"""Which networks export to ONNX: one small network of every timm file, and if asked of every torchvision family.

    python benchmarks/exports.py [--only timm/] [--seconds 300] [--memory 6] [--again] [--folder docs]

The networks are those of tests/networks.py. Each is converted by name (k = 0.5), exported to a file of float32, run in
ONNX Runtime and compared with PyTorch, in a process of its own. The results are added to exported.json, and
exported.md shows them. What is in exported.json is not run again, unless it did not export and `--again` is given.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from torch import Tensor, nn

import popup_surgery as ps
from networks import NETS, allow_shrinking, input_shape
from popup_surgery.atomic import write_atomically
from popup_surgery.models.libraries import architecture_of
from popup_surgery.torch_compat import BatchNorm

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "timm", "torchvision")
IMPORTED = [
    "timm", "torchvision", "torch.onnx", "onnxscript.optimizer", "onnxscript.function_libs.torch_lib.ops",
    "onnxruntime", "popup_surgery.experiment.export",
]  # fmt: skip
Row = dict[str, Any]


def settle(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of images, as training does.

    With those of a new network, signals may grow from layer to layer until float32's rounding decides what comes out.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 0.9
    with torch.no_grad():
        model.train()(images)


def export(name: str) -> Row:
    """Export one network, in this process, and return its row."""
    torch.set_num_threads(1)
    allow_shrinking()
    row: Row = {"network": name, "arguments": NETS[name], "input": input_shape(name)}
    began = time.process_time()
    model = ps.convert(architecture_of(name, **NETS[name]), 0.5)
    row["parameters"] = sum(mask.numel() for mask in ps.masks(model).values())
    images = torch.randn(4, *input_shape(name), generator=torch.Generator().manual_seed(0))
    settle(model, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        try:
            done = ps.export(model, file, example=images[:1])
        except ps.ConversionError as error:
            row["refused"] = str(error)
        else:
            row |= {"difference": float(f"{done.difference:.1e}"), "file_MB": round(file.stat().st_size / 1e6, 1)}
    row["seconds"] = round(time.process_time() - began, 1)  # of the processor
    row["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000  # kB on Linux
    return row


def child(name: str, seconds: int, gigabytes: float, send: Connection) -> None:
    """Export one network within these limits, and send its row."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # processor time, however busy the machine is
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)
    gc.disable()  # the process ends soon, and tracing makes many objects
    try:
        send.send(export(name))
    except Exception as error:  # a failure is a row of the table too
        send.send({"network": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def in_process(name: str, seconds: int, gigabytes: float) -> Row:
    """Return the row of one network, exported in a process of its own within these limits."""
    context = multiprocessing.get_context("forkserver")  # its processes begin with everything imported
    context.set_forkserver_preload(IMPORTED)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, seconds, gigabytes, send))
    process.start()
    send.close()
    try:
        if not receive.poll(20 * seconds):
            return {"network": name, "failed": f"not done after {20 * seconds} seconds"}
        row: Row = receive.recv()
        process.join(60)
        return row
    except EOFError:
        process.join()
        why = "took too long" if process.exitcode == -signal.SIGXCPU else f"ended with {process.exitcode}"
        return {"network": name, "failed": f"its process {why}"}
    finally:
        process.kill()
        process.join()


def as_json(rows: list[Row], versions: dict[str, str]) -> str:
    """Return the rows as JSON, one line each."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"versions": {json.dumps(versions)},\n"networks": [\n{lines}\n]}}\n'


def as_markdown(rows: list[Row], versions: dict[str, str]) -> str:
    """Return the rows as a page."""
    using = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Which networks export to ONNX",
        "",
        "One small network of every file of timm: converted (k = 0.5), its batch norms with the statistics of four "
        "random images, [exported](exports.md) in float32, run in ONNX Runtime and compared with PyTorch, with one and "
        "with three inputs. An export that differs by more than 1e-4 of the largest output is refused. "
        f"`python benchmarks/exports.py` made this page, with {using}.",
        "",
    ]
    tried = {row["network"] for row in rows}
    for library in ("timm", "torchvision"):
        found = [row for row in rows if row["network"].startswith(f"{library}/")]
        exported = [row["difference"] for row in found if "difference" in row]
        if found:
            lines.append(
                f"- {library}: {len(exported)} of {len(found)} export; their largest difference is "
                f"{max(exported, default=0):.0e}."
            )
            missing = [name for name in NETS if name.startswith(library) and name not in tried]
            lines += [f"- Not tried yet: {', '.join(missing)}."] if missing else []
    left = [row for row in rows if "difference" not in row]
    if left:
        lines += ["", "Not exported:", ""]
        lines += [f"- {row['network']}: {_short(row.get('refused') or row['failed'])}" for row in left]
    lines += [
        "",
        "The arguments are those beyond the network's own defaults: a small image, few classes.",
        "",
        "| network | arguments | input | masked weights | file, MB | difference | seconds of one core |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        if "difference" in row:
            arguments = ", ".join(f"{key}={value}" for key, value in row["arguments"].items())
            size = " × ".join(map(str, row["input"]))
            lines.append(
                f"| {row['network']} | {arguments} | {size} | {row['parameters']:,} | {row['file_MB']:.1f} | "
                f"{row['difference']:.0e} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: dict[str, Row]) -> None:
    """Write both files, with the networks in the order of the list."""
    ordered, versions = (
        [rows[name] for name in NETS if name in rows],
        {name: metadata.version(name) for name in PACKAGES},
    )
    write_atomically(folder / "exported.json", as_json(ordered, versions).encode())
    write_atomically(folder / "exported.md", as_markdown(ordered, versions).encode())


def _short(reason: str) -> str:
    """Return a reason as text of a page, its first 250 characters."""
    reason = reason if len(reason) <= 250 else reason[:250].rsplit(" ", 1)[0] + " …"
    return "".join(f"\\{char}" if char in "<>|*_[]`" else char for char in reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["timm/"], help="run only networks with one of these in their name"
    )
    parser.add_argument("--seconds", type=int, default=300, help="limit of processor time of each network")
    parser.add_argument("--memory", type=int, default=6, help="memory limit of each network in GB")
    parser.add_argument("--again", action="store_true", help="run again what did not export")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs")
    arguments = parser.parse_args()
    file = arguments.folder / "exported.json"
    rows = {row["network"]: row for row in json.loads(file.read_text())["networks"]} if file.exists() else {}
    write(arguments.folder, rows)
    for name in NETS:
        to_do = name not in rows or (arguments.again and "difference" not in rows[name])
        if to_do and any(word in name for word in arguments.only):
            rows[name] = in_process(name, arguments.seconds, arguments.memory)
            print(" ".join(f"{value}" for key, value in rows[name].items() if key != "arguments"), flush=True)
            write(arguments.folder, rows)


if __name__ == "__main__":
    main()
