"""Parts of training by themselves: a run's folder, and masks of a plain network's weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from popup_surgery import Recipe
from popup_surgery.experiment.setup import run_folder
from popup_surgery.training.mask_history import MaskHistory
from popup_surgery.training.run_folder import Kind
from popup_surgery.training.weight_masks import WeightMasks

TICKET = ["surgery=none", "lottery_ticket={k: 0.3, rounds: 1}", "training.epochs=2"]


@pytest.mark.parametrize(
    ("overrides", "kind", "final", "masks", "pictures"),
    [
        ([], Kind.ARTIFACT, "net.popup.safetensors", None, ["curve.png", "masks.png"]),
        (["surgery=none"], Kind.WEIGHTS, "net.safetensors", None, ["curve.png"]),
        (
            ["surgery.learner=dnw"], Kind.MASKED_WEIGHTS, "net.safetensors", "net.masks.safetensors",
            ["curve.png", "masks.png"],
        ),
        (TICKET, Kind.MASKED_WEIGHTS, "net.safetensors", "net.masks.safetensors", ["curve.png", "masks.png"]),
    ],
)  # fmt: skip
def test_a_folder_knows_what_its_run_ends_with(
    overrides: list[str], kind: Kind, final: str, masks: str | None, pictures: list[str], tmp_path: Path
) -> None:
    run = run_folder(tmp_path, Recipe.load("digits", overrides), "net")
    assert (run.kind, run.final) == (kind, tmp_path / final)
    assert run.masks == (masks and tmp_path / masks)
    assert [path.name for path in run.pictures] == pictures
    for path in (*run.pictures, *filter(None, [run.masks])):
        path.touch()
    assert not run.finished
    run.final.touch()
    assert run.finished


def test_weights_outside_their_masks_stay_0() -> None:
    """Also with momentum of a step before, and gradients that are clipped by their norm see none of them."""
    layer = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    mask = torch.tensor([[True, False, True, False]] * 2)
    masks = WeightMasks(layer, {"weight": mask}, torch.device("cpu"))
    masks.apply_during(optimizer)
    mask.zero_()  # the caller's own
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 4)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[1, 0, 1, 0]] * 2
        optimizer.step()
        assert (layer.weight != 0).tolist() == [[True, False, True, False]] * 2
    masks.tensors["weight"][:, 0] = False
    masks.zero()
    assert (layer.weight != 0).tolist() == [[False, False, True, False]] * 2


def test_masks_are_compared_with_the_epoch_before_and_the_start() -> None:
    start = torch.tensor([True, True, False, False, False])
    history = MaskHistory({"weight": start, "other": torch.ones(5, dtype=torch.bool)})
    assert history.add({"weight": start.flip(0), "other": torch.ones(5, dtype=torch.bool)}) == 0.4
    assert history.add({"weight": start.roll(1), "other": torch.ones(5, dtype=torch.bool)}) == 0.4
    moved, other = history.layers()
    assert (moved.name, moved.density, moved.changed, moved.overlap) == ("weight", 0.4, 0.8, 0.5)
    assert (other.density, other.changed, other.overlap) == (1, 0, 1)
