"""Open the data set that a recipe names."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.schema import Data
from ..errors import DataError, unknown
from ..timm_compat import reader_of, silence_missing_info
from .batches import TRAIN, VALIDATION, Batches, Progress
from .in_memory import InMemory, decode
from .sources import Numbered, Rows, Shards, Source, reason, some
from .streamed import Streamed
from .transforms import Normalise, ToBytes, pillow_mode

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
        splits = {role: _digits(name, most[role]) for role, name in names.items()}
        return InMemory(config, input_size, seed, device, splits, [str(i) for i in range(10)])
    if config.name != "folder" and config.name.partition("/")[0] not in LIBRARIES:
        raise unknown("data set", config.name, ["digits", "folder", *(f"{library}/…" for library in LIBRARIES)])
    sources = {role: _open(config, name, input_size, most[role]) for role, name in names.items()}
    classes = [source.classes for source in sources.values()]
    if train and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1])) or ["the order"]
        raise DataError(
            f"data set {config.name}: {names[TRAIN]} and {names[VALIDATION]} have different classes; the first that "
            f"differs: {odd[0]!r}"
        )
    if not _in_memory(config, input_size, list(sources.values())):
        return Streamed(config, input_size, seed, device, sources, classes[0])
    held, missing = {}, {}
    for role, source in sources.items():
        held[role], missing[role] = decode(source, config, input_size, progress, role)
    return InMemory(config, input_size, seed, device, held, classes[0], missing)


def open_image(path: Path, config: Data, input_size: tuple[int, int, int]) -> Tensor:
    """Read one image as validation sees it: float32 of `input_size`. `DataError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = ToBytes(config, input_size)(image.convert(pillow_mode(input_size)))
    except OSError as error:
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
    try:
        silence_missing_info()
        if library == "hfids":
            return Rows(path, split, root, title)
        name = "" if config.name == "folder" else config.name
        dataset = create_dataset(name, root, split, download=config.download, input_img_mode=pillow_mode(input_size))
        if library == "wds":
            return Shards(dataset, title)
    except Exception as error:
        raise DataError(f"{title} cannot be opened: {_reason(error, library)}") from error
    if root is not None and config.name == "folder" and Path(reader_of(dataset).root) == Path(root):
        raise DataError(f"{root!r} has no folder for {split!r}; expected {root}/{split}/<class>/<image>")
    return Numbered(dataset, title, most)


def _reason(error: Exception, library: str) -> str:
    """Return why a data set cannot be opened, and what helps."""
    needed = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}.get(library)
    if needed is not None and (isinstance(error, ImportError) or "install" in str(error)):
        return f"the package {needed} cannot be imported; run pip install 'popup-surgery[data]'"
    hint = "; --set data.download=true downloads it" if "download" in str(error) else ""
    return (" ".join(str(error).split()) or type(error).__name__) + hint


def _in_memory(config: Data, input_size: tuple[int, int, int], sources: list[Source]) -> bool:
    numbered = all(isinstance(source, Numbered) for source in sources)
    if config.in_memory and not numbered:
        raise DataError(f"data.in_memory is true; data set {config.name} is streamed, so expected false or null")
    if config.in_memory is not None:
        return config.in_memory
    if config.scale or config.auto_augment or config.re_prob or config.color_jitter or not numbered:
        return False
    return sum(source.count or 0 for source in sources) * int(np.prod(input_size)) <= MEMORY_LIMIT
