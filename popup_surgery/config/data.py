"""The section `data` of a recipe."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .keys import Key
from .sections import STRICT, Finite, Fraction, Positive, Share, data_title


class Data(BaseModel):
    """A data set, and how its images become batches.

    Attributes:
        name: `digits`, or one of timm's names: `torch/cifar10`; `folder` (of folders, or of tar files that the two
            splits name, such as `train.tar`); `hfds/…`; `hfids/…` (streamed); or `wds/…` for shards that the two
            splits name, such as `train-{0000..0146}.tar`.
        root: the data set's folder; for `hfds` and `hfids`, the folder of its cache. `digits` needs none.
        download: let the data set's library download it.
        train_split, val_split: the data set's names for its training and its validation images.
        batch_size: images per step, over all processes.
        max_train, max_validation: at most this many images, chosen at random, the same for every seed; null for all.
        input_size: channels, height, width; null for the network's own.
        mean, std: mean and standard deviation of each channel, for images scaled to 0 … 1.
        in_memory: hold the decoded images in memory as uint8. With null, this depends on their size, and on whether
            `scale`, `auto_augment`, `re_prob` or `color_jitter` need work on single images.
        pad: for images in memory: zero pixels added on each side before a random crop.
        hflip: probability of a horizontal flip.
        scale, ratio, color_jitter, auto_augment, re_prob: for images not in memory: arguments of timm's transforms.
        crop_pct, interpolation: how timm's transforms resize and crop images.
        same_size: what happens in validation and prediction, and to images in memory, if an image has the network's
            size already. `keep` leaves it as it is; `crop` resizes and crops it as all others. With null, it is as in
            versions before this key: `keep` if images are held in memory, and otherwise `crop`.
        permute_seed: permute the pixels of every image, its last step before the network, in one way that this seed
            decides: a task of permuted MNIST (Goodfellow et al., 2013). All channels move together. Null for none.
        image_key, label_key: for `hfds` and `hfids`, the columns of the images and the labels; null for `image` and
            `label`. For `wds`, the parts of a sample; the label may also be a key of its `json`.
        workers: processes that decode images, for each process that trains.
        on_error: what happens at an image that cannot be read. `stop` ends the run and names the image; `skip` leaves
            it out and counts it.
    """

    model_config = STRICT

    name: str = "digits"
    root: Annotated[str | None, Key(affects_result=False)] = None
    download: Annotated[bool, Key(affects_result=False)] = False
    train_split: str = "train"
    val_split: str = "validation"
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_validation: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    input_size: Annotated[
        Annotated[list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=3, max_length=3)] | None,
        Field(examples=[[3, 32, 32]]),
    ] = None
    mean: list[Finite] | None = None
    std: list[Positive] | None = None
    in_memory: bool | None = None
    pad: Annotated[int, Field(ge=0, le=1024)] = 0
    hflip: Fraction = 0.0
    scale: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    ratio: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    auto_augment: str | None = None
    re_prob: Fraction = 0.0
    crop_pct: Share = 0.875
    interpolation: str = "bilinear"
    same_size: Literal["keep", "crop"] | None = "keep"
    permute_seed: Annotated[Annotated[int, Field(ge=0, lt=2**64)] | None, Key(affects_speed=False)] = None
    image_key: str | None = None
    label_key: str | None = None
    workers: Annotated[int, Field(ge=0, le=256), Key(affects_result=False)] = 2
    on_error: Annotated[Literal["stop", "skip"], Key(affects_result=False)] = "stop"

    @property
    def title(self) -> str:
        """What tables call the data set."""
        return data_title(self.name, self.permute_seed)
