"""Optimisers: each that timm lists trains and resumes on digits, or says what it lacks before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch

from popup_surgery import Result, RunError, train
from popup_surgery.errors import Stopped
from popup_surgery.experiment import results
from popup_surgery.training.checkpoint import pack, unpack
from support import equal_states, run_digits, slow_except, stopping

pytestmark = pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")

NAMES = [str(name) for name in timm.optim.list_optimizers()]
ELSEWHERE = [name for name in NAMES if name.startswith(("bnb", "fused"))]  # CUDA and a package of their own
QUICK = ["sgd", "adahessian", "cadafactorbv", "adagrad", "kron", "bnbadam8bit"]

TINY: dict[str, Any] = {
    "model": {"name": "popup_surgery/conv2", "kwargs": {"width": 0.05, "in_chans": 1, "img_size": 8}},
    "surgery": {"k": 0.5, "scaled": False},
    "data": {"name": "digits", "max_train": 48, "max_validation": 10, "batch_size": 16},
    "training": {"epochs": 1, "lr": 0.01, "weight_decay": 1e-4},
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_draw", lambda run, trainer: None)


def tiny(optimizer: str, output: Path, more: Any = (), **arguments: Any) -> Result:
    return train(TINY, overrides=[f"training.optimizer={optimizer}", *more], output=output, **arguments)


def unread(*arguments: Any) -> Any:
    raise AssertionError("the data was read")


@pytest.mark.parametrize("name", slow_except(NAMES, QUICK))
def test_an_optimizer_trains_and_resumes_or_says_what_it_lacks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ELSEWHERE and not torch.cuda.is_available():
        monkeypatch.setattr("popup_surgery.experiment.setup.open_data", unread)
        with pytest.raises(RunError, match=f"^training.optimizer is {name}, which cannot train here: CUDA required"):
            tiny(name, tmp_path / "run")
        return
    through = tiny(name, tmp_path / "through")
    with pytest.raises(Stopped, match="after step 2, in epoch 1"):
        tiny(name, tmp_path / "run", progress=stopping(2))
    assert tiny(name, tmp_path / "run", resume=True).file.read_bytes() == through.file.read_bytes()


@pytest.mark.parametrize("name", slow_except([name for name in NAMES if name not in ELSEWHERE], ["adagrad"]))
def test_a_lottery_ticket_resets_the_state_of_any_optimizer(name: str, tmp_path: Path) -> None:
    more = ["surgery=none", "training.epochs=2", "lottery_ticket.k=0.25", "lottery_ticket.rounds=2"]
    more += ["data.max_train=16"]
    through = tiny(name, tmp_path / "through", more)
    with pytest.raises(Stopped):
        tiny(name, tmp_path / "run", more, progress=stopping(3))
    again = tiny(name, tmp_path / "run", more, resume=True)
    assert equal_states(again.model, through.model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["training.compile=true"], "needs second derivatives; there are none with training.compile=true"),
        (["training.optimizer_kwargs={update_each: 2}"], "does not resume exactly with {'update_each': 2}"),
        (
            ["training.optimizer_kwargs={hessian_power: x}"],
            "does not take training.optimizer_kwargs {'hessian_power': 'x'}",
        ),
        (
            ["training.optimizer=kron", "training.optimizer_kwargs={mu_dtype: bfloat16}"],
            "kron, which cannot train here",
        ),
        (
            ["training.optimizer=adamw", "training.optimizer_kwargs={beta: 1}"],
            "adamw does not take training.optimizer_kwargs {'beta': 1}",
        ),
    ],
)
def test_what_an_optimizer_cannot_do_is_said_before_the_data_is_read(
    settings: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popup_surgery.experiment.setup.open_data", unread)
    with pytest.raises(RunError) as caught:
        tiny("adahessian", tmp_path / "run", settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("settings", [["training.accumulate=2"], ["training.clip_norm=0.1"], ["surgery=none"]])
def test_second_derivatives_are_there_for_what_a_step_may_consist_of(settings: list[str], tmp_path: Path) -> None:
    assert tiny("adahessian", tmp_path / "run", settings).history[0].train_loss < 3


def test_second_derivatives_are_there_for_attention(ten: Path, tmp_path: Path) -> None:
    """The fused kernels of attention have none."""
    values = TINY | {
        "model": {"name": "timm/test_vit", "kwargs": {"img_size": 32, "num_classes": 10}},
        "data": {"name": "folder", "root": str(ten), "batch_size": 20, "workers": 0},
    }
    assert train(values, overrides=["training.optimizer=adahessian"], output=tmp_path / "run").history


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kron", "adafactorbv"])
def test_what_is_random_in_an_optimizer_is_the_same_in_all_processes(name: str, tmp_path: Path) -> None:
    sets = [f"training.optimizer={name}", "model.kwargs.width=0.05", "data.max_train=128", "training.epochs=1"]
    done = run_digits(tmp_path / "run", "--num-processes", "2", *(word for s in sets for word in ("--set", s)))
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_holds_dtypes_and_numbers_that_are_not_finite_as_words() -> None:
    tree = {"a": torch.bfloat16, 3: [float("inf"), -float("inf"), torch.float8_e4m3fn], "c": (1.5, None, torch.ones(2))}
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(tree, "it", tensors), allow_nan=False)
    back = unpack(json.loads(text), tensors)
    assert str(back) == str(tree)
    assert back["a"] is torch.bfloat16
    with pytest.raises(RunError, match=r"names the dtype 'os', which PyTorch .* does not have"):
        unpack({"dtype": "os"}, {})
    with pytest.raises(RunError, match="is a function, which a checkpoint cannot hold"):
        pack({"call": run_digits}, "it", {})
