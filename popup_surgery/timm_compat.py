"""Undocumented parts of timm's data sets that the package uses. `tests/test_compat.py` tests each of them.

timm's `ImageDataset` returns the next image in place of one that cannot be read, and decodes its shards by a pipeline
of its own. What it knows about the files is in its reader.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class ShardFiles(NamedTuple):
    """What timm knows about a data set in webdataset format.

    Attributes:
        urls: its tar files.
        label: the key of the label in a sample's `json`; empty if the label is its `cls`.
        samples: the number of samples; None where timm does not know it.
    """

    urls: list[str]
    label: str
    samples: int | None


def reader_of(dataset: Any) -> Any:
    """Return the reader of a timm data set, which finds its images; None for a data set of another library.

    `reader[number]` is an open file, a label and perhaps more. `reader.filename(number, absolute=True)` is its path,
    and `reader.root` is the folder of all files. Tried on timm 1.0.31.
    """
    return getattr(dataset, "reader", None)


def class_numbers(dataset: Any) -> dict[str, int]:
    """Return the label of each class by its name, for a timm or torchvision data set; empty if it does not say.

    timm's readers store it under one of two names. Tried on timm 1.0.31 and torchvision 0.29.1.
    """
    places = (reader_of(dataset), "class_to_idx"), (reader_of(dataset), "class_name_to_idx"), (dataset, "class_to_idx")
    return next((found for place, name in places if (found := getattr(place, name, None))), {})


@contextmanager
def image_suffixes(suffixes: Iterable[str]) -> Iterator[None]:
    """Context manager: timm's readers take files with these suffixes for images. Tried on timm 1.0.31."""
    from timm.data import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    set_img_extensions(suffixes)
    try:
        yield
    finally:
        set_img_extensions(before)


def files_of(dataset: Any) -> list[str]:
    """Return the path of each image of a timm data set of a folder or a tar file, relative to the folder or the tar.

    A tar file within the tar counts as a folder. Tried on timm 1.0.31.
    """
    reader = reader_of(dataset)
    if not hasattr(reader, "class_name_to_idx"):
        return [os.path.relpath(path, reader.root) for path, _ in reader.samples]
    tars = [os.path.splitext(os.path.basename(tar.path))[0] if tar else "" for _, _, tar in reader.samples]
    return [os.path.normpath(os.path.join(tar, image.path)) for tar, (image, *_) in zip(tars, reader.samples)]


def set_classes(dataset: Any, names: Sequence[str | None]) -> None:
    """Give each image of such a data set the class of this name; leave out the images whose name is None.

    The labels follow the names in timm's natural order. Tried on timm 1.0.31.
    """
    from timm.utils.misc import natural_key

    reader = reader_of(dataset)
    numbers = {name: i for i, name in enumerate(sorted({name for name in names if name is not None}, key=natural_key))}
    chosen = [(i, numbers[name]) for i, name in enumerate(names) if name is not None]
    if hasattr(reader, "class_name_to_idx"):
        reader.samples, reader.targets = reader.samples[[i for i, _ in chosen]], [label for _, label in chosen]
        reader.class_name_to_idx, reader.class_idx_to_name = numbers, dict(enumerate(numbers))
    else:
        reader.samples, reader.class_to_idx = [(reader.samples[i][0], label) for i, label in chosen], numbers


def shard_files(dataset: Any) -> ShardFiles:
    """Return the shards of a data set `wds/…` that timm opened. Tried on timm 1.0.31."""
    reader = reader_of(dataset)
    split = reader.split_info
    urls = [os.path.join(reader.root, name) for name in split.filenames]
    return ShardFiles(urls, split.alt_label, reader.num_samples or None)


def silence_missing_info() -> None:
    """Silence timm's warning about shards without an info file. They do not need one. Tried on timm 1.0.31."""
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
