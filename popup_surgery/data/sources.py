"""Where images come from. Reading gives the image itself or the reason why it cannot be read, never another image."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..timm_compat import class_numbers, reader_of, shard_files

SHUFFLED = 4096  # size of a stream's shuffle buffer, in samples; each process holds their bytes

Key = tuple[int, Any]  # an image's number, which seeds its augmentation, and the key that `read` takes


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read: its file or another name for it, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


class Source(Protocol):
    """One split of a data set.

    Attributes:
        classes: names of the classes in the order of their labels; empty if the data set does not say.
        count: number of images; None if unknown.
    """

    classes: list[str]
    count: int | None

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """Yield each image's key once, in an order that only `entropy` decides, or else in the data set's own order."""

    def read(self, key: Any) -> tuple[Image.Image, Any]:
        """Return an image and its label. Any problem with the image raises an exception."""

    def name(self, key: Any) -> str:
        """Return a human-readable name of an image."""


class Numbered:
    """A map-style data set: timm's `ImageDataset` or one of torchvision's.

    For an image that cannot be read, timm's own `__getitem__` returns the next one. This class calls timm's reader
    instead.
    """

    def __init__(self, dataset: Any, title: str, most: int | None = None) -> None:
        self.dataset, self.title = dataset, title
        self.numbers = some(len(dataset), most)
        self.count: int | None = len(self.numbers)
        self.reader = reader_of(dataset)
        self.classes = [str(label) for label, _ in sorted(class_numbers(dataset).items(), key=lambda item: item[1])]

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """As `Source.keys`; every permutation is equally likely."""
        order = self.numbers if entropy is None else np.random.default_rng(entropy).permutation(self.numbers)
        return ((int(index), int(index)) for index in order)

    def read(self, key: int) -> tuple[Image.Image, Any]:
        """As `Source.read`."""
        if self.reader is None:
            image, label = self.dataset[key]
            return image, label
        file, label, *_ = self.reader[key]
        with file:
            image = Image.open(file)
            image.load()
        return image, label

    def name(self, key: int) -> str:
        """As `Source.name`: the image's path, or its number if it has none."""
        try:
            path = str(self.reader.filename(key, absolute=True) if self.reader else self.dataset.samples[key][0])
        except Exception:
            path = f"image {key}"
        return path if os.path.exists(os.path.dirname(path)) else f"{path} of {self.title}"


class Shards:
    """Tar files in webdataset's format, streamed one after another. Each process reads all of them; workers decode.

    Shards are shuffled, and samples are shuffled in a buffer of `SHUFFLED`. A sample's image has the suffix jpg, jpeg,
    png or webp. Its label is in its `cls`, or in its `json` if the data set's info file says so.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        self.title, self.classes = title, list[str]()
        self.urls, self.label, self.count = shard_files(dataset)

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """As `Source.keys`; the keys are the samples' bytes."""
        import webdataset

        if entropy is None:
            return enumerate(self._samples(self.urls))
        generator = random.Random(_number(entropy))
        urls = generator.sample(self.urls, len(self.urls))
        shuffle = webdataset.shuffle(SHUFFLED, initial=SHUFFLED // 4, rng=generator)
        return enumerate(shuffle(self._samples(urls)))

    def _samples(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for url in urls:
            try:
                with gopen(url) as stream:
                    yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            except Exception as error:
                raise DataError(f"the shard {url} of {self.title} cannot be read: {reason(error)}") from error

    def read(self, key: dict[str, Any]) -> tuple[Image.Image, Any]:
        """As `Source.read`."""
        image = next((key[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in key), None)
        if image is None:
            raise DataError("it has no jpg, jpeg, png or webp")
        return Image.open(BytesIO(image)), json.loads(key["json"])[self.label] if self.label else key["cls"]

    def name(self, key: dict[str, Any]) -> str:
        """As `Source.name`: the sample's key and its shard."""
        return f"{key['__key__']} in {key['__url__']}"


class Rows:
    """A streamed Hugging Face data set. Each process reads all of it; workers decode.

    It is shuffled as its library does it: first the files, then the rows in a buffer of `SHUFFLED`.
    """

    def __init__(self, path: str, split: str, cache: str | None, title: str) -> None:
        import datasets

        rows = datasets.load_dataset(path, split=split, streaming=True, cache_dir=cache)
        columns = rows.features or {}
        if not {"image", "label"} <= columns.keys():
            raise DataError(f"it has the columns {', '.join(columns)}; expected image and label")
        self.title, self.image = title, datasets.Image()
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.classes = list(getattr(columns["label"], "names", None) or [])
        known = (rows.info.splits or {}).get(split)
        self.count = known.num_examples if known and known.num_examples else None

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """As `Source.keys`; each key is a row with the image's bytes, and its number."""
        rows = self.rows
        if entropy is not None:
            rows = rows.shuffle(seed=_number(entropy), buffer_size=SHUFFLED)
        try:
            for number, row in enumerate(rows):
                yield number, {"number": number, **row}
        except Exception as error:
            raise DataError(f"{self.title} cannot be read: {reason(error)}") from error

    def read(self, key: dict[str, Any]) -> tuple[Image.Image, Any]:
        """As `Source.read`."""
        return self.image.decode_example(key["image"]), key["label"]

    def name(self, key: dict[str, Any]) -> str:
        """As `Source.name`: the image's path, or its number in the epoch."""
        return f"{key['image']['path'] or key['number']} of {self.title}"


def some(count: int, most: int | None) -> NDArray[np.int64]:
    """Return the numbers of `count` images, or of `most` of them chosen at random, in ascending order."""
    chosen = np.arange(count) if most is None else np.random.default_rng(0).permutation(count)[:most]
    return np.sort(chosen)


def reason(error: BaseException) -> str:
    """Return what an error says about a file, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a kind that Pillow knows"
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def _number(entropy: list[int]) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
