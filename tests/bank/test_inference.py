"""Which task is it? The average of all masks, the gradient of the entropy in their shares, and every task by itself."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bank.conftest import Make
from bank.test_bank import X, filled, same, state, unchanged
from popup_surgery import ConversionError, MaskBank, UnknownName, convert, load, save
from popup_surgery.bank.inference import _entropy

CONSTANT = "signed_kaiming_constant"


def mixed(files: dict[str, Path], shares: dict[str, float]) -> nn.Module:
    """A network of weighted sums of what `load` gives of each file."""
    networks = {name: load(file) for name, file in files.items()}
    network = load(next(iter(files.values())))
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(sum(shares[name] * networks[name].state_dict()[key] for name in files))
    return network


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [CONSTANT, "kaiming_normal"])
def test_the_gradient_of_the_entropy_in_each_share(scheme: str, make: Make) -> None:
    """Against differences of the entropy, in float64, heads and norms included. Batch norms go by the images."""
    settings: dict[str, Any] = {"dtype": torch.float64, "scheme": scheme, "norm": "train", "others": "train"}
    files = {name: make(name, **settings) for name in ("ants", "bees", "cats")}
    bank = filled(MaskBank(files["ants"]), files)
    images = X.double()
    before = state(bank)
    found = bank.infer(images, how="one_step")
    assert unchanged(bank, before)
    third = dict.fromkeys(files, 1 / 3)
    for name in files:
        slopes = []
        for step in (1e-6, 1e-7, 1e-8):  # one of them may lie across a corner of a ReLU
            with torch.no_grad():
                nets = [mixed(files, third | {name: 1 / 3 + sign * step}).train() for sign in (1, -1)]
                more, less = (float(_entropy(net(images))) for net in nets)
            slopes.append(-(more - less) / (2 * step))
        assert min(abs(found.scores[name] - slope) for slope in slopes) < 1e-5 * abs(found.scores[name])
    assert found.task == max(found.scores, key=lambda name: found.scores[name])
    assert found.how == "one_step"


class Two(nn.Module):
    """Answers of two features that a task's mask picks; the head is the same."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def tasks(folder: Path, count: int, classes: int = 4) -> dict[str, Path]:
    """Files whose masks keep the weights of one input each, so that a task is sure of that input alone."""
    files = {}
    for i in range(count):
        model = convert(Two(classes), 1 / 8, seed=1, scheme="kaiming_normal")
        with torch.no_grad():
            score = model.get_parameter("head.weight_score")
            score.zero_()
            score[:, i] = 1
        files[f"task {i}"] = folder / f"{classes}-{i}.popup.safetensors"
        save(model, files[f"task {i}"])
    return files


@pytest.mark.parametrize("how", ["one_step", "halving", "each", None])
def test_the_task_is_found(how: str | None, tmp_path: Path) -> None:
    files = tasks(tmp_path, 7)
    bank = filled(MaskBank(files["task 0"], model=Two()), files)
    for i in range(7):
        images = torch.zeros(3, 8)
        images[:, i] = 2
        found = bank.infer(images, how=how)
        assert found.task == f"task {i}"
        assert found.how == (how or "halving")
        assert set(found.scores) == set(files)
        output = bank.predict(images, found.task)
        assert isinstance(output, Tensor)


def test_heads_of_several_sizes_run_one_by_one(make: Make) -> None:
    files = {"ants": make("ants"), "cats": make("cats", classes=7)}
    bank = filled(MaskBank(files["ants"]), files)
    bank.use("cats")
    found = bank.infer(X)
    assert found.how == "each"
    for name, file in files.items():
        with torch.no_grad():
            entropy = float(_entropy(load(file)(X))) / math.log(7 if name == "cats" else 10)
        assert found.scores[name] == pytest.approx(-entropy, rel=1e-5)
    assert found.task == max(found.scores, key=lambda name: found.scores[name])
    same(bank.network, load(files["cats"]))
    for how in ("one_step", "halving"):
        with pytest.raises(
            ConversionError, match="the heads of 'ants' and 'cats' have other sizes; expected how='each'"
        ):
            bank.infer(X, how=how)
    same(bank.network, load(files["cats"]))
    with pytest.raises(UnknownName, match="unknown how 'all'"):
        bank.infer(X, how="all")


class Counting(nn.Module):
    """With a buffer of integers that a task has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.register_buffer("order", torch.arange(8))

    order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, self.order])


def test_integers_cannot_be_averaged(tmp_path: Path) -> None:
    for i in range(2):
        model: Any = convert(Counting(), 0.5, seed=1)
        model.order.copy_(torch.randperm(8, generator=torch.Generator().manual_seed(i)))
        save(model, tmp_path / f"{i}")
    bank = filled(MaskBank(tmp_path / "0", model=Counting()), {"a": tmp_path / "0", "b": tmp_path / "1"})
    assert bank.infer(torch.randn(2, 8)).how == "each"
    with pytest.raises(ConversionError, match="'order' is of integers, and differs between 'a' and 'b'"):
        bank.infer(torch.randn(2, 8), how="halving")


def test_flags_of_gradients_and_modes_are_kept(make: Make) -> None:
    files = {name: make(name) for name in ("ants", "bees")}
    bank = filled(MaskBank(files["ants"]), files)
    for i, parameter in enumerate(bank.network.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [parameter.requires_grad for parameter in bank.network.parameters()]
    expected = bank.infer(X)
    with torch.inference_mode():
        again = bank.infer(X + 0)
    assert again == expected
    assert [parameter.requires_grad for parameter in bank.network.parameters()] == flags
    assert all(parameter.grad is None for parameter in bank.network.parameters())
    assert not any(buffer.requires_grad for buffer in bank.network.buffers())


def test_what_cannot_be_inferred(make: Make, tmp_path: Path) -> None:
    file = make("ants")
    bank = MaskBank(file)
    with pytest.raises(ConversionError, match="the bank has no task"):
        bank.infer(X)
    bank.add("ants", file)
    assert bank.infer(X).task == "ants"
    files = tasks(tmp_path, 2, classes=1)
    one = filled(MaskBank(files["task 0"], model=Two(1)), files)
    before = state(one)
    for how in (None, "each"):
        with pytest.raises(ConversionError, match="must return a row of two scores or more for each"):
            one.infer(torch.randn(3, 8), how=how)
    assert unchanged(one, before)


def test_outputs_that_are_not_finite_are_the_least_likely(tmp_path: Path) -> None:
    files = tasks(tmp_path, 2)
    bank = filled(MaskBank(files["task 0"], model=Two()), files)
    images = torch.zeros(3, 8)
    images[:, 0] = math.inf
    assert bank.infer(images, how="each").scores["task 0"] == -math.inf
