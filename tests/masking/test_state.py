"""What conversion leaves on modules: one record, and the marks of version 0.1.0 become it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from popup_surgery import bake, build, convert, masks
from popup_surgery.masking.bake import clone_with
from popup_surgery.masking.settings import MaskingSettings
from popup_surgery.masking.state import STATE, state_of
from popup_surgery.models.architecture import ORIGIN, describe, origin_of
from support import GOLDEN

SAVED = sorted(path.stem for path in (GOLDEN / "saved").glob("*.pt") if "state_dict" not in path.stem)


def marks(model: nn.Module) -> set[str]:
    return {key for module in model.modules() for key in vars(module) if key.startswith("_popup")}


def test_conversion_leaves_one_record_on_each_module() -> None:
    model = convert(build("conv2", width=0.1), 0.4)
    assert marks(model) == {STATE, ORIGIN}
    assert all(STATE in vars(module) for module in model.modules())
    state = state_of(model)
    assert state is not None
    assert state.settings == MaskingSettings(k=0.4)
    assert [module for module in model.modules() if state_of(module).settings] == [model]  # type: ignore[union-attr]
    assert marks(bake(model)) == {ORIGIN}
    assert describe(bake(model)).name == "conv2"
    assert state_of(nn.Linear(2, 2)) is None
    assert marks(bake(convert(nn.Linear(2, 2)))) == set()


@pytest.mark.parametrize("name", SAVED)
def test_marks_of_the_first_version_become_the_record(name: str) -> None:
    model: Any = torch.load(GOLDEN / "saved" / f"{name}.pt", weights_only=False)
    old = marks(model) - {STATE}
    assert {"_popup_converted", "_popup_settings"} <= old, "plain modules are upgraded when their state is read"
    assert all(state_of(module) is not None for module in model.modules())
    settings = state_of(model).settings  # type: ignore[union-attr]
    assert isinstance(settings, MaskingSettings)
    assert settings == MaskingSettings.of({n: v for n, v in vars(settings).items() if v is not None})
    if name in ("conv2", "pretrained"):
        assert describe(model).name == "conv2"
        assert (origin_of(model).base is not None) == (name == "pretrained")
    assert marks(model) <= {STATE, ORIGIN}


@pytest.mark.parametrize("name", SAVED)
def test_a_network_of_the_first_version_is_written_again_and_baked(name: str, tmp_path: Path) -> None:
    model: Any = torch.load(GOLDEN / "saved" / f"{name}.pt", weights_only=False)
    assert marks(bake(model)) <= {ORIGIN}
    assert origin_of(bake(model)).base is None
    torch.save(model, tmp_path / "again.pt")
    again: Any = torch.load(tmp_path / "again.pt", weights_only=False)
    for other in (again, copy.deepcopy(model)):
        assert all(torch.equal(mask, masks(model)[key]) for key, mask in masks(other).items())
        assert state_of(other).settings == state_of(model).settings  # type: ignore[union-attr]


def test_a_clone_has_replacements_wherever_their_objects_stood() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.note = note = ["here"]
    weight, other = nn.Parameter(torch.zeros(3, 3)), ["there"]
    clone: Any = clone_with(model, [(model[0].weight, weight), (note, other)])
    assert clone[0].weight is clone[1].weight is weight
    assert clone.note is other
    assert model.note == ["here"]
    assert model[0].weight.any()
    assert torch.equal(clone[0].bias, model[0].bias)
    assert clone[0].bias is not model[0].bias


def test_a_clone_has_the_results_of_the_last_pass() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    model = Keeping(3, 2)
    result = model(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    clone: Any = clone_with(model, [])
    assert torch.equal(clone.last, result)
    assert not clone.last.requires_grad
