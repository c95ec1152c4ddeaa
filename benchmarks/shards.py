"""Peak memory of each process that trains ViT-B/16: in shards (FSDP2), and with all weights in each process (DDP).

    python benchmarks/shards.py [--processes 4] [--steps 3] [--output benchmarks/results/shards.json]

Processes on the CPU (gloo) take the steps of our loop on one image each. Their memory is counted (Linux) once a small
transformer has been trained in the same way, because that imports what is imported at first use, and from before the
network is built. So it has the network, its conversion, the optimiser and the steps.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import popup_surgery as ps
from popup_surgery.config.schema import Data, Training
from popup_surgery.data.batches import quiet
from popup_surgery.data.in_memory import InMemory
from popup_surgery.experiment.machine import memory, processor
from popup_surgery.training.distributed import leave, start
from popup_surgery.training.trainer import Trainer

NET, SMALL, SIZE = "timm/vit_base_patch16_224", "timm/test_vit", (3, 224, 224)
TRAINING = Training(epochs=1, lr=0.01, checkpoint_minutes=0)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}


def train(net: str, steps: int, size: tuple[int, int, int]) -> None:
    """Take some steps of the loop with one image in each process."""
    accelerator = start(TRAINING)
    count = accelerator.num_processes
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count * steps, *size), generator=generator, dtype=torch.uint8)
    split = images, torch.zeros(len(images), dtype=torch.int64)
    names = [str(i) for i in range(1000)]
    data = InMemory(Data(batch_size=count), size, 0, accelerator.device, {"train": split, "validation": split}, names)
    Trainer(ps.convert(net, 0.3), data, TRAINING, accelerator, quiet)._train_epoch(lambda *_: None, lambda: False)


def in_process(steps: int) -> None:
    """Print the peak of the process that needs the most, in bytes beyond the imports."""
    train(SMALL, 1, (3, 160, 160))
    before = memory(trim=True, forget=True)
    train(NET, steps, SIZE)
    after = memory()
    if before is None or after is None:
        raise SystemExit("only Linux tells the memory of a process")
    peak = torch.tensor(after.peak - before.now)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"peak": int(peak)}))
    leave()


def peak(environment: dict[str, str], processes: int, steps: int) -> int:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = subprocess.check_output(
        [*launch, __file__, "--in-process", "--steps", str(steps)],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    return int(json.loads(out.splitlines()[-1])["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("shards.json"))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        in_process(arguments.steps)
        return
    peaks = {
        kind: peak(environment, arguments.processes, arguments.steps)
        for kind, environment in {"ddp": {}, "fsdp": FSDP}.items()
    }
    result = {
        "device": processor()[0],
        "torch": torch.__version__,
        "network": NET,
        "processes": arguments.processes,
        "peak_bytes_beyond_imports": peaks,
        "fsdp_over_ddp": round(peaks["fsdp"] / peaks["ddp"], 3),
    }
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
