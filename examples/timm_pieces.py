"""The pieces of timm's train.py around a converted network: optimiser, schedule, mixup and a moving average.

    python examples/timm_pieces.py

Trains timm's test_resnet on scikit-learn's digits, enlarged to 32 × 32 pixels, in some seconds on a CPU, and writes
timm_pieces.popup.safetensors to the working directory.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import popup_surgery as ps

FILE, EPOCHS = Path("timm_pieces.popup.safetensors"), 5


def accuracy(model: torch.nn.Module) -> float:
    with torch.inference_mode():
        return (model.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()


torch.manual_seed(0)
np.random.seed(0)  # timm's Mixup draws from NumPy's generator
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
images = torch.nn.functional.interpolate(images, size=32, mode="bilinear")
labels = torch.from_numpy(digits.target).long()
held_out = torch.arange(len(labels)) % 5 == 4
training = torch.nonzero(~held_out).squeeze(1)

model = ps.convert(ps.build("timm/test_resnet", in_chans=1, num_classes=10), k=0.5, seed=0)
optimizer = create_optimizer_v2(model, "sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)  # of the scores alone
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=10)
criterion = SoftTargetCrossEntropy()
average = ModelEmaV3(model, decay=0.9)  # averages the scores, and ranks its own

for epoch in range(epochs):
    model.train()
    for batch in training[torch.randperm(len(training))].split(64):
        pixels, targets = mixup(images[batch], labels[batch])  # batches of an even size, as all of these are
        optimizer.zero_grad()
        criterion(model(pixels), targets).backward()
        optimizer.step()
        average.update(model)
    scheduler.step(epoch + 1)

ps.save(average.module, FILE)
print(f"accuracy  {accuracy(model):.4f} of the network, {accuracy(average.module):.4f} of its average")
print(f"accuracy  {accuracy(ps.load(FILE)):.4f} of the network in the file: {FILE.stat().st_size:,} bytes")
