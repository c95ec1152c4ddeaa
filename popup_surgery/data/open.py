"""Images into batches. The order and the augmentation are functions of (seed, epoch, image) alone."""

import logging
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config.schema import Data
from ..errors import DataError, unknown
from .sources import Key, Numbered, Rows, Shards, Source, Unreadable, reason, some

log = logging.getLogger("popup_surgery")

TRAIN, VALIDATION = "train", "validation"  # what a split is for, whatever it is called
LIBRARIES = ("torch", "hfds", "hfids", "wds")  # timm's prefixes of data set names
MEMORY_LIMIT = 1 << 30  # bytes of decoded images that are held without being asked
DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_REPORT = "DataLoader worker (pid"
_DEATH = re.compile(rf"{re.escape(_REPORT)}|received \d+ items of ancillary data")  # the second where it was sending

Batch = tuple[Tensor, Tensor]
TrainBatch = tuple[Tensor, Tensor, float]
Piece = tuple[Sequence[Key], float]  # images of one batch and the share of it that they are
_T = TypeVar("_T")


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

    def cut(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """This part's pieces of a whole batch, a list or an array, and the share of it that each is.

        A batch too small to give every piece an image repeats its first one, with the share 0, because all processes
        must take part in every step.
        """
        size, more = divmod(len(batch), self.pieces)
        for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
            start = i * size + min(i, more)
            piece = batch[start : start + size + (i < more)]
            yield (piece, len(piece) / len(batch)) if len(piece) else (batch[:1], 0.0)


WHOLE = Part()


class Batches(Protocol):
    """A data set ready for training. Images are float32 [batch, channels, height, width], labels int64 [batch].

    Attributes:
        classes: names of the classes in the order of their labels; none where the data set does not say.
        counts: images of each role, where known.
        skipped: images that this process has left out, which could not be read; whoever counts them sets it back.
        left_out: the first of them and what is wrong with it; empty where there was none.
    """

    classes: list[str]
    counts: Mapping[str, int | None]
    skipped: int
    left_out: str

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        """`part` of the training images from the batch `first` on, in the epoch's order, augmented.

        The third value is the share of its whole batch that a piece is; less where images of it are left out, and 0,
        with one image of zeros, where all are.
        """

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        """The validation images that fall to a process of `part`, each of them once."""

    def steps(self, role: str = TRAIN) -> int | None:
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
    most = {TRAIN: config.max_train, VALIDATION: config.max_validation}
    if config.name == "digits":
        if config.root is not None:
            raise DataError(f"data.root is {config.root!r}; digits come with scikit-learn and need no folder")
        splits = {role: _digits(name, most[role]) for role, name in names.items()}
        return InMemory(config, input_size, seed, device, splits, [str(i) for i in range(10)])
    if config.name != "folder" and config.name.partition("/")[0] not in LIBRARIES:
        raise unknown("data set", config.name, ["digits", "folder", *(f"{library}/…" for library in LIBRARIES)])
    sources = {role: _open(config, name, input_size, most[role]) for role, name in names.items()}
    classes = [source.classes for source in sources.values()]
    if train and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1])) or ["the order"]
        raise DataError(
            f"data set {config.name}: {names[TRAIN]} and {names[VALIDATION]} have other classes, such as {odd[0]!r}"
        )
    if not _in_memory(config, input_size, list(sources.values())):
        return Streamed(config, input_size, seed, device, sources, classes[0])
    held, missing = {}, {}
    for role, source in sources.items():
        held[role], missing[role] = _decode(source, config, input_size, progress, role)
    return InMemory(config, input_size, seed, device, held, classes[0], missing)


