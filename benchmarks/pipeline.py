"""Images per second of our input pipeline and of timm's own loader, over the same files with as many workers.

    python benchmarks/pipeline.py [--repeats 7] [--workers 2] [--output benchmarks/results/pipeline-cpu.json]

Both apply ImageNet's training transforms (random resized crop to 224, flip) to JPEGs of mixed sizes about 500 × 375,
made in a temporary folder. They read whole epochs in turn. Our pipeline seeds each image's augmentation and starts new
workers in each epoch. timm's runs with its defaults: a prefetcher and persistent workers. Ratios are medians over pairs
of neighbouring epochs. The ratio of processor time, workers included, is the steadier one on a machine in use.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from popup_surgery.config.schema import Data
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.data.transforms import DEFAULT_MEAN, DEFAULT_STD

SIZE = (3, 224, 224)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def write_images(root: Path, count: int) -> float:
    """Write `count` JPEGs of smooth colours with noise, 512 of them different. Returns their mean size in kB."""
    generator = np.random.default_rng(0)
    for split, number in (("train", count), ("validation", 4)):
        for i in range(number):
            if i >= 512:
                os.link(root / split / str(i % 4) / f"{i % 512}.jpg", root / split / str(i % 4) / f"{i}.jpg")
                continue
            width, height = (int(side * generator.uniform(0.7, 1.3)) for side in (500, 375))
            small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
            pixels = (pixels + generator.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
            folder = root / split / str(i % 4)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return statistics.mean(file.stat().st_size for file in (root / "train").glob("*/*")) / 1e3


def ours(root: Path, batch: int, workers: int, device: torch.device) -> Iterator[Any]:
    """Yield epochs of training images from our pipeline."""
    shape: dict[str, Any] = {"scale": list(SCALE), "ratio": list(RATIO)}
    config = Data(name="folder", root=str(root), batch_size=batch, hflip=0.5, workers=workers, **shape)
    data = open_data(config, SIZE, 0, device, quiet)
    epoch = 0
    while True:
        yield data.train(epoch)
        epoch += 1


def timms(root: Path, batch: int, workers: int, device: torch.device) -> Iterator[Any]:
    """Yield epochs of training images from timm's loader."""
    loader = create_loader(
        create_dataset("", str(root), "train"), SIZE, batch, is_training=True, scale=SCALE, ratio=RATIO, hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bilinear", mean=DEFAULT_MEAN, std=DEFAULT_STD, num_workers=workers,
        device=device, pin_memory=device.type == "cuda",
    )  # fmt: skip
    while True:
        yield loader


def processor_seconds() -> float:
    """Return the processor time of this process and its workers, running and ended, in seconds."""
    me = psutil.Process()
    return sum(me.cpu_times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in me.children())


def rate(epochs: Iterator[Any], count: int) -> tuple[float, float]:
    """Read the next epoch. Returns images per second, and per second of processor time."""
    began, used, seen = time.perf_counter(), processor_seconds(), 0
    for images, *_ in next(epochs):
        assert images.dtype == torch.float32
        seen += len(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    assert seen == count
    return seen / (time.perf_counter() - began), seen / (processor_seconds() - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured epochs of each kind")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=3072, help="number of images, a multiple of the batch size")
    parser.add_argument("--output", type=Path, default=Path("pipeline.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), arguments.images)
        how = Path(folder), arguments.batch, arguments.workers, device
        both = {"ours": ours(*how), "timm": timms(*how)}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
        for repeat in range(arguments.repeats + 1):
            for name in sorted(both, reverse=repeat % 2 == 1):  # neither always follows the other
                found = rate(both[name], arguments.images)
                if repeat:  # the first epoch starts workers and warms the file cache
                    rates[name].append(found)
                    print(f"{name} {found[0]:7.1f} images/s, {found[1]:7.1f} a processor's second", flush=True)
        both.clear()

    def ratio(which: int) -> float:
        return round(statistics.median(a[which] / b[which] for a, b in zip(*rates.values(), strict=True)), 3)

    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "images": arguments.images,
        "mean_kilobytes": round(size, 1),
        "batch": arguments.batch,
        "workers": arguments.workers,
        "repeats": arguments.repeats,
        "images_per_second": {name: round(statistics.median(r[0] for r in found), 1) for name, found in rates.items()},
        "ours_over_timm": ratio(0),
        "ours_over_timm_by_processor_time": ratio(1),
    }
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
