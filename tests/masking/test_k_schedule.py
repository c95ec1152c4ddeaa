"""k as a function of the epoch, and how a training loop of one's own sets it."""

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popup_surgery import ConversionError, KSchedule, bake, convert, inspect, load, masks, save, set_k
from popup_surgery.masking.k_schedule import KINDS
from popup_surgery.selection import kept_count


def net(**settings: Any) -> nn.Module:
    return convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), **settings)


def kept(network: nn.Module) -> list[int]:
    return [int(mask.sum()) for mask in masks(network).values()]


# the function


def test_linear_and_cubic_against_their_formula() -> None:
    """Zhu and Gupta's s_t = s_f + (s_i − s_f)(1 − (t − t_0) / (n Δt))³, in sparsities s = 1 − k."""
    for kind, power in (("linear", 1), ("cubic", 3)):
        schedule = KSchedule(kind, start=0.9, begin=2, epochs=8)
        for epoch in range(14):
            done = min(max(epoch - 2, 0), 8) / 8
            sparsity = 0.95 + (0.1 - 0.95) * (1 - done) ** power
            assert schedule.at(epoch, 0.05) == pytest.approx(1 - sparsity)
        assert schedule.at(10, 0.05) == schedule.at(99, 0.05) == 0.05  # to the bit


def test_steps_against_rounds_of_gem_miner() -> None:
    """Each round keeps the share exp(ln s / n) of what the round before it kept."""
    schedule = KSchedule("steps", epochs=20, every=5)
    now, share = 1.0, 0.014 ** (1 / 4)
    for epoch in range(25):
        if epoch and epoch % 5 == 0 and epoch <= 20:
            now *= share
        assert schedule.at(epoch, 0.014) == pytest.approx(now)
    assert schedule.at(20, 0.014) == 0.014


def test_a_schedule_goes_one_way_and_may_rise() -> None:
    for kind in KINDS[1:]:
        schedule = KSchedule(kind, start=0.2, begin=1, epochs=6, every=2 if kind == "steps" else None)
        for k in (0.05, 0.2, 0.9):
            values = [schedule.at(epoch, k) for epoch in range(9)]
            assert values[:2] == [0.2, 0.2]
            assert values[-2:] == [k, k]
            sign = 1 if k >= 0.2 else -1
            assert all(sign * (b - a) >= -1e-15 for a, b in pairwise(values))
    assert [KSchedule("constant").at(epoch, 0.3) for epoch in (0, 5)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "cubics", "epochs": 3}, "kind is 'cubics'; expected constant, linear, cubic or steps"),
        ({"kind": ["cubic"]}, r"kind is \['cubic'\]; expected constant"),
        ({"epochs": 3}, r"expected a mapping with kind \(constant, linear, cubic or steps\)"),
        (3, "expected a mapping with kind"),
        ({"kind": "cubic"}, "epochs is missing; expected the length of the ramp"),
        ({"kind": "cubic", "epochs": 0}, "epochs is 0; expected the length"),
        ({"kind": "cubic", "epochs": 2.5}, "epochs is 2.5; expected the length"),
        ({"kind": "cubic", "epochs": True}, "epochs is True; expected the length"),
        ({"kind": "linear", "epochs": 3, "start": 1.1}, "start is 1.1; expected a share above 0 and up to 1"),
        ({"kind": "linear", "epochs": 3, "start": 0}, "start is 0; expected a share"),
        ({"kind": "linear", "epochs": 3, "start": "1"}, "start is '1'; expected a share"),
        ({"kind": "linear", "epochs": 3, "begin": -1}, "begin is -1; expected an epoch, an integer from 0"),
        ({"kind": "steps", "epochs": 4}, "every is missing; expected the epochs between two steps"),
        ({"kind": "steps", "epochs": 5, "every": 2}, "epochs is 5; expected a multiple of every, 2"),
        ({"kind": "cubic", "epochs": 4, "every": 2}, "every is given beside kind cubic; only steps has it"),
        ({"kind": "constant", "epochs": 4}, "epochs is given beside kind constant"),
        ({"kind": "cubic", "epoch": 4}, "'epoch' is not one of its keys; nearest: epochs.*; and epochs is missing"),
        ({"kind": "cubic", "epochs": 0, "start": 2, "begin": -1}, "start is 2.*; and begin is -1.*; and epochs is 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values: Any, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        KSchedule.of(values)


# set_k


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"scope": "global", "floor": 0.02}])
def test_a_loop_of_ones_own_sets_k_and_the_weights_stay(settings: dict[str, Any], tmp_path: Path) -> None:
    network = net(k=0.1, **settings)
    raw = {name: p.detach().clone() for name, p in network.named_parameters() if not name.endswith("_score")}
    schedule = KSchedule("cubic", epochs=4)
    for epoch in range(6):
        set_k(network, share := schedule.at(epoch, 0.1))
        found = kept(network)
        if settings:
            assert sum(found) == kept_count(900, share)
        else:
            assert found == [kept_count(600, share), kept_count(300, share)]
        file = tmp_path / f"{epoch}"
        save(network, file)
        assert [entry.kept for entry in inspect(file).masked] == found
        for entry in inspect(file).masked:
            truly = sum(found) / 900 if settings else (entry.kept or 0) / entry.numel
            assert entry.note["k"] == (truly if epoch < 4 else 0.1)
        plain = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        assert all(map(torch.equal, load(file, plain).state_dict().values(), bake(network).state_dict().values()))
    now = dict(network.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in raw.items())
    assert {entry.note["k"] for entry in inspect(file).masked} == {0.1}