def open_image(path: Path, config: Data, input_size: tuple[int, int, int]) -> Tensor:
    """One image as validation sees it: float32 of `input_size`. `DataError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = _ToBytes(config, input_size)(image.convert(_mode(input_size)))
    except OSError as error:
        raise DataError(f"{path} is no image that can be read: {reason(error)}") from error
    return _Normalise(config, input_size, torch.device("cpu"))(pixels)


class _Prepared:
    """What both kinds of data have."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        classes: list[str],
        counts: Mapping[str, int | None],
    ) -> None:
        self.config, self.seed, self.device, self.classes, self.counts = config, seed, device, classes, counts
        self.skipped, self.left_out = 0, ""
        self.normalise = _Normalise(config, input_size, device)

    def steps(self, role: str = TRAIN) -> int | None:
        count = self.counts[role]
        return None if count is None else -(-count // self.config.batch_size)

    def _leave_out(self, missing: Sequence[Unreadable]) -> None:
        self.skipped += len(missing)
        self.left_out = self.left_out or "".join(map(str, missing[:1]))


class InMemory(_Prepared):
    """Decoded images held as uint8 on the device, cropped and flipped there a batch at a time."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        splits: dict[str, Batch],
        classes: list[str],
        missing: Mapping[str, list[Unreadable]] = MappingProxyType({}),
    ) -> None:
        for images, _ in splits.values():
            if tuple(images.shape[1:]) != input_size:
                found, wanted = " × ".join(map(str, images.shape[1:])), " × ".join(map(str, input_size))
                raise DataError(f"the images of {config.name} are {found}; the network expects {wanted}")
        counts = {role: len(labels) for role, (_, labels) in splits.items()}
        super().__init__(config, input_size, seed, device, classes, counts)
        self.splits = {name: (images.to(device), labels.to(device)) for name, (images, labels) in splits.items()}
        self.missing = missing  # every process has read all images, so that the first alone counts these

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        images, labels = self.splits[TRAIN]
        generator = np.random.default_rng([self.seed, epoch])
        pad, count = self.config.pad, len(labels)
        order = generator.permutation(count)
        shifts = generator.integers(0, 2 * pad + 1, (count, 2))
        flips = generator.random(count) < self.config.hflip
        if first == 0 and part.rank == 0:
            self._leave_out(self.missing.get(TRAIN, ()))
        size = self.config.batch_size
        for start in range(first * size, count, size):
            for chosen, weight in part.cut(order[start : start + size]):
                index, shift, flip = (
                    torch.from_numpy(a[chosen]).to(images.device) for a in (np.arange(count), shifts, flips)
                )
                yield self.normalise(_crop(images[index], pad, shift, flip)), labels[index], weight

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        if part.rank == 0:
            self._leave_out(self.missing.get(VALIDATION, ()))
        images, labels = (held[part.rank :: part.processes] for held in self.splits[VALIDATION])
        size = self.config.batch_size
        for pixels, label in zip(images.split(size), labels.split(size), strict=True):
            yield self.normalise(pixels), label


class Streamed(_Prepared):
    """Images decoded and transformed by worker processes as they are needed, with timm's transforms."""

    def __init__(
        self,
        config: Data,
        input_size: tuple[int, int, int],
        seed: int,
        device: torch.device,
        sources: dict[str, Source],
        classes: list[str],
    ) -> None:
        from timm.data import create_transform

        super().__init__(config, input_size, seed, device, classes, {r: source.count for r, source in sources.items()})
        self.sources, self.input_size = sources, input_size
        mean, std = _mean_std(config, input_size[0])
        common: dict[str, Any] = {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": config.interpolation,
            "use_prefetcher": not config.re_prob,  # uint8, to be normalised on the device; erasing is after that
        }
        augment: dict[str, Any] = {
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "re_prob": config.re_prob,
        }
        augment |= {"scale": config.scale, "ratio": config.ratio, "auto_augment": config.auto_augment}
        try:
            self.transforms = {
                VALIDATION: create_transform(**common, crop_pct=config.crop_pct),
                TRAIN: create_transform(**common, **augment, is_training=True),
            }
        except Exception as error:
            raise DataError(
                f"timm makes no transforms of data.interpolation={config.interpolation!r}, "
                f"data.auto_augment={config.auto_augment!r} and the like: {error!r}"
            ) from error

    def train(self, epoch: int, part: Part = WHOLE, first: int = 0) -> Iterator[TrainBatch]:
        entropy, size = [self.seed, epoch], self.config.batch_size
        keys = islice(self.sources[TRAIN].keys(entropy), first * size, None)
        return self._batches(TRAIN, entropy, (piece for batch in _chunks(keys, size) for piece in part.cut(batch)))

    def validation(self, part: Part = WHOLE) -> Iterator[Batch]:
        keys = islice(self.sources[VALIDATION].keys(None), part.rank, None, part.processes)
        plan = ((chunk, 1.0) for chunk in _chunks(keys, self.config.batch_size))
        return ((images, labels) for images, labels, weight in self._batches(VALIDATION, [], plan) if weight)

    def _batches(self, role: str, entropy: list[int], plan: Iterator[Piece]) -> Iterator[TrainBatch]:
        pieces = _Pieces(self.sources[role], self.transforms[role], self.input_size, entropy)
        for images, labels, weight, missing in _read(pieces, plan, self.config, self.device.type == "cuda"):
            self._leave_out(missing)
            images = self.normalise(images.to(self.device, non_blocking=True))
            yield images, labels.to(self.device, non_blocking=True), weight


class _Pieces(Dataset):
    """Pieces of batches, read and transformed: each image under a seed of its own, whatever process reads it."""

    def __init__(self, source: Source, transform: Any, input_size: tuple[int, int, int], entropy: list[int]) -> None:
        self.source, self.transform, self.input_size, self.entropy = source, transform, input_size, entropy
        self.mode = _mode(input_size)

    def __getitem__(self, piece: Piece) -> tuple[Tensor, Tensor, float, list[Unreadable]]:
        keys, weight = piece
        with ambient_seed(self.entropy, gpu=False):
            found = [self._read(number, key) for number, key in keys]
        missing = [image for image in found if weight and isinstance(image, Unreadable)]
        images = [image for image in found if not isinstance(image, Unreadable)]
        if not images:
            return torch.zeros(1, *self.input_size), torch.zeros(1, dtype=torch.int64), 0.0, missing
        return *default_collate(images), weight * len(images) / len(found), missing

    def _read(self, number: int, key: Any) -> tuple[Tensor, int] | Unreadable:
        seed_generators([*self.entropy, number], gpu=False)
        try:
            image, label = self.source.read(key)
            if image.mode != self.mode:
                image = image.convert(self.mode)
            return self.transform(image), int(label)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            return Unreadable(self.source.name(key), reason(error))


def _read(
    pieces: _Pieces, plan: Iterable[Piece], config: Data, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor, float, list[Unreadable]]]:
    """The pieces of a plan in its order, read by worker processes."""
    loader = DataLoader(
        pieces,
        sampler=plan,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=config.workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_outlive_signals,
    )
    with worker_deaths(ConnectionError, EOFError, FileNotFoundError):
        for images, labels, weight, missing in loader:
            if missing and config.on_error == "stop":
                raise DataError(f"{missing[0]}; data.on_error=skip leaves such images out")
            yield images, labels, weight, missing


