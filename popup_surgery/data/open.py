"""Open the data set that a recipe names."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.schema import Data
from ..errors import DataError, unknown
from ..timm_compat import image_suffixes, reader_of, silence_missing_info
from .batches import TRAIN, VALIDATION, Batches, Progress
from .folders import label_by_folder, warn_of_others
from .in_memory import InMemory, decode
from .pixels import SUFFIXES, eight_bits, mode_of
from .sources import Numbered, Rows, Shards, Source, check_columns, reason, some
from .streamed import Streamed
from .transforms import Normalise, ToBytes

log = logging.getLogger("popup_surgery")

KEYED = ("hfds", "hfids", "wds")  # libraries whose images and labels have names
LIBRARIES = ("torch", "hfds", "hfids", "wds")  # timm's prefixes of data set names
MEMORY_LIMIT = 1 << 30  # bytes of decoded images that are held in memory by default


def open_data(
    config: Data,
    input_size: tuple[int, int, int],
    seed: int,
    device: torch.device,
    progress: Progress,
    train: bool = True,
) -> Batches:
    """Open the data set that `config` names.

    Args:
        input_size: channels, height and width of the images.
        train: False opens only the validation images.

    Raises:
        DataError: the data set is missing or unreadable, or its two splits have different classes.
    """
    if (config.mean and len(config.mean) != input_size[0]) or (config.std and len(config.std) != input_size[0]):
        raise DataError(
            f"data.mean and data.std have {len(config.mean or config.std or [])} values for {input_size[0]} channels"
        )
    names = {TRAIN: config.train_split, VALIDATION: config.val_split}
    if not train:
        del names[TRAIN]
    most = {TRAIN: config.max_train, VALIDATION: config.max_validation}
    if config.name == "digits":
        if config.root is not None:
            raise DataError(f"data.root is {config.root!r}; expected null, because scikit-learn brings the digits")
        _check_keys(config)
        splits = {role: _digits(name, most[role]) for role, name in names.items()}
        return InMemory(config, input_size, seed, device, splits, [str(i) for i in range(10)])
    if config.name != "folder" and config.name.partition("/")[0] not in LIBRARIES:
        raise unknown("data set", config.name, ["digits", "folder", *(f"{library}/…" for library in LIBRARIES)])
    mode_of(input_size[0])
    _check_keys(config)
    sources = {role: _open(config, name, input_size, most[role]) for role, name in names.items()}
    classes = [source.classes for source in sources.values()]
    if train and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1])) or ["the order"]
        raise DataError(
            f"data set {config.name}: {names[TRAIN]} and {names[VALIDATION]} have different classes; the first that "
            f"differs: {odd[0]!r}"
        )
    if config.same_size is None:
        config = _as_before(config, input_size, sources)
    if not _in_memory(config, input_size, list(sources.values())):
        return Streamed(config, input_size, seed, device, sources, classes[0])
    held, missing = {}, {}
    for role, source in sources.items():
        held[role], missing[role] = decode(source, config, input_size, progress, role)
    return InMemory(config, input_size, seed, device, held, classes[0], missing)


def open_image(path: Path, config: Data, input_size: tuple[int, int, int]) -> Tensor:
    """Read one image as validation sees it: float32 of `input_size`. `DataError` if it cannot be read."""
    mode, to_bytes = mode_of(input_size[0]), ToBytes(config, input_size)
    try:
        with Image.open(path) as image:
            pixels = to_bytes(eight_bits(image, mode))
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise DataError(f"{path} cannot be read as an image: {reason(error)}") from error
    return Normalise(config, input_size, torch.device("cpu"))(pixels)


def _digits(split: str, most: int | None) -> tuple[Tensor, Tensor]:
    """Return a split of scikit-learn's 1,797 handwritten digits of 8 × 8 pixels. Every fifth is for validation."""
    from sklearn.datasets import load_digits

    if split not in (TRAIN, VALIDATION):
        raise DataError(f"digits has no split {split!r}; expected {TRAIN!r} or {VALIDATION!r}")
    digits = load_digits()
    (chosen,) = np.nonzero((np.arange(len(digits.target)) % 5 == 4) == (split == VALIDATION))
    chosen = chosen[some(len(chosen), most)]
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(digits.target[chosen].astype(np.int64))


def check_root(config: Data) -> None:
    """Raise `DataError` if the data set needs a folder and none is given."""
    if config.root is None and config.name.partition("/")[0] not in ("digits", "hfds", "hfids"):
        raise DataError(f"data set {config.name} needs a folder; pass --data-dir DIR, or set data.root")


