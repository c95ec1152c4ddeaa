"""A mask on pretrained weights, against a linear probe and against training the whole network.

    python benchmarks/pretrained.py --cifar DIR [--network timm/resnet10t] [--output pretrained.json]

A network is trained densely on six classes of CIFAR-10. From its weights it then learns the other four from few images,
in several ways, with the same loop, data and number of epochs: `piggyback`, with the norms frozen and trained; a mask
of edge-popup at k, with the norms frozen and trained; only a new head; and all weights. A mask of edge-popup on random
weights stands beside them. The head is new each time. Each way is run with several seeds: accuracies are means, beside
those of each seed. With `--fashion DIR`, the base is all of CIFAR-10, and the task is Fashion-MNIST.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import fmean
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
SGD = {"weight_decay": 1e-4}
ADAM = {"optimizer": "adam"}  # weight decay would pull the scores below the threshold


def recipe(network: str, data: dict[str, Any], classes: int, surgery: Any, **training: Any) -> dict[str, Any]:
    return {
        "model": {"name": network, "kwargs": {"num_classes": classes}},
        "surgery": surgery,
        "data": {**data, "input_size": list(SIZE), "pad": 4, "hflip": 0.5, "mean": [0.5] * 3, "std": [0.25] * 3},
        "training": {"warmup_epochs": 1 if training["epochs"] > 1 else 0, **training},
    }


def split(cifar: Path, folder: Path) -> tuple[Path, Path]:
    """Return two folders in `folder`: with the first six classes of CIFAR-10, and with the other four."""
    for part in ("train", "validation"):
        for number, images in enumerate(sorted((cifar / part).iterdir())):
            link = folder / ("base" if number < 6 else "task") / part / images.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(images.absolute())
    return folder / "base", folder / "task"


def weights_of_features(network: str, dense: Path, folder: Path) -> Path:
    """Write the dense run's weights with a classifier of another size, so that the head counts as new."""
    from safetensors.torch import save_file

    state = read_weights(dense)
    built: Any = ps.build(network, num_classes=1)
    head = built.default_cfg["classifier"]
    state[f"{head}.weight"] = state[f"{head}.weight"][:1].clone()
    state[f"{head}.bias"] = state[f"{head}.bias"][:1].clone()
    save_file(state, folder / "features.safetensors")
    return folder / "features.safetensors"


def sizes(file: Path) -> dict[str, int]:
    """Return the bytes of a file, by the encoding of its masks."""
    if not file.name.endswith(".popup.safetensors"):
        return {"dense": file.stat().st_size}
    coded = file.with_suffix(".coded")
    ps.repack(file, coded, encoding="range_coded")
    return {"bitpack": file.stat().st_size, "range_coded": coded.stat().st_size}


def probe(values: dict[str, Any], weights: Path) -> float:
    """Return the accuracy of a new head on frozen features. The running statistics adapt to the new images."""
    parsed = ps.Recipe.parse(values)
    accelerator = Accelerator()
    with ambient_seed([parsed.training.seed]):
        model: Any = ps.build(parsed.model.name, pretrained=weights, **parsed.model.kwargs)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in model.get_classifier().parameters():
            parameter.requires_grad_(True)
        data = open_data(parsed.data, SIZE, parsed.training.seed, accelerator.device, quiet)
        return Trainer(model, data, parsed.training, accelerator, quiet).run(lambda epoch: None)[-1].accuracy


def ways(k: float) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return by name the surgery and the training of each way. The mask on random weights has no pretrained ones."""
    kept, pretrained = {"k": k, "scaled": False}, {"scheme": "pretrained", "scaled": False}
    return {
        "piggyback": (pretrained, {"lr": 1e-3, **ADAM}),
        "piggyback, norms trained": ({**pretrained, "norm": "train"}, {"lr": 1e-3, **ADAM}),
        "edge-popup": ({**pretrained, **kept}, {"lr": 0.1, **SGD}),
        "edge-popup, norms trained": ({**pretrained, **kept, "norm": "train"}, {"lr": 0.1, **SGD}),
        "edge-popup, random weights": ({**kept, "scaled": True}, {"lr": 0.1, **SGD}),
        "linear probe": (None, {"lr": 0.05, **SGD}),
        "all weights": ("none", {"lr": 0.02, **SGD}),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/ and validation/ in it")
    parser.add_argument("--fashion", help="folder with FashionMNIST/raw in it")
    parser.add_argument("--network", default="timm/resnet10t")
    parser.add_argument("--base", type=Path, help="weights of an earlier dense run to start from")
    parser.add_argument("--base-epochs", type=int, default=6)
    parser.add_argument("--keep-base", type=Path, help="file to copy the base's weights to")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=2000, help="of the task, to train with")
    parser.add_argument("--k", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", help="one of the ways; repeatable")
    parser.add_argument("--output", type=Path, default=Path("pretrained.json"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    results: dict[str, Any] = {}

    def note(name: str, accuracies: list[float], file: Path | None) -> None:
        found = {"accuracy": round(fmean(accuracies), 4), "each": [round(one, 4) for one in accuracies]}
        results[name] = found | {"bytes": sizes(file) if file is not None else {}}
        print(f"{name:28} {100 * fmean(accuracies):.2f} %  {results[name]['bytes']}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, task = split(given.cifar, folder)
        data: dict[str, Any] = {"name": "folder", "root": str(task)}
        source, classes = (base, (6, 4)) if given.fashion is None else (given.cifar, (10, 10))
        if given.fashion is not None:
            data = {"name": "torch/fashion_mnist", "root": given.fashion}
        data["max_train"] = given.images
        file = given.base
        if file is None:
            cifar = {"name": "folder", "root": str(source)}
            values = recipe(given.network, cifar, classes[0], "none", epochs=given.base_epochs, lr=0.05, **SGD)
            dense = ps.train(values, output=folder / "dense")
            note("the base, on its own classes", [dense.accuracy], dense.file)
            file = dense.file
            if given.keep_base is not None:
                given.keep_base.write_bytes(file.read_bytes())
        weights = weights_of_features(given.network, file, folder)

        def run(name: str, surgery: Any, training: dict[str, Any], seed: int) -> tuple[float, Path | None]:
            values = recipe(given.network, data, classes[1], surgery, epochs=given.epochs, seed=seed, **training)
            if surgery is None:
                return probe({**values, "surgery": "none"}, weights), None
            if surgery == "none" or surgery.get("scheme") == "pretrained":
                values["model"]["pretrained"] = str(weights)
            if surgery != "none":
                values["surgery"] = {**surgery, "seed": seed}
            result = ps.train(values, output=folder / f"{name}-{seed}".replace(" ", "-"))
            if surgery != "none":
                start = weights if "pretrained" in values["model"] else None
                again = ps.evaluate(result.file, data_dir=data["root"], base=start).accuracy
                assert again == result.accuracy, (again, result.accuracy)
            return result.accuracy, result.file

        for name, (surgery, training) in ways(given.k).items():
            if given.only is None or name in given.only:
                found = [run(name, surgery, training, seed) for seed in range(given.seeds)]
                note(name, [accuracy for accuracy, _ in found], found[0][1])
    written = {
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "network": given.network,
        "task": "four classes of CIFAR-10, from six" if given.fashion is None else "Fashion-MNIST, from CIFAR-10",
        "k": given.k,
        "seeds": given.seeds,
        "epochs": {"base": given.base_epochs, "task": given.epochs},
        "images": given.images,
        "results": results,
    }
    given.output.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
