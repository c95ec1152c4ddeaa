"""Undocumented parts of timm's data sets that the package uses. `tests/test_compat.py` tests each of them.

timm's `ImageDataset` returns the next image in place of one that cannot be read, and decodes its shards by a pipeline
of its own. What it knows about the files is in its reader.
"""

import logging
import os
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


def shard_files(dataset: Any) -> ShardFiles:
    """Return the shards of a data set `wds/…` that timm opened. Tried on timm 1.0.31."""
    reader = reader_of(dataset)
    split = reader.split_info
    urls = [os.path.join(reader.root, name) for name in split.filenames]
    return ShardFiles(urls, split.alt_label, reader.num_samples or None)


def silence_missing_info() -> None:
    """Silence timm's warning about shards without an info file. They do not need one. Tried on timm 1.0.31."""
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
