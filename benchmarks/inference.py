"""Benchmark of inference: PyTorch, ONNX in float32, packed ONNX at 2 bits, and packed ONNX as int8 (`--fast`).

    python benchmarks/inference.py [--rounds 7] [--threads 2] [--only resnet50] [--output inference.json]

The ways take turns in one process; the figures are medians. Memory is the growth of a new process's peak resident size
from opening the file to the end of one pass, after all imports, which only Linux tells. Random subnetworks, k = 0.3.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NETWORKS = ("vit_base_patch16_224", "vit_large_patch16_224", "resnet50", "convnext_tiny")
WAYS = ("onnx", "packed", "fast")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def peak() -> float:
    """Return this process's largest resident size so far, in MB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1000


def child(way: str, file: str, batch: int, threads: int) -> None:
    """Open a file, run it once, and print by how much memory grew."""
    import torch

    import popup_surgery as ps
    from popup_surgery.exporting.needed import needed
    from popup_surgery.exporting.onnx_file import OnnxNetwork

    needed("onnxruntime")
    torch.set_num_threads(threads)
    images = torch.zeros(batch, 3, 224, 224)
    ps.build("timm/test_resnet")
    before = peak()
    model = ps.load(file) if way == "pytorch" else OnnxNetwork(file)
    with torch.inference_mode():
        model(images)
    print(peak() - before)


def measure(name: str, batches: list[int], rounds: int, threads: int, folder: Path) -> dict[str, object]:
    """Return time, memory and bytes of each way for one network."""
    import torch

    import popup_surgery as ps
    from popup_surgery.exporting.onnx_file import OnnxNetwork

    artifact = folder / f"{name}.popup.safetensors"
    ps.save(ps.convert(f"timm/{name}", 0.3), artifact)
    files = {"pytorch": artifact}
    models: dict[str, torch.nn.Module] = {"pytorch": ps.load(artifact)}
    found: dict[str, dict[str, float]] = {"pytorch": {"file_MB": artifact.stat().st_size / 1e6}}
    for way in WAYS:
        files[way] = folder / f"{name}.{way}.onnx"
        done = ps.export(artifact, files[way], packed=way == "packed", fast=way == "fast")
        models[way] = OnnxNetwork(str(files[way]))
        found[way] = {"file_MB": files[way].stat().st_size / 1e6, "difference": done.difference or 0.0}
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224)
        times: dict[str, list[float]] = {way: [] for way in models}
        with torch.inference_mode():
            for round_ in range(rounds + 1):  # the first warms up
                for way in list(models) if round_ % 2 else list(reversed(models)):
                    began = time.perf_counter()
                    models[way](images)
                    times[way].append(time.perf_counter() - began)
        for way, taken in times.items():
            found[way][f"ms_batch_{batch}"] = 1000 * statistics.median(taken[1:])
    for way, file in files.items():
        command = [sys.executable, __file__, "--child", way, str(file), str(batches[0]), str(threads)]
        grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[way]["peak_MB"] = float(grown.split()[-1])
    for way in found:
        values = {key: float(f"{value:.3g}") for key, value in found[way].items()}
        found[way] = values
        print(f"{name:22} {way:8} " + "  ".join(f"{key} {value:g}" for key, value in values.items()), flush=True)
    return {"network": name, "ways": found}


def processor() -> str:
    """Return the processor's name and the instructions that matter."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", text) or [platform.processor()]
    flags = set(re.findall(r"\w+", "".join(re.findall(r"flags\s*:(.*)", text)[:1])))
    return f"{names[0]}: {', '.join(each for each in INSTRUCTIONS if each in flags)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("inference.json"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, file, batch, threads = arguments.child
        child(way, file, int(batch), int(threads))
        return
    import onnxruntime
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, arguments.batches, arguments.rounds, arguments.threads, Path(folder))
            for name in NETWORKS
            if not arguments.only or arguments.only in name
        ]
    found = {
        "processor": processor(),
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "networks": results,
    }
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
