"""Benchmark of inference by `popup_surgery.bench`: PyTorch, also with packed weights, ONNX in float32, and packed ONNX.

    python benchmarks/inference.py [--rounds 5] [--threads 2] [--batches 1 8] [--fast] [--only resnet50]
        [--output inference.json]

Random subnetworks, k = 0.3. The tables appear as the networks are done; the file has their numbers as
`popup-surgery bench --json` prints them. Two rounds are enough to see the order of the ways.
"""

import argparse
import json
import tempfile
from pathlib import Path

import popup_surgery as ps
from popup_surgery.signals import interruptible

NETWORKS = ("resnet50", "convnext_tiny", "vit_base_patch16_224", "vit_large_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way with each number of inputs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--fast", action="store_true", help="measure the export with --fast too")
    parser.add_argument("--only", default="", help="measure only networks with this in their name")
    parser.add_argument("--output", type=Path, default=Path("inference.json"))
    arguments = parser.parse_args()
    results = []
    for name in NETWORKS:
        if arguments.only not in name:
            continue
        with interruptible(), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.popup.safetensors"
            ps.save(ps.convert(f"timm/{name}", 0.3), file)
            found = ps.bench(
                file,
                batches=arguments.batches,
                rounds=arguments.rounds,
                threads=arguments.threads,
                fast=arguments.fast,
            )
        print(f"{found}\n", flush=True)
        results.append(found.to_json())
        arguments.output.write_text(json.dumps({"networks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