def _check_keys(config: Data) -> None:
    """Raise `DataError` if a key is set that names something in samples, and the data set's samples have no names."""
    for key in ("image_key", "label_key"):
        value = getattr(config, key)
        if value is not None and config.name.partition("/")[0] not in KEYED:
            raise DataError(f"data.{key} is {value!r}; data set {config.name} has no such keys: expected null")


def _open(config: Data, split: str, input_size: tuple[int, int, int], most: int | None) -> Source:
    """Open one split. `DataError` says why it cannot be opened."""
    from timm.data import create_dataset

    library, _, path = config.name.partition("/")
    root = config.root and os.path.expanduser(config.root)
    check_root(config)
    elsewhere = library in ("hfds", "hfids") or config.download or (library == "wds" and ":" in str(root))
    if root is not None and not elsewhere and not Path(root).exists():
        raise DataError(f"data.root is {root!r}, which does not exist; expected the folder of the data set")
    title = f"data set {config.name} ({split})"
    if most is not None and library in ("hfids", "wds"):
        raise DataError(f"{title} is streamed as a whole; set data.max_train and data.max_validation to null")
    image, label = config.image_key or "image", config.label_key or "label"
    columns: dict[str, Any] = {"input_key": image, "target_key": label} if library == "hfds" else {}
    try:
        silence_missing_info()
        if library == "hfids":
            return Rows(path, split, root, title, image, label)
        if library == "hfds":
            check_columns(_features(path, split, root), image, label)
        name = "" if config.name == "folder" else config.name
        with image_suffixes(SUFFIXES):
            dataset = create_dataset(name, root, split, download=config.download, **columns)
        if library == "wds":
            return Shards(dataset, title, config.image_key, config.label_key)
    except Exception as error:
        raise DataError(f"{title} cannot be opened: {_reason(error, config, str(root))}") from error
    if config.name == "folder":
        if root is not None and Path(reader_of(dataset).root) == Path(root):
            raise DataError(f"{root!r} has no folder for {split!r}; expected {root}/{split}/<class>/<image>")
        label_by_folder(dataset, title)
    if config.name in ("folder", "torch/folder", "torch/image_folder"):
        warn_of_others(dataset, title)
    return Numbered(dataset, title, most)


def _features(path: str, split: str, cache: str | None) -> Mapping[str, Any]:
    """Return the columns of a Hugging Face data set, which it prepares. timm's own copy of it has more of them."""
    import datasets

    return datasets.load_dataset(path, split=split, cache_dir=cache).features


def _reason(error: Exception, config: Data, root: str) -> str:
    """Return why a data set cannot be opened, and what helps."""
    needed = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}.get(config.name.partition("/")[0])
    if needed is not None and (isinstance(error, ImportError) or "install" in str(error)):
        return f"the package {needed} cannot be imported; run pip install 'popup-surgery[data]'"
    if "download=True" in str(error):
        return (
            f"{root} does not hold torchvision's files; --set data.download=true downloads them, and "
            f"--set data.name=folder reads {root}/{config.train_split}/<class>/ and {root}/{config.val_split}/<class>/"
        )
    return " ".join(str(error).split()) or type(error).__name__


def held(config: Data) -> bool | None:
    """Return whether images are held in memory, as far as a data section alone says it; None if their size decides."""
    if config.in_memory is not None:
        return config.in_memory
    if config.name == "digits":
        return True
    work = config.scale or config.auto_augment or config.re_prob or config.color_jitter
    return False if work or config.name.partition("/")[0] in ("hfids", "wds") else None


def _in_memory(config: Data, input_size: tuple[int, int, int], sources: list[Source]) -> bool:
    if config.in_memory and not all(isinstance(source, Numbered) for source in sources):
        raise DataError(f"data.in_memory is true; data set {config.name} is streamed, so expected false or null")
    decided = held(config)
    size = sum(source.count or 0 for source in sources) * int(np.prod(input_size))
    return size <= MEMORY_LIMIT if decided is None else decided


def _as_before(config: Data, input_size: tuple[int, int, int], sources: dict[str, Source]) -> Data:
    """Return `config` with what an earlier version's run did to images that have the network's size."""
    splits, unknown = list(sources.values()), held(config) is None and TRAIN not in sources
    if unknown:  # the size of both splits decided
        try:
            splits.append(_open(config, config.train_split, input_size, config.max_train))
        except DataError:
            log.warning(
                "the training images of %s are not there, whose number decided how an earlier version prepared "
                "validation images of %d × %d pixels; data.same_size=keep or crop decides it",
                config.name, *input_size[1:],
            )  # fmt: skip
    return config.model_copy(update={"same_size": "keep" if _in_memory(config, input_size, splits) else "crop"})
