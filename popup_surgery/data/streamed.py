"""Images decoded and transformed as they are needed."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ..config.schema import Data
from ..errors import DataError
from .batches import TRAIN, VALIDATION, WHOLE, Batch, MicroBatch, Prepared, ProcessShard, TrainBatch
from .reading import MicroBatches, chunks, read_pieces
from .sources import Source
from .transforms import mean_std


class Streamed(Prepared):
    """Images decoded and transformed by worker processes as they are needed, with timm's transforms."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        sources: dict[str, Source],
        classes: list[str],
    ) -> None:
        from timm.data import create_transform

        super().__init__(config, input_size, seed, device, classes, {r: source.count for r, source in sources.items()})
        self.sources, self.input_size = sources, input_size
        mean, std = mean_std(config, input_size[0])
        common: dict[str, Any] = {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": config.interpolation,
            "use_prefetcher": not config.re_prob,  # uint8, normalised on the device; random erasing comes after that
        }
        augment: dict[str, Any] = {
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "re_prob": config.re_prob,
        }
        augment |= {"scale": config.scale, "ratio": config.ratio, "auto_augment": config.auto_augment}
        try:
            self.transforms = {
                VALIDATION: create_transform(**common, crop_pct=config.crop_pct),
                TRAIN: create_transform(**common, **augment, is_training=True),
            }
        except Exception as error:
            raise DataError(
                f"timm cannot make transforms of data.interpolation={config.interpolation!r}, "
                f"data.auto_augment={config.auto_augment!r} and the like: {error!r}"
            ) from error

    def train(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        entropy, size = [self.seed, epoch], self.config.batch_size
        keys = islice(self.sources[TRAIN].keys(entropy), first * size, None)
        return self._batches(TRAIN, entropy, (piece for batch in chunks(keys, size) for piece in part.cut(batch)))

    def validation(self, part: ProcessShard = WHOLE) -> Iterator[Batch]:
        keys = islice(self.sources[VALIDATION].keys(None), part.rank, None, part.processes)
        plan = ((chunk, 1.0) for chunk in chunks(keys, self.config.batch_size))
        return ((images, labels) for images, labels, weight in self._batches(VALIDATION, [], plan) if weight)

    def _batches(self, role: str, entropy: list[int], plan: Iterator[MicroBatch]) -> Iterator[TrainBatch]:
        pieces = MicroBatches(self.sources[role], self.transforms[role], self.input_size, entropy)
        for images, labels, weight, missing in read_pieces(pieces, plan, self.config, self.device.type == "cuda"):
            self._leave_out(missing)
            images = self.normalise(images.to(self.device, non_blocking=True))
            yield images, labels.to(self.device, non_blocking=True), weight
