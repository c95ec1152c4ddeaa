"""Mixing of training images: timm's mixup and cutmix."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from ..config.schema import Training
from ..errors import RunError


class Mixing:
    """Mixup and cutmix of the images of a batch in pairs, as the recipe sets them.

    timm's `Mixup` does the work; it draws from NumPy's generator.

    Raises:
        RunError: the data set does not say how many classes it has.
    """

    def __init__(self, training: Training, classes: int) -> None:
        from timm.data import Mixup

        if not classes:
            raise RunError(
                "training.mixup and cutmix need the number of classes, and the data set does not give it; set both to 0"
            )
        self.classes = classes
        self.mixup: Any = Mixup(
            training.mixup, training.cutmix, None, training.mixup_prob, training.mixup_switch_prob,
            training.mixup_mode, label_smoothing=0.0, num_classes=classes,
        )  # fmt: skip

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed images and the probabilities of their classes. The last of an odd number is not mixed."""
        targets = functional.one_hot(labels, self.classes).float()
        even = len(images) // 2 * 2
        if even:
            images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets
