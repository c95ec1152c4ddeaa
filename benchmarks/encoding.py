"""How large masks are in both encodings, against the entropy limit, and how long files take to write and to load.

    python benchmarks/encoding.py [--cifar DIR] [--network timm/resnet101] [--rounds 5] [--output encoding.json]

One network with random masks at several k, then a trained mask of the digits, and of Conv4 if there are images of
CIFAR-10 (DIR/{train,validation}/<class>/). Both encodings take turns in every round. The limit is log2 C(n, kept) bits
for each layer.
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import popup_surgery as ps
from popup_surgery.codecs import CODECS

SHARES = (0.5, 0.3, 0.1, 0.03)
ENCODINGS = ("bitpack", "range_coded")


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes by the clock, and by the process's time on the processors."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - used


def limit(manifest: Any) -> float:
    """Return the bits of all masks at the entropy limit."""

    def ways(n: int, kept: int) -> float:
        return (math.lgamma(n + 1) - math.lgamma(kept + 1) - math.lgamma(n - kept + 1)) / math.log(2)

    return sum(ways(entry.numel, entry.kept) for entry in manifest.masked)


def coding(file: Path) -> dict[str, float]:
    """Return the nanoseconds a weight of the coder alone, on one thread."""
    opened, codec, spent = ps.Artifact.open(file), CODECS["range_coded"], {"encode": 0.0, "decode": 0.0}
    masks = opened.contents.masks
    for entry in opened.manifest.masked:
        bits, kept = masks[entry.name], entry.kept or 0
        began = time.process_time()
        data = codec.to_bytes(bits, entry.shape, kept)
        middle = time.process_time()
        codec.to_bits(data, entry.shape, kept)
        spent["encode"] += middle - began
        spent["decode"] += time.process_time() - middle
    return {what: round(1e9 * each / opened.manifest.weights, 2) for what, each in spent.items()}


def compare(name: str, model: torch.nn.Module | Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Return sizes, and medians of the times, of one network's file in both encodings."""
    files = {encoding: folder / encoding for encoding in ENCODINGS}
    first = folder / "first"
    if isinstance(model, Path):
        first = model
    else:
        ps.save(model, first)
    opened = ps.Artifact.open(first)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for round_ in range(rounds + 1):
        for encoding in ENCODINGS if round_ % 2 else reversed(ENCODINGS):

            def write(encoding: str = encoding) -> None:
                opened.write(files[encoding], encoding)

            for what, run in (("write", write), ("load", lambda file=files[encoding]: ps.load(file))):
                spent = seconds(run)
                if round_:  # the first round is to warm up
                    times.setdefault((encoding, what), []).append(spent)
    weights, bits = opened.manifest.weights, limit(opened.manifest)
    row: dict[str, Any] = {
        "name": name,
        "weights": weights,
        "kept": round(opened.manifest.kept / weights, 5),
        "limit_bits_a_weight": round(bits / weights, 5),
        "coder_ns_a_weight": coding(first),
    }
    for encoding, file in files.items():
        mask_bits = ps.Artifact.open(file).mask_bits or 0
        row[encoding] = {"bytes": file.stat().st_size, "bits_a_weight": round(mask_bits / weights, 5)}
        row[encoding]["over_limit"] = round(mask_bits / bits, 5) if bits else None
        for what in ("write", "load"):
            clock, processor = zip(*times[encoding, what], strict=True)
            row[encoding][f"{what}_seconds"] = round(statistics.median(clock), 4)
            row[encoding][f"{what}_processor_seconds"] = round(statistics.median(processor), 4)
    row["load_ratio"] = {
        which: round(
            statistics.median(
                coded[index] / plain[index]
                for coded, plain in zip(times["range_coded", "load"], times["bitpack", "load"], strict=True)
            ),
            3,
        )
        for index, which in enumerate(("clock", "processor"))
    }
    plain, coded = row["bitpack"], row["range_coded"]
    print(
        f"{name:24} limit {row['limit_bits_a_weight']:.4f} bits, coded {coded['bits_a_weight']:.4f}; "
        f"{plain['bytes']:,} and {coded['bytes']:,} bytes (× {coded['bytes'] / plain['bytes']:.3f}); load "
        f"{plain['load_seconds']:.3f} and {coded['load_seconds']:.3f} s (× {row['load_ratio']['clock']:.2f}, of the "
        f"processor × {row['load_ratio']['processor']:.2f}); write {plain['write_seconds']:.3f} and "
        f"{coded['write_seconds']:.3f} s",
        flush=True,
    )
    return row


def trained(recipe: str, overrides: list[str], folder: Path) -> Path:
    return ps.train(recipe, overrides=overrides, output=folder).file


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's images")
    parser.add_argument("--network", default="timm/resnet101", help="the network with random masks")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--train", type=int, default=10_000, help="images of CIFAR-10 to train on")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of Conv4")
    parser.add_argument("--output", type=Path, default=Path("encoding.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    device = f"{processor() or platform.machine()}, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def add(name: str, model: torch.nn.Module | Path) -> None:
            rows.append(compare(name, model, arguments.rounds, folder))
            load = [round(each, 1) for each in os.getloadavg()]
            found = {"device": device, "load_average": load, "torch": torch.__version__, "rounds": arguments.rounds}
            arguments.output.write_text(json.dumps(found | {"files": rows}, indent=2) + "\n")

        add("digits, trained", trained("digits", [], folder / "digits"))
        if arguments.cifar is not None:
            overrides = [
                "data.name=folder", f"data.root={arguments.cifar}", f"data.max_train={arguments.train}",
                f"training.epochs={arguments.epochs}", "data.max_validation=1000",
                "surgery.k=0.3", "surgery.scaled=true",
            ]  # fmt: skip
            add("conv4, trained", trained("cifar10/conv4", overrides, folder / "conv4"))
        for k in SHARES:
            add(f"{arguments.network}, k = {k}", ps.convert(arguments.network, k))


if __name__ == "__main__":
    main()
