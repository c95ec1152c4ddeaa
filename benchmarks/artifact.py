"""Benchmark of convert, save, load and bake, against timm building the same network and reading its dense safetensors.

    python benchmarks/artifact.py [--rounds 5] [--only resnet101] [--output benchmarks/results/artifact.json]

Every measurement takes place in its own process, which has already imported everything and built one small network.
Ours and timm's alternate. Memory is the growth of the peak resident size.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NETWORKS = ("resnet101", "vit_large_patch16_224")
SMALL = "test_resnet"


def child(what: str, name: str, folder: Path) -> None:
    """Measure one thing in this process and print it as JSON."""
    import timm
    import torch
    import torchvision  # noqa: F401  # listing the libraries' names the first time belongs to no measurement
    from safetensors.torch import save_file

    import popup_surgery as ps

    def files(network: str) -> tuple[Path, Path]:
        return folder / f"{network}.popup.safetensors", folder / f"{network}.safetensors"

    artifact, dense = files(name)
    verbs: dict[str, Callable[[], object]] = {
        "build": lambda: timm.create_model(name),
        "convert": lambda: ps.convert(f"timm/{name}"),
        "load": lambda: ps.load(artifact),
        "timm": lambda: timm.create_model(name, checkpoint_path=str(dense)),
    }
    if what == "make":
        for network in (SMALL, name):
            model = ps.convert(f"timm/{network}")
            began = time.perf_counter()
            ps.save(model, files(network)[0])
            saved = time.perf_counter()
            baked = ps.bake(model)
            seconds = {"save": saved - began, "bake": time.perf_counter() - saved}
            save_file(baked.state_dict(), files(network)[1])
        print(json.dumps(seconds))
        return
    small = files(SMALL)
    ps.load(small[0]) if what == "load" else timm.create_model(SMALL, checkpoint_path=str(small[1]))
    torch.zeros(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    kept = verbs[what]()
    seconds_taken = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del kept
    print(json.dumps({"seconds": seconds_taken, "MB": grown / 1000}))


def measure(what: str, name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, name, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare(name: str, rounds: int, folder: Path) -> dict[str, object]:
    """Return the medians of time and memory for one network, and our ratios to timm."""
    made = [measure("make", name, folder) for _ in range(rounds)]
    runs: dict[str, list[dict[str, float]]] = {"timm": [], "load": [], "build": [], "convert": []}
    for round_ in range(rounds):
        kinds = list(runs) if round_ % 2 else list(reversed(runs))
        for what in kinds:
            runs[what].append(measure(what, name, folder))
    median = {
        what: {key: statistics.median(run[key] for run in found) for key in ("seconds", "MB")}
        for what, found in runs.items()
    }
    median |= {what: {"seconds": statistics.median(run[what] for run in made)} for what in ("save", "bake")}
    sizes = {
        "artifact": (folder / f"{name}.popup.safetensors").stat().st_size,
        "dense": (folder / f"{name}.safetensors").stat().st_size,
    }
    ratios = {
        key: statistics.median(a[key] / b[key] for a, b in zip(runs["load"], runs["timm"], strict=True))
        for key in ("seconds", "MB")
    }
    print(
        f"{name:22} timm {median['timm']['seconds']:.2f} s {median['timm']['MB']:,.0f} MB  load × "
        f"{ratios['seconds']:.3f} time, × {ratios['MB']:.3f} memory; convert {median['convert']['seconds']:.2f} s "
        f"(timm's own build {median['build']['seconds']:.2f} s), save {median['save']['seconds']:.2f} s, "
        f"bake {median['bake']['seconds']:.2f} s",
        flush=True,
    )
    return {
        "network": name,
        "rounds": rounds,
        "load_over_timm": {key: round(value, 3) for key, value in ratios.items()},
        "median": {what: {key: round(v, 3) for key, v in value.items()} for what, value in median.items()},
        "bytes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--only", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("artifact.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], Path(arguments.child[2]))
        return
    import timm
    import torch

    with tempfile.TemporaryDirectory() as folder:
        results = [
            compare(name, arguments.rounds, Path(folder))
            for name in NETWORKS
            if not arguments.only or arguments.only in name
        ]
    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = {"device": device, "torch": torch.__version__, "timm": timm.__version__, "networks": results}
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