@contextmanager
def worker_deaths(*other: type[Exception]) -> Iterator[None]:
    """Within it the death of a loader's worker process is a `DataError`; so are errors that come of it, the `other`.

    torch raises its own from a signal's handler, wherever the process happens to be, also where it handles others.
    """
    try:
        yield
    except Exception as error:
        death: BaseException | None = error
        while death is not None and not _DEATH.match(str(death)):
            death = death.__cause__ or death.__context__
        if death is None and not isinstance(error, other):
            raise
        if death is None or not str(death).startswith(_REPORT):
            death = _report() or death or error
        detail = " ".join(str(death).split()).rstrip(".") or type(death).__name__
        raise DataError(
            f"a worker process of the data loader died: {detail}; where memory is short, data.workers=0 does without"
        ) from death


def _report() -> RuntimeError | None:
    """torch's error for a death that showed otherwise; not awaited here, it comes wherever the process is by then."""
    try:
        time.sleep(1)
    except RuntimeError as error:
        return error
    return None


def warn_of_skipped(count: int, first: str) -> None:
    """Say how many images were left out, and why the first of them."""
    log.warning("left out %d image%s that could not be read; the first: %s", count, "s" * (count != 1), first)


def _outlive_signals(worker: int) -> None:
    """Signals that stop a run are sent to all its processes; a worker obeys only the process that it works for."""
    for name in {"SIGINT", "SIGUSR1"} & vars(signal).keys():
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _as_it_is(piece: _T) -> _T:
    return piece


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


