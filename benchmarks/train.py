"""Benchmark of the training loop against a bare PyTorch loop over the same data, which is already in memory.

    python benchmarks/train.py [--pairs 9] [--output benchmarks/results/train.json]

Conv4, batch 128, images of CIFAR-10's size, made from a seed. The network is trained three times: by a plain loop of
forward, backward and step; by `Trainer`; and in its hidden form by `Trainer`. They run epochs of ten steps in turn.
Peak memory is measured in separate processes. On a CPU (Linux) the memory used before the network was built is
subtracted.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import popup_surgery as ps
from popup_surgery.config.schema import Data, Training
from popup_surgery.data.batches import quiet
from popup_surgery.data.in_memory import InMemory
from popup_surgery.training.distributed import start
from popup_surgery.training.trainer import Trainer

BATCH, STEPS = 128, 10
TRAINING = Training(epochs=1, lr=0.01, weight_decay=1e-4, checkpoint_minutes=0)


def images(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = BATCH * STEPS
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels.to(device), torch.randint(0, 10, (count,), generator=generator).to(device)


def bare(device: torch.device) -> Callable[[], None]:
    """Return one epoch of a plain PyTorch loop."""
    model = ps.build("conv4").to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), TRAINING.lr, momentum=0.9, weight_decay=TRAINING.weight_decay)
    pixels, labels = images(device)
    batches = list(zip((pixels.float() / 255 - 0.5).split(BATCH), labels.split(BATCH), strict=True))

    def epoch() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return epoch


def looped(model: nn.Module) -> Callable[[], None]:
    """Return one epoch of our trainer with this network."""
    accelerator = start(TRAINING)
    split = images(accelerator.device)
    config = Data(batch_size=BATCH, pad=4, hflip=0.5, mean=[0.5] * 3, std=[1.0] * 3)
    data = InMemory(
        config, (3, 32, 32), 0, accelerator.device, {"train": split, "validation": split}, list("0123456789")
    )
    trainer = Trainer(model, data, TRAINING, accelerator, quiet)

    def epoch() -> None:
        trainer.batch = 0
        trainer._train_epoch(lambda *_: None, lambda: False)

    return epoch


MAKERS: dict[str, Callable[[torch.device], Callable[[], None]]] = {
    "bare": bare,
    "dense": lambda device: looped(ps.build("conv4")),
    "edge_popup": lambda device: looped(ps.convert("conv4", 0.5, scaled=False)),
}


def memory(kind: str) -> dict[str, float]:
    """Return the peak memory of a separate process in MiB: the total, and what training added. Medians of five."""
    call = [sys.executable, __file__, "--memory", kind]
    # freed memory is returned at once, so that the peak counts memory in use, not memory cached by malloc
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = [json.loads(subprocess.check_output(call, text=True, env=environment)) for _ in range(5)]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def print_memory(kind: str, device: torch.device) -> None:
    functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 3, 3))  # loads the libraries that load at first use
    before = kibibytes("VmRSS")
    MAKERS[kind](device)()
    peak = kibibytes("VmHWM") / 1024
    if device.type == "cuda":
        print(json.dumps({"device": torch.cuda.max_memory_allocated() / 2**20}))
    else:
        print(json.dumps({"process": peak, "training": peak - before / 1024}))


def kibibytes(what: str) -> int:
    """Return a value from this process's status in KiB. That of `getrusage` would start from the parent's."""
    return int(re.findall(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="measured rounds")
    parser.add_argument("--output", type=Path, default=Path("train.json"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if arguments.memory:
        print_memory(arguments.memory, device)
        return
    torch.manual_seed(0)
    epochs = {kind: make(device) for kind, make in MAKERS.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in epochs}
    for round_ in range(arguments.pairs + 1):
        kinds = list(epochs)
        for kind in kinds[round_ % 3 :] + kinds[: round_ % 3]:
            began = time.perf_counter()
            epochs[kind]()
            if gpu:
                torch.cuda.synchronize()
            if round_:
                seconds[kind].append(time.perf_counter() - began)
    speed = {kind: BATCH * STEPS / statistics.median(taken) for kind, taken in seconds.items()}

    def ratio(kind: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[kind], seconds[other], strict=True))

    held = {kind: memory(kind) for kind in MAKERS}
    result = {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "images_per_second": {kind: round(value, 1) for kind, value in speed.items()},
        "dense_loop_over_bare": round(ratio("dense", "bare"), 3),
        "edge_popup_over_dense": round(ratio("edge_popup", "dense"), 3),
        "peak_mebibytes": {kind: {key: round(value) for key, value in values.items()} for kind, values in held.items()},
        "peak_memory_edge_popup_over_dense": {
            key: round(value / held["dense"][key], 3) for key, value in held["edge_popup"].items()
        },
    }
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
