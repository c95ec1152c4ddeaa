"""Images into batches. The order and the augmentation are functions of (seed, epoch, image) alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import DataError, unknown
from .recipe import Data

TRAIN, VALIDATION = "train", "validation"  # what a split is for, whatever it is called
LIBRARIES = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's prefixes of data set names
MEMORY_LIMIT = 1 << 30  # bytes of decoded images that are held without being asked
DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batch = tuple[Tensor, Tensor]
TrainBatch = tuple[Tensor, Tensor, float]


class Progress(Protocol):
    """What counts the steps of something long: `with progress(total, what) as step: step()`."""

    def __call__(self, total: int | None, what: str) -> Any: ...


@dataclass(frozen=True)
class Part:
    """The part of each batch that falls to one of several processes, in so many pieces one after another."""

    rank: int = 0
    processes: int = 1
    accumulate: int = 1

    @property
    def pieces(self) -> int:
        """Into how many pieces a whole batch is cut."""
        return self.processes * self.accumulate

    def batches(self, order: NDArray[np.int64], size: int, first: int) -> Iterator[tuple[NDArray[np.int64], float]]:
        """Indices of this part's pieces from the batch `first` on, and the share of the whole batch that each is.

        A batch too small to give every piece an image repeats its first one, with the share 0, because all processes
        must take part in every step.
        """
        for start in range(first * size, len(order), size):
            batch = order[start : start + size]
            mine = slice(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
            for piece in np.array_split(batch, self.pieces)[mine]:
                yield (piece, len(piece) / len(batch)) if len(piece) else (batch[:1], 0.0)


WHOLE = Part()


class Batches(Protocol):
    """A data set ready for training. Images are float32 [batch, channels, height, width], labels int64 [batch]."""

    classes: list[str]

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        """`part` of the training images from the batch `first` on, in the epoch's order, augmented.

        The third value is the share of its whole batch that a piece is.
        """

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        """The validation images that fall to a process of `part`, each of them once."""

    def steps(self, split: str = TRAIN) -> int | None:
        """Batches in an epoch of the training or the validation images, where known."""


def open_data(
    config: Data,
    input_size: tuple[int, int, int],
    seed: int,
    device: torch.device,
    progress: Progress,
    train: bool = True,
) -> Batches:
    """The data set that `config` names, for images of `input_size`.

    Args:
        train: without it only the validation images are opened.

    Raises:
        DataError: it is missing, unreadable, or its two splits have other classes.
    """
    if (config.mean and len(config.mean) != input_size[0]) or (config.std and len(config.std) != input_size[0]):
        raise DataError(
            f"data.mean and data.std have {len(config.mean or config.std or [])} values for {input_size[0]} channels"
        )
    names = {TRAIN: config.train_split, VALIDATION: config.val_split}
    if not train:
        del names[TRAIN]
    if config.name == "digits":
        if config.root is not None:
            raise DataError(f"data.root is {config.root!r}; digits come with scikit-learn and need no folder")
        splits = {role: _digits(name) for role, name in names.items()}
        return InMemory(config, input_size, seed, device, splits, [str(i) for i in range(10)])
    if config.name != "folder" and config.name.partition("/")[0] not in LIBRARIES:
        raise unknown("data set", config.name, ["digits", "folder", *(f"{library}/…" for library in LIBRARIES)])
    datasets = {role: _open(config, name, role == TRAIN, input_size) for role, name in names.items()}
    classes = [_classes(dataset) for dataset in datasets.values()]
    if train and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1])) or ["the order"]
        raise DataError(
            f"data set {config.name}: {names[TRAIN]} and {names[VALIDATION]} have other classes, such as {odd[0]!r}"
        )
    if _in_memory(config, input_size, list(datasets.values())):
        held = {role: _decode(dataset, config, input_size, progress, role) for role, dataset in datasets.items()}
        return InMemory(config, input_size, seed, device, held, classes[0])
    return Streamed(config, input_size, seed, device, datasets, classes[0])


def open_image(path: Path, config: Data, input_size: tuple[int, int, int]) -> Tensor:
    """One image as validation sees it: float32 of `input_size`. `DataError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = _Compose(_mode(input_size), _ToBytes(config, input_size))(image)
    except OSError as error:
        raise DataError(f"{path} is no image that can be read: {error}") from error
    mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in _mean_std(config, input_size[0]))
    return (pixels.float() - mean) / std


class InMemory:
    """Decoded images held as uint8 on the device, cropped and flipped there a batch at a time."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        splits: dict[str, tuple[Tensor, Tensor]],
        classes: list[str],
    ) -> None:
        for images, _ in splits.values():
            if tuple(images.shape[1:]) != input_size:
                found, wanted = " × ".join(map(str, images.shape[1:])), " × ".join(map(str, input_size))
                raise DataError(f"the images of {config.name} are {found}; the network expects {wanted}")
        self.config, self.seed, self.classes = config, seed, classes
        self.splits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in splits.items()}
        mean, std = _mean_std(config, input_size[0])
        self.mean = (torch.tensor(mean, device=device) * 255).view(-1, 1, 1)
        self.std = (torch.tensor(std, device=device) * 255).view(-1, 1, 1)

    def steps(self, split: str = TRAIN) -> int:
        return -(-len(self.splits[split][1]) // self.config.batch_size)

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        images, labels = self.splits[TRAIN]
        generator = np.random.default_rng([self.seed, epoch])
        pad, count = self.config.pad, len(labels)
        order = generator.permutation(count)
        shifts = generator.integers(0, 2 * pad + 1, (count, 2))
        flips = generator.random(count) < self.config.hflip
        for chosen, weight in part.batches(order, self.config.batch_size, first):
            index, shift, flip = (
                torch.from_numpy(a[chosen]).to(images.device) for a in (np.arange(count), shifts, flips)
            )
            yield self._normalise(_crop(images[index], pad, shift, flip)), labels[index], weight

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        images, labels = (held[part.rank :: part.processes] for held in self.splits[VALIDATION])
        for some, label in zip(images.split(self.config.batch_size), labels.split(self.config.batch_size), strict=True):
            yield self._normalise(some), label

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)


class Streamed:
    """Images decoded and transformed by worker processes as they are needed, with timm's transforms."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        datasets: dict[str, Any],
        classes: list[str],
    ) -> None:
        from timm.data import create_transform

        self.config, self.seed, self.device, self.classes = config, seed, device, classes
        self.datasets = datasets
        mean, std = _mean_std(config, input_size[0])
        common: dict[str, Any] = {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": config.interpolation,
        }
        augment: dict[str, Any] = {
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "re_prob": config.re_prob,
        }
        augment |= {"scale": config.scale, "ratio": config.ratio, "auto_augment": config.auto_augment}
        try:
            transforms = {
                VALIDATION: create_transform(**common, crop_pct=config.crop_pct),
                TRAIN: create_transform(**common, **augment, is_training=True),
            }
        except Exception as error:
            raise DataError(
                f"timm makes no transforms of data.interpolation={config.interpolation!r}, "
                f"data.auto_augment={config.auto_augment!r} and the like: {error!r}"
            ) from error
        for role, dataset in datasets.items():
            dataset.transform = _Compose(_mode(input_size), transforms[role])

    def steps(self, split: str = TRAIN) -> int | None:
        dataset = self.datasets[split]
        return -(-len(dataset) // self.config.batch_size) if hasattr(dataset, "__len__") else None

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        dataset = self.datasets[TRAIN]
        if isinstance(dataset, IterableDataset):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            weight = 1 / part.pieces
            size = max(1, self.config.batch_size // part.pieces)
            skipped = islice(self._batches(dataset, batch_size=size), first * part.accumulate, None)
            yield from ((images, labels, weight) for images, labels in skipped)
            return
        order = np.random.default_rng([self.seed, epoch]).permutation(len(dataset))
        plan = list(part.batches(order, self.config.batch_size, first))
        batches = self._batches(_Seeded(dataset, self.seed, epoch), batch_sampler=[c.tolist() for c, _ in plan])
        for (images, labels), (_, weight) in zip(batches, plan, strict=True):
            yield images, labels, weight

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        dataset = self.datasets[VALIDATION]
        if isinstance(dataset, IterableDataset):
            return self._batches(dataset, batch_size=self.config.batch_size)
        mine = range(part.rank, len(dataset), part.processes)
        return self._batches(dataset, batch_size=self.config.batch_size, sampler=mine)

    def _batches(self, dataset: Any, **how: Any) -> Iterator[Batch]:
        loader = DataLoader(
            dataset,
            **how,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
        )
        for images, labels in _reading(loader, self.config):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Seeded(Dataset):
    """Each image transformed under a seed of its own, whatever process does it."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with ambient_seed([self.seed, self.epoch, index]):
            return self.dataset[index]


@contextmanager
def ambient_seed(entropy: list[int]) -> Iterator[None]:
    """Within it the generators of Python, NumPy and PyTorch start from `entropy`; after it they are as before."""
    states = random.getstate(), np.random.get_state()
    first, second, third = map(int, np.random.SeedSequence(entropy).generate_state(3))
    with torch.random.fork_rng():
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _reading(loader: DataLoader, config: Data) -> Iterator[Batch]:
    """The loader's batches; what it cannot read is a `DataError`."""
    try:
        yield from loader
    except Exception as error:
        message = " ".join(str(error).split())[-300:]
        raise DataError(f"an image of data set {config.name} in {config.root} cannot be read: {message}") from error


class _Compose:
    """Colour mode, then a transform; a class, so that worker processes can be sent it."""

    def __init__(self, mode: str, transform: Any) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Any) -> Any:
        return self.transform(image.convert(self.mode))


class _ToBytes:
    """A PIL image as uint8 [channels, height, width], resized and centre-cropped where it has another size."""

    def __init__(self, config: Data, input_size: tuple[int, int, int]) -> None:
        from timm.data import create_transform

        self.size = input_size[1:]
        self.resize = create_transform(
            input_size, crop_pct=config.crop_pct, interpolation=config.interpolation, normalize=False
        )

    def __call__(self, image: Any) -> Tensor:
        if image.size == self.size[::-1]:
            pixels = np.array(image)
            return torch.from_numpy(pixels.reshape(*self.size, -1)).permute(2, 0, 1)
        return self.resize(image)


def _crop(images: Tensor, pad: int, shift: Tensor, flip: Tensor) -> Tensor:
    """Windows of zero-padded images at `shift`, int [batch, 2] in 0 … 2·pad, mirrored where `flip`, bool [batch]."""
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (pad,) * 4)
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = shift[:, 1:] + torch.where(flip[:, None], columns.flip(1), columns)
    first = torch.arange(batch, device=images.device)[:, None, None, None]
    second = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[first, second, rows[:, None, :, None], columns[:, None, None, :]]


def _mean_std(config: Data, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = config.mean or (DEFAULT_MEAN if channels == 3 else [0.5] * channels)
    std = config.std or (DEFAULT_STD if channels == 3 else [0.5] * channels)
    return tuple(mean), tuple(std)


def _mode(input_size: tuple[int, int, int]) -> str:
    return "L" if input_size[0] == 1 else "RGB"


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; every fifth is for validation."""
    from sklearn.datasets import load_digits

    if split not in (TRAIN, VALIDATION):
        raise DataError(f"digits has no split {split!r}; expected {TRAIN!r} or {VALIDATION!r}")
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 4) == (split == VALIDATION)
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(digits.target[chosen].astype(np.int64))


def _open(config: Data, split: str, training: bool, input_size: tuple[int, int, int]) -> Any:
    from timm.data import create_dataset

    root = config.root and str(Path(config.root).expanduser())
    remote = config.name.split("/")[0] in ("hfds", "hfids", "tfds", "wds")
    if root is None and not remote:
        raise DataError(f"data set {config.name} needs its folder: pass --data-dir DIR, or set data.root")
    if root is not None and not Path(root).exists() and not config.download and not remote:
        raise DataError(f"data.root is {root!r}, which does not exist; expected the folder of {config.name}")
    name = "" if config.name == "folder" else config.name
    try:
        dataset = create_dataset(
            name, root, split, is_training=training, download=config.download, batch_size=config.batch_size,
            input_img_mode=_mode(input_size),
        )  # fmt: skip
    except Exception as error:
        hint = "; --set data.download=true fetches it" if "download" in str(error) else ""
        message = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data set {config.name} ({split}) cannot be opened: {message}{hint}") from error
    if root is not None and config.name == "folder" and Path(dataset.reader.root) == Path(root):
        raise DataError(f"{root!r} has no folder for {split!r}; expected {root}/{split}/<class>/<image>")
    return dataset


def _classes(dataset: Any) -> list[str]:
    """Names of the classes in the order of their labels; none where the data set does not say."""
    reader = getattr(dataset, "reader", None)
    places = (reader, "class_to_idx"), (reader, "class_name_to_idx"), (dataset, "class_to_idx")
    mapping: dict[str, int] = next((found for place, name in places if (found := getattr(place, name, None))), {})
    return [str(label) for label, _ in sorted(mapping.items(), key=lambda item: item[1])]


def _in_memory(config: Data, input_size: tuple[int, int, int], datasets: list[Any]) -> bool:
    if config.in_memory is not None:
        return config.in_memory
    if config.scale or config.auto_augment or config.re_prob or config.color_jitter:
        return False
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        return False
    return sum(map(len, datasets)) * int(np.prod(input_size)) <= MEMORY_LIMIT


def _decode(
    dataset: Any, config: Data, input_size: tuple[int, int, int], progress: Progress, role: str
) -> tuple[Tensor, Tensor]:
    dataset.transform = _Compose(_mode(input_size), _ToBytes(config, input_size))
    images = torch.empty((len(dataset), *input_size), dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    start = 0
    with progress(-(-len(dataset) // 500), f"reading {role} images") as step:
        for part, label in _reading(DataLoader(dataset, 500, num_workers=config.workers), config):
            images[start : start + len(label)] = part
            labels[start : start + len(label)] = label
            start += len(label)
            step()
    return images, labels
