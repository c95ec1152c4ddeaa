"""What timm does not document of its data sets, and the package uses; `tests/test_compat.py` tests each of them.

timm's `ImageDataset` gives the next image for one that cannot be read, and its shards are decoded by a pipeline of its
own. What it knows of the files is in its reader.
"""

import logging
import os
from typing import Any, NamedTuple


class ShardFiles(NamedTuple):
    """What timm found out about a data set of webdataset's form.

    Attributes:
        urls: its tar files.
        label: the key of the label in a sample's `json`; empty where the label is its `cls`.
        samples: how many it has; None where it does not say.
    """

    urls: list[str]
    label: str
    samples: int | None


def reader_of(dataset: Any) -> Any:
    """What finds the images of one of timm's data sets; None for a data set of another library.

    `reader[number]` is an open file, a label and perhaps more; `reader.filename(number, absolute=True)` is its path,
    and `reader.root` the folder of them all. Tried on timm 1.0.31.
    """
    return getattr(dataset, "reader", None)


def class_numbers(dataset: Any) -> dict[str, int]:
    """The label of each class by its name, in a data set of timm's or torchvision's; empty where it does not say.

    timm's readers keep it under one of two names. Tried on timm 1.0.31 and torchvision 0.29.1.
    """
    places = (reader_of(dataset), "class_to_idx"), (reader_of(dataset), "class_name_to_idx"), (dataset, "class_to_idx")
    return next((found for place, name in places if (found := getattr(place, name, None))), {})


def shard_files(dataset: Any) -> ShardFiles:
    """The shards of a data set `wds/…` that timm opened. Tried on timm 1.0.31."""
    reader = reader_of(dataset)
    split = reader.split_info
    urls = [os.path.join(reader.root, name) for name in split.filenames]
    return ShardFiles(urls, split.alt_label, reader.num_samples or None)


def silence_missing_info() -> None:
    """Let timm not warn about shards without an info file, which they do not need. Tried on timm 1.0.31."""
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
