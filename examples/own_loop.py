"""Your own training loop around a converted network, and the result as one small file.

    python examples/own_loop.py

Trains on scikit-learn's digits in a few seconds on a CPU, and writes own_loop.popup.safetensors to the working
directory.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import popup_surgery as ps

FILE = Path("own_loop.popup.safetensors")


def network() -> nn.Module:
    """Any network of yours: 8 × 8 grey images to 10 logits."""
    convolutions = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def accuracy(model: nn.Module) -> float:
    with torch.inference_mode():
        return (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()


torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
labels = torch.from_numpy(digits.target).long()
held_out = torch.arange(len(labels)) % 5 == 4
training = torch.nonzero(~held_out).squeeze(1)

model = ps.convert(network(), k=0.5, seed=0)  # random frozen weights, one trainable score for each
scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.SGD(scores, lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)

for _ in range(15):
    for batch in training[torch.randperm(len(training))].split(64):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    schedule.step()

manifest = ps.save(model, FILE)
print(f"accuracy  {accuracy(model):.4f} of the converted network, on {int(held_out.sum())} held-out digits")
plain = ps.load(FILE, network())  # ordinary layers; a network of your own is filled, one of timm's is built
print(f"accuracy  {accuracy(plain):.4f} of the network in the file")
print(f"kept      {manifest.kept:,} of {manifest.weights:,} weights")
print(f"file      {FILE}, {FILE.stat().st_size:,} bytes")
