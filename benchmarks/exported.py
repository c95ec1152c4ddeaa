"""Accuracy of trained networks as ONNX files: PyTorch, float32 ONNX and packed ONNX.

    python benchmarks/exported.py [--cifar10 DIR] [--epochs 3] [--width 0.5] [--output exported.json]

Trains the recipe `digits`, and with a folder of CIFAR-10 (torchvision's, or of images) `cifar10/conv4` of that width,
for that many epochs. `--file FILE` takes a trained file in place of training; `--data-dir` is its data set.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import popup_surgery as ps


def measure(file: Path, data_dir: Path | None, folder: Path) -> dict[str, Any]:
    """Export a trained file in both ways, and return its accuracies in percent, sizes in bytes and time."""
    plain, packed = folder / "plain.onnx", folder / "packed.onnx"
    ps.export(file, plain)
    done = ps.export(file, packed, packed=True, data_dir=data_dir)
    assert done.same is not None
    layers = [layer for layer in done.layers if layer.packed]
    found = {
        "file": file.name,
        "images": ps.evaluate(file, data_dir=data_dir).images,
        **{
            f"accuracy_{name}": round(100 * ps.evaluate(path, data_dir=data_dir).accuracy, 2)
            for name, path in (("pytorch", file), ("onnx", plain), ("packed", packed))
        },
        "same_class": round(100 * done.same, 2),
        "layers": f"{len(layers)} of {len(done.layers)} packed",
        "bytes_onnx": plain.stat().st_size,
        "bytes_packed": packed.stat().st_size,
        "time_of_onnx": None if done.time is None else round(done.time, 2),
    }
    print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--file", type=Path, action="append", default=[], help="a trained file; repeatable")
    parser.add_argument("--data-dir", type=Path, help="data set of the files")
    parser.add_argument("--output", type=Path, default=Path("exported.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [(file, arguments.data_dir) for file in arguments.file]
        if not files:
            files.append((ps.train("digits", output=folder / "digits").file, None))
        if arguments.cifar10 is not None:
            settings = [f"training.epochs={arguments.epochs}", f"model.kwargs.width={arguments.width}"]
            done = ps.train("cifar10/conv4", overrides=settings, output=folder / "conv4", data_dir=arguments.cifar10)
            files.append((done.file, arguments.cifar10))
        results = [measure(file, data_dir, folder) for file, data_dir in files]
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
