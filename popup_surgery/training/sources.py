"""Where images come from. Each is itself, or the reason why it cannot be read; never another one in its place."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

Key = tuple[int, Any]  # an image's number, which seeds its augmentation, and what `read` finds it by


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read: its file, or what else names it, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


class Source(Protocol):
    """One split of a data set.

    Attributes:
        classes: names of the classes in the order of their labels; none where the data set does not say.
        count: images in it, where known.
    """

    classes: list[str]
    count: int | None

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """Each image once: in an order that `entropy` alone decides, or without it in the data set's own."""

    def read(self, key: Any) -> tuple[Image.Image, Any]:
        """An image and its label. Whatever is wrong with it raises."""

    def name(self, key: Any) -> str:
        """What people find an image by."""


class Numbered:
    """Images read by number: timm's `ImageDataset` or one of torchvision's.

    timm's own `__getitem__` gives the next image for one that cannot be read, so that its reader is asked instead.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset, self.title = dataset, title
        self.count: int | None = len(dataset)
        self.reader = getattr(dataset, "reader", None)
        places = (self.reader, "class_to_idx"), (self.reader, "class_name_to_idx"), (dataset, "class_to_idx")
        mapping: dict[str, int] = next((found for place, name in places if (found := getattr(place, name, None))), {})
        self.classes = [str(label) for label, _ in sorted(mapping.items(), key=lambda item: item[1])]

    def keys(self, entropy: list[int] | None) -> Iterator[Key]:
        """As `Source.keys`; any permutation is as likely as another."""
        count = len(self.dataset)
        order = np.arange(count) if entropy is None else np.random.default_rng(entropy).permutation(count)
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
        """As `Source.name`: its path, or the number of one that has none."""
        try:
            path = str(self.reader.filename(key, absolute=True) if self.reader else self.dataset.samples[key][0])
        except Exception:
            path = f"image {key}"
        return path if os.path.exists(os.path.dirname(path)) else f"{path} of {self.title}"


def reason(error: BaseException) -> str:
    """What an error says of a file, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a kind that Pillow knows"
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}".split())
