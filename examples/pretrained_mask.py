"""A mask on a pretrained backbone: one set of weights, one small file for each further task.

    python examples/pretrained_mask.py

Trains a dense network on the digits 0 to 4, keeps its weights as backbone.safetensors, and learns a mask on them that
tells the digits 5 to 9 apart. Takes a few seconds on a CPU.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import popup_surgery as ps

BACKBONE, FILE = Path("backbone.safetensors"), Path("five_to_nine.popup.safetensors")
NETWORK = {"name": "popup_surgery/conv2", "width": 0.25, "in_chans": 1, "img_size": 8, "num_classes": 5}


def task(first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels 0 … 4, and which images are held out, of the five digits from `first` on."""
    digits = load_digits()
    chosen = (digits.target >= first) & (digits.target < first + 5)
    images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target[chosen] - first).long()
    return images, labels, torch.arange(len(labels)) % 5 == 4


def train(model: nn.Module, images: Tensor, labels: Tensor, held_out: Tensor, lr: float) -> None:
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=lr, momentum=0.9)
    for _ in range(10):
        for batch in torch.nonzero(~held_out).squeeze(1)[torch.randperm(int((~held_out).sum()))].split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, held_out: Tensor) -> float:
    with torch.inference_mode():
        return (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()


torch.manual_seed(0)
dense = ps.build(**NETWORK)
train(dense, *task(0), lr=0.05)
save_file(dense.state_dict(), BACKBONE)
print(f"digits 0 to 4  {accuracy(dense, *task(0)):.4f} with the dense weights, {BACKBONE.stat().st_size:,} bytes")
print(f"digits 5 to 9  {accuracy(dense, *task(5)):.4f} with the dense weights")

model = ps.convert(ps.build(**NETWORK, pretrained=BACKBONE), k=0.7, scheme="pretrained")
train(model, *task(5), lr=0.1)
ps.save(model, FILE)  # the masks, and the digest of the weights that they belong to
plain = ps.load(FILE, base=BACKBONE)  # another base is refused
print(f"digits 5 to 9  {accuracy(plain, *task(5)):.4f} with the mask, {FILE.stat().st_size:,} bytes")
