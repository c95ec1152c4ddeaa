"""Images decoded and transformed as they are needed."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ..config.schema import Data
from ..errors import DataError
from .batches import TRAIN, VALIDATION, WHOLE, Batch, MicroBatch, Prepared, ProcessShard, TrainBatch
from .reading import MicroBatches, chunks, joined, read_pieces
from .sources import Source
from .transforms import ToBytes, mean_std, timm_transform


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
        super().__init__(config, input_size, seed, device, classes, {r: source.count for r, source in sources.items()})
        self.sources, self.input_size = sources, input_size
        mean, std = mean_std(config, input_size[0])
        if config.auto_augment and input_size[0] == 4 and TRAIN in sources:
            raise DataError(
                f"data.auto_augment is {config.auto_augment!r}, and its operations take no images of 4 channels; "
                "expected null"
            )
        augment: dict[str, Any] = {
            "mean": mean,
            "std": std,
            "use_prefetcher": not config.re_prob,  # uint8, normalised on the device; random erasing comes after that
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "re_prob": config.re_prob,
        }
        augment |= {"scale": config.scale, "ratio": config.ratio, "auto_augment": config.auto_augment}
        self.transforms = {
            VALIDATION: ToBytes(config, input_size),
            TRAIN: timm_transform(config, input_size, is_training=True, **augment),
        }

    def train(self, epoch: int, part: ProcessShard = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        entropy, size = [self.seed, epoch], self.config.batch_size
        before = min(first, self.least - 1)  # the batch before may have the last images of the epoch
        keys = islice(self.sources[TRAIN].keys(entropy), (first - before) * size, None)
        batches = islice(joined(chunks(keys, size), self.least), before, None)
        plan = (piece for batch in batches for piece in part.cut(batch, self.least))
        return self._batches(TRAIN, entropy, plan, self.least)

    def validation(self, part: ProcessShard = WHOLE) -> Iterator[Batch]:
        keys = islice(self.sources[VALIDATION].keys(None), part.rank, None, part.processes)
        plan = ((chunk, 1.0) for chunk in chunks(keys, self.config.batch_size))
        return ((images, labels) for images, labels, weight in self._batches(VALIDATION, [], plan) if weight)

    def _batches(
        self, role: str, entropy: list[int], plan: Iterator[MicroBatch], least: int = 1
    ) -> Iterator[TrainBatch]:
        source = self.sources[role]
        limit = len(source.classes) or self.outputs
        pieces = MicroBatches(source, self.transforms[role], self.input_size, entropy, limit, least)
        for images, labels, weight, missing in read_pieces(pieces, plan, self.config, self.device.type == "cuda"):
            self._leave_out(missing)
            images = self.normalise(images.to(self.device, non_blocking=True))
            yield images, self._placed(labels.to(self.device, non_blocking=True)), weight
