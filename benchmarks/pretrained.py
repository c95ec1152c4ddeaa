"""A mask on pretrained weights, against a linear probe and against training the whole network.

    python benchmarks/pretrained.py --cifar DIR --fashion DIR [--network timm/resnet10t] [--output pretrained.json]

A network is trained densely on CIFAR-10. From its weights it then learns Fashion-MNIST in four ways, with the same
loop, data and number of epochs: a mask with the norms frozen, a mask with the norms trained, only a new head, and all
weights. The head is new each time.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import popup_surgery as ps
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.data.seeding import ambient_seed
from popup_surgery.models.pretrained import read_weights
from popup_surgery.training.trainer import Trainer

SIZE = (3, 32, 32)


def recipe(network: str, data: dict[str, Any], surgery: Any, epochs: int, lr: float) -> dict[str, Any]:
    return {
        "model": {"name": network, "kwargs": {"num_classes": 10}},
        "surgery": surgery,
        "data": {**data, "input_size": list(SIZE), "pad": 4, "hflip": 0.5, "mean": [0.5] * 3, "std": [0.25] * 3},
        "training": {"epochs": epochs, "lr": lr, "weight_decay": 1e-4, "warmup_epochs": 1 if epochs > 1 else 0},
    }


def weights_of_features(network: str, dense: Path, folder: Path) -> Path:
    """Write the dense run's weights with a classifier of another size, so that the head counts as new."""
    from safetensors.torch import save_file

    state = read_weights(dense)
    built: Any = ps.build(network)
    head = built.default_cfg["classifier"]
    state[f"{head}.weight"] = state[f"{head}.weight"][:1].clone()
    state[f"{head}.bias"] = state[f"{head}.bias"][:1].clone()
    save_file(state, folder / "features.safetensors")
    return folder / "features.safetensors"


def probe(values: dict[str, Any], weights: Path) -> float:
    """Return the accuracy of a new head on frozen features. The running statistics adapt to the new images."""
    parsed = ps.Recipe.parse(values)
    accelerator = Accelerator()
    with ambient_seed([0]):
        model: Any = ps.build(parsed.model.name, pretrained=weights, **parsed.model.kwargs)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in model.get_classifier().parameters():
            parameter.requires_grad_(True)
        data = open_data(parsed.data, SIZE, 0, accelerator.device, quiet)
        return Trainer(model, data, parsed.training, accelerator, quiet).run(lambda epoch: None)[-1].accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True, help="folder with train/ and validation/ in it")
    parser.add_argument("--fashion", required=True, help="folder with FashionMNIST/raw in it")
    parser.add_argument("--network", default="timm/resnet10t")
    parser.add_argument("--dense-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--k", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=Path("pretrained.json"))
    arguments = parser.parse_args()
    network, epochs = arguments.network, arguments.epochs
    fashion = {"name": "torch/fashion_mnist", "root": arguments.fashion}
    results: dict[str, Any] = {}

    def note(name: str, accuracy: float, file: Path | None) -> None:
        results[name] = {"accuracy": round(accuracy, 4), "bytes": file.stat().st_size if file else None}
        print(f"{name:28} {100 * accuracy:.2f} %  {results[name]['bytes'] or 0:,} bytes", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cifar = {"name": "folder", "root": arguments.cifar}
        dense = ps.train(recipe(network, cifar, "none", arguments.dense_epochs, 0.05), output=folder / "dense")
        note("CIFAR-10, dense", dense.accuracy, dense.file)
        weights = weights_of_features(network, dense.file, folder)

        def run(name: str, surgery: Any, lr: float, pretrained: bool = True) -> None:
            values = recipe(network, fashion, surgery, epochs, lr)
            if pretrained:
                values["model"]["pretrained"] = str(weights)
            result = ps.train(values, output=folder / name.replace(" ", "-"))
            note(name, result.accuracy, result.file)
            if surgery != "none":
                base = weights if pretrained else None
                again = ps.evaluate(result.file, data_dir=arguments.fashion, base=base).accuracy
                assert again == result.accuracy, (again, result.accuracy)

        mask = {"k": arguments.k, "scaled": False}
        run("mask", {**mask, "scheme": "pretrained"}, 0.1)
        run("mask, norms trained", {**mask, "scheme": "pretrained", "norm": "train"}, 0.1)
        run("random weights, masked", {**mask, "scaled": True}, 0.1, pretrained=False)
        note("linear probe", probe(recipe(network, fashion, "none", epochs, 0.05), weights), None)
        run("all weights", "none", 0.02)
    ratio = results["mask, norms trained"]["bytes"] / results["all weights"]["bytes"]
    print(f"size of the mask with its norms over all weights: × {ratio:.4f}")
    found = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "network": network,
        "k": arguments.k,
        "epochs": {"CIFAR-10": arguments.dense_epochs, "Fashion-MNIST": epochs},
        "results": results,
        "size_over_dense": round(ratio, 4),
    }
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
