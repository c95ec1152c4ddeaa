"""The networks of the paper's CIFAR-10 experiments (section 4.1, after Frankle and Carbin, 2019), and a few more.

Conv2 to Conv8 and fc have ReLU between layers, and neither biases nor normalisation. Sizes for 10 classes of
3 × 32 × 32 images:

| net | convolutions (3 × 3, padding 1, each pair followed by a 2 × 2 max-pool) | fully connected | weights |
| --- | --- | --- | --- |
| conv2 | 64, 64 | 256, 256, 10 | 4,300,992 |
| conv4 | 64, 64, 128, 128 | 256, 256, 10 | 2,425,024 |
| conv6 | 64, 64, 128, 128, 256, 256 | 256, 256, 10 | 2,261,184 |
| conv8 | 64, 64, 128, 128, 256, 256, 512, 512 | 256, 256, 10 | 5,275,840 |
| fc | none | 300, 100, 10 | 266,200 (1 × 28 × 28) |
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..errors import ConversionError


class ConvNet(nn.Module):
    """Pairs of 3 × 3 convolutions, then linear layers: float [N, in_chans, H, W] to logits, float [N, num_classes].

    Args:
        convs: output channels of the convolutions. Their number is even, and may be 0.
        hidden: widths of the linear layers before the last.
        num_classes: number of outputs.
        in_chans: number of input channels.
        img_size: H and W, or one number for both.
        width: factor of all `convs` and `hidden`, which are rounded to the nearest integer, at least 1 (paper, section
            4.3).
        norm: put a batch norm before each ReLU.

    Raises:
        ConversionError: the image is too small for the pooling layers.
    """

    def __init__(
        self,
        convs: Sequence[int],
        hidden: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 32,
        width: float = 1.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        height, breadth = (img_size, img_size) if isinstance(img_size, int) else img_size
        pools = len(convs) // 2
        if min(height, breadth) >> pools == 0:
            raise ConversionError(
                f"img_size is {img_size}; {pools} pooling layers need at least {2**pools} pixels a side"
            )
        self.input_size = (in_chans, height, breadth)
        convs = [max(1, round(c * width)) for c in convs]
        hidden = [max(1, round(h * width)) for h in hidden]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise([in_chans, *convs])):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [*([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU(inplace=True)]
            if i % 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = (convs[-1] if convs else in_chans) * (height >> pools) * (breadth >> pools)
        layers = [nn.Flatten()]
        for inputs, outputs in pairwise([flat, *hidden]):
            layers.append(nn.Linear(inputs, outputs, bias=False))
            layers += [*([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*layers, nn.Linear([flat, *hidden][-1], num_classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def conv2(num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32, width: float = 1.0) -> ConvNet:
    """The paper's Conv2. Arguments are as for `ConvNet`."""
    return ConvNet([64, 64], [256, 256], num_classes, in_chans, img_size, width)


def conv4(num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32, width: float = 1.0) -> ConvNet:
    """The paper's Conv4. Arguments are as for `ConvNet`."""
    return ConvNet([64, 64, 128, 128], [256, 256], num_classes, in_chans, img_size, width)


def conv6(num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32, width: float = 1.0) -> ConvNet:
    """The paper's Conv6. Arguments are as for `ConvNet`."""
    return ConvNet([64, 64, 128, 128, 256, 256], [256, 256], num_classes, in_chans, img_size, width)


def conv8(num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32, width: float = 1.0) -> ConvNet:
    """The paper's Conv8. Arguments are as for `ConvNet`."""
    return ConvNet([64, 64, 128, 128, 256, 256, 512, 512], [256, 256], num_classes, in_chans, img_size, width)


def fc(num_classes: int = 10, in_chans: int = 1, img_size: int | Sequence[int] = 28, width: float = 1.0) -> ConvNet:
    """The fully connected 300-100 network for MNIST-like images. Arguments are as for `ConvNet`."""
    return ConvNet([], [300, 100], num_classes, in_chans, img_size, width)


def fc_bn(num_classes: int = 10, in_chans: int = 1, img_size: int | Sequence[int] = 28, width: float = 1.0) -> ConvNet:
    """`fc` with a batch norm before each ReLU, for many tasks: each has its own mask and statistics (SupSup, 2020)."""
    return ConvNet([], [300, 100], num_classes, in_chans, img_size, width, norm=True)


def cifar_resnet18(num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32) -> nn.Module:
    """ResNet-18 for small images: torchvision's, with a 3 × 3 stem of stride 1 and no max-pool; 11,164,352 weights.

    Args:
        num_classes, in_chans: number of outputs and of input channels.
        img_size: H and W, or one number for both. It is only recorded; the network takes images of any size.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.input_size = (in_chans, *((img_size, img_size) if isinstance(img_size, int) else img_size))
    return model


NETS = {net.__name__: net for net in (conv2, conv4, conv6, conv8, fc, fc_bn, cifar_resnet18)}