@contextmanager
def ambient_seed(entropy: list[int], gpu: bool = True) -> Iterator[None]:
    """Within it the generators of Python, NumPy and PyTorch start from `entropy`; after it they are as before."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if gpu and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        seed_generators(entropy, gpu)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_generators(entropy: list[int], gpu: bool = True) -> None:
    """Start the generators of Python, NumPy and PyTorch from `entropy`; those of GPUs too, unless told otherwise."""
    first, second, third = map(int, np.random.SeedSequence(entropy).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    # where no GPU is in use, manual_seed writes down the whole stack, for a tenth of an image's time
    (torch.manual_seed if gpu else torch.default_generator.manual_seed)(third)


class _Normalise:
    """uint8 images, [..., channels, height, width], to float32 of mean 0 and deviation 1 or so; others as they are."""

    def __init__(self, config: Data, input_size: tuple[int, int, int], device: torch.device) -> None:
        mean, std = _mean_std(config, input_size[0])
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return images.float().sub_(self.mean).div_(self.std)


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


def _digits(split: str, most: int | None) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; every fifth is for validation."""
    from sklearn.datasets import load_digits

    if split not in (TRAIN, VALIDATION):
        raise DataError(f"digits has no split {split!r}; expected {TRAIN!r} or {VALIDATION!r}")
    digits = load_digits()
    (chosen,) = np.nonzero((np.arange(len(digits.target)) % 5 == 4) == (split == VALIDATION))
    chosen = chosen[some(len(chosen), most)]
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(digits.target[chosen].astype(np.int64))


def check_root(config: Data) -> None:
    """`DataError` where the data set needs a folder and none is given."""
    if config.root is None and config.name.partition("/")[0] not in ("digits", "hfds", "hfids"):
        raise DataError(f"data set {config.name} needs its folder: pass --data-dir DIR, or set data.root")


def _open(config: Data, split: str, input_size: tuple[int, int, int], most: int | None) -> Source:
    from timm.data import create_dataset

    library, _, path = config.name.partition("/")
    root = config.root and os.path.expanduser(config.root)
    check_root(config)
    elsewhere = library in ("hfds", "hfids") or config.download or (library == "wds" and ":" in str(root))
    if root is not None and not elsewhere and not Path(root).exists():
        raise DataError(f"data.root is {root!r}, which does not exist; expected the folder of {config.name}")
    title = f"data set {config.name} ({split})"
    if most is not None and library in ("hfids", "wds"):
        raise DataError(f"{title} is walked as a whole; expected data.max_train and data.max_validation to be null")
    try:
        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)  # an info file is no must
        if library == "hfids":
            return Rows(path, split, root, title)
        name = "" if config.name == "folder" else config.name
        dataset = create_dataset(name, root, split, download=config.download, input_img_mode=_mode(input_size))
        if library == "wds":
            return Shards(dataset.reader, title)
    except Exception as error:
        hint = "; --set data.download=true fetches it" if "download" in str(error) else ""
        if isinstance(error, ImportError) or "install" in str(error):
            hint = "; pip install 'popup-surgery[data]' brings what it needs"
        message = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{title} cannot be opened: {message}{hint}") from error
    if root is not None and config.name == "folder" and Path(dataset.reader.root) == Path(root):
        raise DataError(f"{root!r} has no folder for {split!r}; expected {root}/{split}/<class>/<image>")
    return Numbered(dataset, title, most)


def _in_memory(config: Data, input_size: tuple[int, int, int], sources: list[Source]) -> bool:
    numbered = all(isinstance(source, Numbered) for source in sources)
    if config.in_memory and not numbered:
        raise DataError(f"data.in_memory is true; data set {config.name} is read in a walk and cannot be held")
    if config.in_memory is not None:
        return config.in_memory
    if config.scale or config.auto_augment or config.re_prob or config.color_jitter or not numbered:
        return False
    return sum(source.count or 0 for source in sources) * int(np.prod(input_size)) <= MEMORY_LIMIT


def _decode(
    source: Source, config: Data, input_size: tuple[int, int, int], progress: Progress, role: str
) -> tuple[Batch, list[Unreadable]]:
    """A split's images, uint8, and labels; and what of it could not be read."""
    count = source.count or 0
    images = torch.empty((count, *input_size), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    start, missing = 0, []
    pieces = _Pieces(source, _ToBytes(config, input_size), input_size, [])
    plan = ((chunk, 1.0) for chunk in _chunks(source.keys(None), 500))
    with progress(-(-count // 500), f"reading {role} images") as step:
        for part, label, weight, unreadable in _read(pieces, plan, config):
            missing += unreadable
            end = start + len(label) if weight else start
            images[start:end], labels[start:end] = part[: end - start], label[: end - start]
            start = end
            step()
    if not start:
        raise DataError("; ".join([f"no {role} image of data set {config.name} can be read", *map(str, missing[:1])]))
    return (images[:start], labels[:start]), missing
