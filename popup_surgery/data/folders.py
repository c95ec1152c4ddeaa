"""Folders of images, and tar files of them: which files are images, and of which class each is."""

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..config.schema import Data
from ..errors import DataError
from ..timm_compat import files_of, reader_of, set_classes
from .pixels import SUFFIXES

log = logging.getLogger("popup_surgery")

# The folder in which torchvision keeps each data set, below `data.root`
_TORCHVISION = {
    "torch/cifar10": "cifar-10-batches-py",
    "torch/cifar100": "cifar-100-python",
    "torch/mnist": "MNIST",
    "torch/kmnist": "KMNIST",
    "torch/qmnist": "QMNIST",
    "torch/fashion_mnist": "FashionMNIST",
}


def recognised(config: Data) -> Data:
    """Return `config`, with the name `folder` if its root has folders of images and not torchvision's files."""
    own = _TORCHVISION.get(config.name.lower())
    if own is None or config.root is None or config.download:
        return config
    root = Path(config.root).expanduser()
    splits = [root / config.train_split, root / config.val_split]
    if (root / own).exists() or not any(split.is_dir() for split in splits):
        return config
    return config.model_copy(update={"name": "folder"})


def label_by_folder(dataset: Any, title: str) -> None:
    """Let the classes of timm's data set be the folders directly below the split's folder, or at the top of its tar.

    Folders in which a tar wraps all others do not count. Hidden files and folders are left out.

    Raises:
        DataError: an image is outside these folders.
    """
    files = [tuple(file.split(os.sep)) for file in files_of(dataset)]
    seen = [file for file in files if not _hidden(file)]
    wrapped = 0
    if os.path.isfile(reader_of(dataset).root):
        while seen and min(map(len, seen)) > wrapped + 2 and len({file[wrapped] for file in seen}) == 1:
            wrapped += 1
    for file in seen:
        if len(file) < wrapped + 2:
            raise DataError(
                f"{title} has the image {os.path.join(*file)} outside its classes; expected <class>/<image>"
            )
    set_classes(dataset, [None if _hidden(file) else file[wrapped] for file in files])


def warn_of_others(dataset: Any, title: str) -> None:
    """Log how many files beside the images of a folder or tar file are no images by their names, and the first."""
    reader = reader_of(dataset)
    root = reader.root if reader is not None else dataset.root
    if reader is None:
        taken = {path for path, _ in dataset.samples}
    else:
        taken = {os.path.join(root, file) for file in files_of(dataset)}
    found = (os.path.join(root, file) for file in (_in_tar(root) if os.path.isfile(root) else _in_folder(root)))
    others = sorted(file for file in found if file not in taken and _counts(os.path.relpath(file, root)))
    # each process of a run opens the data
    if others and os.environ.get("RANK", "0") == "0":
        kinds = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in others)
        log.warning(
            "left out %d file%s of %s (%s), which %s no image by name; the first: %s",
            len(others), "s" * (len(others) > 1), title,
            ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common(5)),
            "are" if len(others) > 1 else "is", escaped(others[0]),
        )  # fmt: skip


def escaped(name: str) -> str:
    """Return a file's name with bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _counts(file: str) -> bool:
    """Whether a user may take the file for one of the images: hidden ones count if their suffix is an image's."""
    return not _hidden(file.split(os.sep)) or file.lower().endswith(SUFFIXES)


def _in_folder(root: str) -> Iterator[str]:
    for folder, _, files in os.walk(root, followlinks=True):
        yield from (os.path.relpath(os.path.join(folder, file), root) for file in files)


def _in_tar(tar: str | BinaryIO) -> Iterable[str]:
    """Yield the files of a tar, and those of tars within it below a folder of their name, as `files_of` has them."""
    with tarfile.open(tar) if isinstance(tar, str) else tarfile.open(fileobj=tar) as archive:
        for member in archive:
            if member.isfile() and member.path.lower().endswith(".tar"):
                inner = os.path.splitext(os.path.basename(member.path))[0]
                yield from (os.path.join(inner, file) for file in _in_tar(archive.extractfile(member)))  # type: ignore[arg-type]
            elif member.isfile():
                yield os.path.normpath(member.path)
