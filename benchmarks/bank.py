"""Benchmark of a bank of masks against as many loaded networks: memory, switching, and a mixed batch.

    python benchmarks/bank.py [--rounds 15] [--only resnet50] [--output benchmarks/results/bank-cpu.json]

The masks are random, on random weights: of a normal distribution, which the bank holds as numbers, as it does
pretrained weights; and signed constants, of which it holds the signs. Every count of tasks is measured in a process of
its own. Memory is the growth of the resident size. A switch is compared with copying every tensor of the network once;
the two alternate, in one process.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

NETWORKS = ("resnet50", "vit_base_patch16_224")
SCHEMES = ("kaiming_normal", "signed_kaiming_constant")
TASKS = (1, 5, 20)
IMAGES = 20


def make(name: str, scheme: str, folder: Path) -> None:
    """Write a file of random masks for each task."""
    import numpy as np

    import popup_surgery as ps

    ps.save(ps.convert(f"timm/{name}", 0.5, scheme=scheme), folder / "first")
    first = ps.Artifact.open(folder / "first")
    generator = np.random.default_rng(0)
    for i in range(max(TASKS)):
        masks = {}
        for entry in first.manifest.masked:
            masks[entry.name] = generator.integers(0, 256, -(-entry.numel // 8), np.uint8)
            masks[entry.name][-1] &= 0xFF >> -entry.numel % 8
        ps.Artifact.of(first.manifest, masks, first.contents.stored).write(folder / f"{i}.popup.safetensors")


def files(folder: Path, count: int) -> list[Path]:
    return [folder / f"{i}.popup.safetensors" for i in range(count)]


def resident() -> int:
    """Return the resident memory of this process in bytes, after what is free in it was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def hold(what: str, folder: Path, count: int) -> dict[str, float]:
    """Measure a bank of `count` tasks, or as many networks: memory, and a mixed batch."""
    import torch

    import popup_surgery as ps

    images = torch.randn(IMAGES, 3, 224, 224)
    with torch.no_grad():
        ps.load(folder / "0.popup.safetensors")(images[:1])  # import everything
    tasks = [str(i % count) for i in range(IMAGES)]
    before = resident()
    if what == "bank":
        bank = ps.MaskBank(folder / "0.popup.safetensors")
        for i, file in enumerate(files(folder, count)):
            bank.add(str(i), file)
            bank.use(str(i))
        grown = resident() - before

        def batch() -> object:
            return bank.predict(images, tasks)
    else:
        networks = {str(i): ps.load(file) for i, file in enumerate(files(folder, count))}
        grown = resident() - before

        def batch() -> object:
            with torch.no_grad():
                return [networks[name](images[[i for i, t in enumerate(tasks) if t == name]]) for name in networks]

    began = time.perf_counter()
    batch()
    return {"MB": grown / 1e6, "batch_seconds": time.perf_counter() - began}


def switch(folder: Path, rounds: int) -> dict[str, float]:
    """Measure a switch, and a copy of all tensors of the network."""
    import torch

    import popup_surgery as ps

    bank = ps.MaskBank(folder / "0.popup.safetensors")
    for i, file in enumerate(files(folder, 2)):
        bank.add(str(i), file)
    tensors = list(bank.network.state_dict().values())
    others = [tensor.clone() for tensor in tensors]
    names: Iterator[str] = cycle(bank.names)

    def copy() -> None:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)

    times: dict[str, list[float]] = {"switch": [], "copy": []}
    work: dict[str, Callable[[], object]] = {"switch": lambda: bank.use(next(names)), "copy": copy}
    with torch.no_grad():
        for round_ in range(rounds + 2):
            for what in work if round_ % 2 else reversed(work):
                began = time.perf_counter()
                work[what]()
                if round_ > 1:
                    times[what].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["switch"], times["copy"], strict=True)]
    return {
        "switch_seconds": statistics.median(times["switch"]),
        "copy_seconds": statistics.median(times["copy"]),
        "ratio": statistics.median(ratios),
        "ratio_of_fastest": min(times["switch"]) / min(times["copy"]),
    }


def child(*arguments: object) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, scheme: str, rounds: int) -> dict[str, object]:
    """Measure one network on weights of one scheme."""
    with tempfile.TemporaryDirectory() as temporary:
        child("make", name, scheme, temporary)
        found: dict[str, object] = {"network": name, "scheme": scheme, "switch": child("switch", temporary, rounds)}
        print(name, scheme, found["switch"], flush=True)
        tasks = {}
        for count in TASKS:
            bank, networks = (child("hold", what, temporary, count) for what in ("bank", "networks"))
            ratios = {key: round(bank[key] / networks[key], 3) for key in bank}
            tasks[count] = {"bank": bank, "networks": networks, "ratio": ratios}
            print(
                f"  {count:2} tasks: {bank['MB']:,.0f} MB, networks {networks['MB']:,.0f} MB (× {ratios['MB']}); "
                f"a mixed batch of {IMAGES} {bank['batch_seconds']:.2f} s, networks {networks['batch_seconds']:.2f} s "
                f"(× {ratios['batch_seconds']})",
                flush=True,
            )
        return found | {"tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="switches measured")
    parser.add_argument("--only", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("bank.json"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *rest = arguments.child
        if what == "make":
            make(rest[0], rest[1], Path(rest[2]))
            print("{}")
        elif what == "switch":
            print(json.dumps(switch(Path(rest[0]), int(rest[1]))))
        else:
            print(json.dumps(hold(rest[0], Path(rest[1]), int(rest[2]))))
        return
    import timm
    import torch

    results = [
        measure(name, scheme, arguments.rounds)
        for name in NETWORKS
        if not arguments.only or arguments.only in name
        for scheme in SCHEMES
    ]
    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = {"device": device, "torch": torch.__version__, "timm": timm.__version__, "networks": results}
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
