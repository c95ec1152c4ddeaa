"""Bytes that two processes exchange in a training step of ResNet-50: dense under PyTorch's DDP, hidden, and in shards.

    python benchmarks/wire.py [--steps 3] [--output benchmarks/results/wire.json]

The traffic of the loopback device is counted (Linux), so nothing else should use it meanwhile. A ring of two sends each
gradient once from each process. The rest is headers, the integer by which processes agree to stop, and whatever should
not be sent: reducing or broadcasting frozen weights would add as much again. The images' size does not matter. In
shards (FSDP2), each process gets half of the weights and of the scores from the other one, in the forward and again in
the backward, which is twice the gradients' bytes, and half of the scores' gradients; but gloo's reduce-scatter sends as
much as its all-reduce. What is in no block is gathered once.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import popup_surgery as ps
from popup_surgery.config.schema import Data, Training
from popup_surgery.data.batches import quiet
from popup_surgery.data.in_memory import InMemory
from popup_surgery.experiment.machine import processor
from popup_surgery.training.distributed import leave, start
from popup_surgery.training.trainer import Trainer

NET, BATCH = "timm/resnet50", 4
TRAINING = Training(epochs=1, lr=0.01, checkpoint_minutes=0)
SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Bottleneck",
}


def sent() -> int:
    """Return the bytes that the loopback device has carried so far."""
    return int(re.findall(r"lo:\s*(\d+)", Path("/proc/net/dev").read_text())[0])


def popup(images: torch.Tensor, labels: torch.Tensor) -> int:
    """Train the hidden network by our loop, as the processes were started. Returns the bytes of its scores."""
    accelerator = start(TRAINING)
    model, config = ps.convert(NET, 0.3), Data(batch_size=BATCH)
    split = {"train": (images, labels), "validation": (images, labels)}
    names = [str(i) for i in range(1000)]
    _, chans, height, width = images.shape
    data = InMemory(config, (chans, height, width), 0, accelerator.device, split, names)
    Trainer(model, data, TRAINING, accelerator, quiet)._train_epoch(lambda *_: None, lambda: False)
    return gradients(model)


def dense(images: torch.Tensor, labels: torch.Tensor) -> int:
    """Train the dense network by PyTorch's DDP with its defaults. Returns the bytes of its weights."""
    torch.distributed.init_process_group("gloo")
    model = ps.build(NET)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), TRAINING.lr, momentum=0.9)
    share = BATCH // 2
    for first in range(torch.distributed.get_rank() * share, len(labels), BATCH):
        optimizer.zero_grad()
        logits = parallel(images[first : first + share].float() / 255)
        nn.functional.cross_entropy(logits, labels[first : first + share]).backward()
        optimizer.step()
    return gradients(model)


def gradients(model: nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)


def in_process(kind: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH * steps, 3, 32, 32), generator=generator, dtype=torch.uint8)
    os.environ.update(SHARDS if kind == "shards" else {})
    found = (dense if kind == "dense" else popup)(images, torch.zeros(len(images), dtype=torch.int64))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"gradients": found}))
    leave()


def carried(kind: str, steps: int) -> tuple[int, int]:
    """Return the bytes of the gradients, and the bytes that a run of `steps` steps sends."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    before = sent()
    out = subprocess.check_output([*launch, "--in-process", kind, "--steps", str(steps)], text=True)
    return json.loads(out.splitlines()[-1])["gradients"], sent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("wire.json"))
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        in_process(arguments.in_process, arguments.steps)
        return
    result: dict[str, dict[str, float]] = {}
    for kind in ("dense", "popup", "shards"):
        # a longer run minus a shorter one: this cancels the cost of the start, mainly DDP's first broadcast
        (found, long), (_, short) = carried(kind, 1 + arguments.steps), carried(kind, 1)
        each = (long - short) / arguments.steps / 2
        result[kind] = {"gradient_bytes": found, "bytes_per_step": round(each), "ratio": round(each / found, 4)}
    each_step = {kind: row["bytes_per_step"] for kind, row in result.items()}
    summary = {
        "device": processor()[0],
        "torch": torch.__version__,
        "processes": 2,
        "popup_over_dense": round(each_step["popup"] / each_step["dense"], 4),
        "shards_over_popup": round(each_step["shards"] / each_step["popup"], 4),
        **result,
    }
    print(json.dumps(summary, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
