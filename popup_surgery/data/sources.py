"""Where images come from. Reading gives the image itself or the reason why it cannot be read, never another image."""

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..timm_compat import class_numbers, reader_of, shard_files
from .folders import escaped
from .pixels import SUFFIXES

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
        self.classes = [escaped(str(label)) for label, _ in sorted(class_numbers(dataset).items(), key=lambda c: c[1])]
        if hasattr(dataset, "loader"):
            dataset.loader = _opened_path  # torchvision's own makes RGB of an image

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
            return _opened(file), label

    def name(self, key: int) -> str:
        """As `Source.name`: the image's path, or its number if it has none."""
        try:
            path = str(self.reader.filename(key, absolute=True) if self.reader else self.dataset.samples[key][0])
        except Exception:
            path = f"image {key}"
        return path if os.path.exists(os.path.dirname(path)) else f"{path} of {self.title}"


class Shards:
    """Tar files in webdataset's format, streamed one after another. Each process reads all of them; workers decode.

    Shards are shuffled, and samples are shuffled in a buffer of `SHUFFLED`. A sample's image is the part `image`, or
    the first that has an image's suffix. Its label is the part `label` or has this key in its `json`. If `label` is
    None, it is in its `cls`, or in its `json` if the data set's info file says so.

    Raises:
        DataError: `image` or `label` is given, and the first sample does not have it.
    """

    def __init__(self, dataset: Any, title: str, image: str | None = None, label: str | None = None) -> None:
        self.title, self.classes = title, list[str]()
        self.urls, alt_label, self.count = shard_files(dataset)
        self.image, self.label = image, label or alt_label
        if image or label:
            first = next(self._samples(self.urls), None)
            if first is not None:
                self._image_in(first), self._label_in(first)

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
        return Image.open(BytesIO(self._image_in(key))), self._label_in(key)

    def _image_in(self, sample: dict[str, Any]) -> bytes:
        for name in [self.image] if self.image else [suffix[1:] for suffix in SUFFIXES]:
            if name in sample:
                return sample[name]
        if self.image:
            raise DataError(f"a sample has the parts {_parts(sample)}; data.image_key is {self.image!r}")
        raise DataError(f"it has no image, only {_parts(sample)}; data.image_key names the part that is one")

    def _label_in(self, sample: dict[str, Any]) -> Any:
        name = self.label or "cls"
        if name in sample:
            return sample[name]
        values = json.loads(sample["json"]) if self.label and "json" in sample else {}
        if self.label and name in values:
            return values[name]
        keys = f", and in its json {', '.join(values)}" if values else ""
        raise DataError(
            f"a sample has the parts {_parts(sample)}{keys}; data.label_key is {name!r}"
            if self.label
            else f"it has no cls, only {_parts(sample)}; data.label_key names the part, or the json's key, of labels"
        )

    def name(self, key: dict[str, Any]) -> str:
        """As `Source.name`: the sample's key and its shard."""
        return f"{key['__key__']} in {key['__url__']}"


class Rows:
    """A streamed Hugging Face data set. Each process reads all of it; workers decode.

    It is shuffled as its library does it: first the files, then the rows in a buffer of `SHUFFLED`. `image` and `label`
    are the names of two columns.
    """

    def __init__(self, path: str, split: str, cache: str | None, title: str, image: str, label: str) -> None:
        import datasets

        rows = datasets.load_dataset(path, split=split, streaming=True, cache_dir=cache)
        columns = rows.features or {}
        check_columns(columns, image, label)
        self.title, self.decoder, self.image, self.label = title, datasets.Image(), image, label
        self.rows = rows.cast_column(image, datasets.Image(decode=False))
        self.classes = list(getattr(columns[label], "names", None) or [])
        known = (rows.info.splits or {}).get(split)
        self.count = known.num_examples if known and known.num_examples else None

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """As `Source.keys`; each key is a row with the image's bytes, and its number."""
        rows = self.rows
        if entropy is not None:
            rows = rows.shuffle(seed=_number(entropy), buffer_size=SHUFFLED)
        try:
            for number, row in enumerate(rows):
                yield number, {"image": row[self.image], "label": row[self.label], "number": number}
        except Exception as error:
            raise DataError(f"{self.title} cannot be read: {reason(error)}") from error

    def read(self, key: dict[str, Any]) -> tuple[Image.Image, Any]:
        """As `Source.read`."""
        return self.decoder.decode_example(key["image"]), key["label"]

    def name(self, key: dict[str, Any]) -> str:
        """As `Source.name`: the image's path, or its number in the epoch."""
        return f"{key['image']['path'] or key['number']} of {self.title}"


def check_columns(columns: Mapping[str, Any], image: str, label: str) -> None:
    """Raise `DataError` if a Hugging Face data set lacks a column, or if its labels are no numbers."""
    if not {image, label} <= columns.keys():
        raise DataError(
            f"it has the columns {', '.join(columns)}; expected {image} and {label}: set data.image_key and "
            "data.label_key"
        )
    kind = getattr(columns[label], "dtype", None)
    if kind is None or not kind.startswith(("int", "uint", "bool")):
        raise DataError(
            f"its column {label} holds {kind or type(columns[label]).__name__}; expected class labels or whole "
            f"numbers: set data.label_key to one of the columns {', '.join(columns)}"
        )


def _opened_path(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return _opened(file)


def _opened(file: Any) -> Image.Image:
    image = Image.open(file)
    image.load()
    return image


def _parts(sample: Mapping[str, Any]) -> str:
    return ", ".join(name for name in sample if not name.startswith("__")) or "no part"


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