def test_k_by_pattern_leaves_the_other_layers() -> None:
    network = net(k=0.1)
    set_k(network, {"0": 0.5})
    assert kept(network) == [300, 30]
    set_k(network, {"*": 0.2, "2": 1})
    assert kept(network) == [120, 300]
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert kept(twin) == [120, 300]
        set_k(twin, None)
        assert kept(twin) == [60, 30]
    assert kept(network) == [120, 300]
    set_k(network, None)
    assert kept(network) == [60, 30]


def test_what_cannot_be_set_is_refused_and_changes_nothing() -> None:
    network = net(k=0.1)
    together = net(k=0.1, scope="global", floor=0.05)
    for one, k, said in (
        (network, 0, "k is 0; expected a number above 0"),
        (network, 1.5, "k is 1.5; expected a number above 0"),
        (network, {"0": 0.5, "2": 3}, "k is 3; expected a number"),
        (network, {"1": 0.5}, "k has '1', which matches no layer"),
        (network, 1e-17, "k=1e-17 keeps 0 of the 600 weights of 0.weight; expected at least 1$"),
        (together, {"0": 0.5}, "ranked together and take one k"),
        (together, 0.04, "k=0.04 keeps 36 of the 900 weights of .*; expected at least 45, which the floor keeps"),
        (nn.Linear(2, 2), 0.5, "Linear has no masks"),
        (net(learner="supermask"), 0.5, "0 takes no k"),
    ):
        with pytest.raises(ConversionError, match=said):
            set_k(one, k)
    assert kept(network) == [60, 30]
    assert sum(kept(together)) == 90


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 takes the number for a constant")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("settings", [{}, {"scope": "global", "floor": 3}])
def test_a_compiled_network_follows_k_without_compiling_again(settings: dict[str, Any]) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    network, counter = net(k=0.1, **settings), CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    schedule = KSchedule("linear", epochs=12)
    images = torch.randn(3, 20)
    for epoch in range(14):
        set_k(network, schedule.at(epoch, 0.1))
        assert torch.equal(compiled(images), network(images))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_a_network_exports_with_the_k_of_the_moment(strict: bool) -> None:
    network = net(k=0.1).eval()
    set_k(network, 0.5)
    images = torch.randn(3, 20)
    program = torch.export.export(network, (images,), strict=strict)
    torch.testing.assert_close(program.module()(images), network(images))


@pytest.mark.parametrize(
    ("epoch", "k", "message"),
    [
        (0, 2, r"k is 2; expected a number above 0 and up to 1"),
        (0, 0.0, r"k is 0.0; expected"),
        (-1, 0.3, r"epoch is -1; expected an integer from 0"),
        (0.5, 0.3, r"epoch is 0.5; expected"),
    ],
)
def test_bad_arguments_of_at_are_refused(epoch: Any, k: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        KSchedule("linear", epochs=3).at(epoch, k)
