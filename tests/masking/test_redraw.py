"""Weights that are drawn again: against IteRand in a few lines, and what becomes of a network and its file."""

import copy
import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import popup_surgery as ps
from popup_surgery.masking.rewrites import scheme_mistake
from popup_surgery.masking.state import slots_of
from popup_surgery.weights import SCHEMES
from popup_surgery.weights.streams import MOST, draw
from support import equal_states, top


def conv2(**settings: Any) -> nn.Module:
    net = ps.build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8)
    return ps.convert(net, **{"k": 0.3, "scheme": "kaiming_normal", **settings})


def again(net: nn.Module, steps: int = 3, share: float = 0.4) -> nn.Module:
    """The network after some redraws, with other masks at each."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for name, parameter in net.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
        ps.redraw(net, step, every=1, share=share)
    return net


def generations(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name.endswith("_generation")}


def saved(net: nn.Module, folder: Path) -> bytes:
    ps.save(net, folder / "net")
    return (folder / "net").read_bytes()


# the algorithm


def stream(seed: int, purpose: str, name: str, words: int) -> np.ndarray[Any, Any]:
    """Section 1 of the format's page."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=16, person=b"popup-surgery/v1").digest()
    return np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(words).astype("<u8")


def normal(name: str, n: int, std: float) -> Tensor:
    u = torch.from_numpy(stream(3, "weight", name, -(-n // 4)).view("<u2")[:n].astype(np.float64))
    return torch.special.ndtri((u + 0.5) / 65536).float() * np.float32(std)


def test_ten_steps_are_those_of_the_paper() -> None:
    """Chijiwa et al., 2021: edge-popup, and after every third step each weight outside the mask is redrawn with 0.2."""
    torch.manual_seed(0)
    layer: Any = ps.convert(nn.Linear(30, 20, bias=False), 0.25, scheme="kaiming_normal", scaled=False, seed=3)
    optimizer = torch.optim.SGD([layer.weight_score], lr=0.05, momentum=0.9)
    score, speed, std = layer.weight_score.detach().clone(), torch.zeros(20, 30), math.sqrt(2 / 30)
    values = [normal("weight", 600, std)] + [normal(f"weight@{g}", 600, std) for g in range(1, 5)]
    count = torch.zeros(600, dtype=torch.int64)
    for step in range(1, 11):
        x, y = (torch.randn(8, n, generator=torch.Generator().manual_seed(step)) for n in (30, 20))
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        optimizer.step()
        redrawn = ps.redraw(layer, step, every=3, share=0.2)

        weight = torch.stack(values).gather(0, count[None])[0].view(20, 30)
        mask = top([score], 150)[0]
        gradient = 2 * (x @ (weight * mask).T - y).T @ x
        speed = 0.9 * speed + gradient * weight * score.sign()
        score -= 0.05 * speed
        before = count.clone()
        if step % 3 == 0:
            u = stream(3, "redraw", f"weight@{step}", 300).view("<u4")[:600]
            chosen = torch.from_numpy(u < math.floor(0.2 * 2**32)) & ~top([score], 150)[0].view(-1)
            count += chosen
        assert redrawn == int((count - before).sum())
        torch.testing.assert_close(layer.weight_score.detach(), score, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.state_dict().get("weight_generation", torch.zeros(20, 30)).view(-1).long(), count)
        expected = torch.stack(values).gather(0, count[None])[0].view(20, 30)
        torch.testing.assert_close(layer._parameters["weight"].detach(), expected, rtol=1e-6, atol=1e-7)
    assert count.max() > 1


def test_only_weights_that_do_not_take_part_are_drawn_again() -> None:
    net = conv2()
    before, masks = copy.deepcopy(net.state_dict()), ps.masks(net)
    count = ps.redraw(net, 40, every=20, share=0.25)
    out = sum(int((~mask).sum()) for mask in masks.values())
    assert abs(count - 0.25 * out) < 4 * math.sqrt(out * 0.25 * 0.75)
    assert count == sum(int(value.sum()) for value in generations(net).values())
    for name, mask in masks.items():
        changed = before[name] != net.state_dict()[name]
        assert not (changed & mask).any()
        assert torch.equal(changed, net.state_dict()[f"{name}_generation"] > 0), "each has another value"
    assert all(torch.equal(mask, ps.masks(net)[name]) for name, mask in masks.items())


def test_it_acts_at_every_so_many_steps() -> None:
    net = conv2()
    assert [bool(ps.redraw(net, step, every=3)) for step in range(8)] == [step in (3, 6) for step in range(8)]


def test_every_weight_outside_is_drawn_again_if_the_share_is_one() -> None:
    net = conv2()
    assert ps.redraw(net, 300, share=1) == sum(int((~mask).sum()) for mask in ps.masks(net).values())


def test_a_weight_is_drawn_again_no_more_than_4095_times(tmp_path: Path) -> None:
    net: Any = ps.convert(nn.Linear(40, 10), 0.3, scheme="kaiming_normal")
    ps.redraw(net, 0)
    slots_of(net)["weight"].generations.fill_(MOST - 1)  # type: ignore[union-attr]
    values = np.concatenate([*draw("normal", 400, slots_of(net)["weight"].std, 0, "weight", f"weight@{MOST - 1}")])
    net._parameters["weight"].data.copy_(torch.from_numpy(values).view(10, 40))
    assert [ps.redraw(net, step, every=1, share=1) for step in (1, 2)] == [280, 0]
    ps.save(net, tmp_path / "net")
    assert torch.equal(ps.load(tmp_path / "net", nn.Linear(40, 10)).weight, ps.bake(net).weight)  # type: ignore[arg-type]


def test_it_is_a_function_of_seed_step_and_name(tmp_path: Path) -> None:
    one, other = again(conv2()), again(conv2())
    torch.manual_seed(5)
    assert saved(one, tmp_path) == saved(other, tmp_path)
    drawn = [generations(conv2()), generations(again(conv2(), 1)), generations(again(conv2(seed=1), 1))]
    assert not drawn[0]
    assert not any(torch.equal(value, drawn[2][name]) for name, value in drawn[1].items())


# the network


def test_a_state_dict_has_the_generations(tmp_path: Path) -> None:
    net, fresh = again(conv2()), conv2()
    expected = saved(net, tmp_path)
    fresh.load_state_dict(net.state_dict())
    assert saved(fresh, tmp_path) == expected
    assert ps.redraw(fresh, 4, every=1) == ps.redraw(net, 4, every=1)
    assert saved(fresh, tmp_path) == saved(net, tmp_path)
    assert expected != saved(net, tmp_path) or equal_states(ps.bake(net), ps.bake(fresh))
    fresh.load_state_dict(conv2().state_dict())
    assert not generations(fresh), "those that belong to the weights that were loaded"
    ps.save(fresh, tmp_path / "net")
    state = net.state_dict()
    state["features.0.weight_generation"] = torch.zeros(3, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*features\.0\.weight_generation"):
        conv2().load_state_dict(state)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_drawn_again_by_themselves(clone: Any, tmp_path: Path) -> None:
    net = again(conv2())
    expected, copied = saved(net, tmp_path), clone(net)
    ps.redraw(net, 9, every=1)
    assert saved(copied, tmp_path) == expected


def test_plain_networks_have_none() -> None:
    plain = ps.bake(again(conv2()))
    assert not generations(plain)
    assert "_popup_state" not in plain.get_submodule("features.0").__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 3)).to(dtype)

    net, last = (ps.convert(plain(), 0.3, scheme="kaiming_uniform") for _ in range(2))
    expected = saved(again(net), tmp_path)
    last.to(memory_format=torch.channels_last)
    assert saved(again(last), tmp_path) == expected
    assert last.get_parameter("0.weight_score").is_contiguous(memory_format=torch.channels_last)
    assert ps.verify(tmp_path / "net", plain())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_shared_weight_is_drawn_once(tmp_path: Path) -> None:
    net = again(ps.convert(Tied(), 0.3, scheme="kaiming_normal"))
    expected = saved(net, tmp_path)
    assert ps.verify(tmp_path / "net", Tied())
    fresh = ps.convert(Tied(), 0.3, scheme="kaiming_normal")
    fresh.load_state_dict(net.state_dict())
    assert saved(fresh, tmp_path) == expected
    assert ps.redraw(fresh, 9, every=1, share=1) == 144 - 44
    assert ps.verify(tmp_path / "net", Tied())


def test_a_weight_under_two_masks_is_left_where_either_keeps_it() -> None:
    net = conv2()
    other = copy.copy(net.get_submodule("classifier.1"))
    other._parameters = {**other._parameters, "weight_score": nn.Parameter(torch.rand(64, 256))}
    both = nn.ModuleList([net.get_submodule("classifier.1"), other])
    masks = [slots_of(layer)["weight"].mask(layer, "weight").clone() for layer in both]
    assert ps.redraw(both, 300, share=1) == int((~(masks[0] | masks[1])).sum())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_reads_the_new_weights(backend: str) -> None:
    net: Any = ps.convert(nn.Linear(12, 5), 0.3, scheme="kaiming_normal")
    compiled, x = torch.compile(net, fullgraph=True, backend=backend), torch.randn(4, 12)
    first = compiled(x)
    again(net)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled(x)
    torch.testing.assert_close(found, ps.bake(net)(x))
    assert not torch.allclose(found, first)
    torch._dynamo.reset()


# the file


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "signed"}, {"learner_options": {"coats": [0.3, 0.1]}}, {"learner": "gem_miner"},
        {"scope": "global"}, {"scope": "global", "floor": 0.05}, {"pattern": "2:4", "k": None},
        {"k": {"rule": "erk", "k": 0.2}}, {"learner": "piggyback", "k": None, "scaled": False},
        {"scheme": "lecun_uniform"}, {"scheme": "signed_kaiming_constant"},
        {"scheme": "signed_kaiming_constant", "learner_options": {"coats": [0.3, 0.1]}},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)  # fmt: skip
def test_the_file_gives_the_network(settings: dict[str, Any], tmp_path: Path) -> None:
    net = again(conv2(**settings))
    if settings.get("learner") == "piggyback":  # 0.005 is its threshold
        for name, parameter in net.named_parameters():
            parameter.data.copy_(torch.rand(parameter.shape) * 0.01) if name.endswith("_score") else None
    manifest = ps.save(net, tmp_path / "net", probe=(1, 1, 8, 8))
    constant = "constant" in settings.get("scheme", "")
    assert ("sign" if constant else "generation") in manifest.requires
    assert not constant or "generation" not in manifest.requires
    assert ps.verify(tmp_path / "net")
    assert equal_states(ps.load(tmp_path / "net"), ps.bake(net))
    fresh = conv2(**settings)
    ps.start_from(fresh, tmp_path / "net")
    assert equal_states(ps.bake(fresh), ps.bake(net))
    ps.save(fresh, tmp_path / "again", probe=(1, 1, 8, 8))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme_mistake(scheme)])
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))

    net = again(ps.convert(plain(), 0.3, scheme=scheme))
    ps.save(net, tmp_path / "net")
    assert equal_states(ps.load(tmp_path / "net", plain()).eval(), ps.bake(net))
    assert ps.verify(tmp_path / "net", plain())


@pytest.mark.parametrize("learner", ["edge_popup", "signed"])
def test_of_constants_a_file_has_the_signs(learner: str, tmp_path: Path) -> None:
    net = again(conv2(learner=learner, scheme="signed_kaiming_constant"))
    assert ps.save(net, tmp_path / "net").requires == ["sign"]
    assert equal_states(ps.load(tmp_path / "net"), ps.bake(net))
    fresh = conv2(learner=learner, scheme="signed_kaiming_constant")
    ps.start_from(fresh, tmp_path / "net")
    assert equal_states(ps.bake(fresh), ps.bake(net))
    assert max(map(Tensor.max, generations(fresh).values()), default=0) <= 12, "the first generations with these signs"
    assert bool(generations(fresh)) == (learner == "edge_popup")


def test_a_network_of_another_scheme_does_not_start_from_signs(tmp_path: Path) -> None:
    ps.save(again(conv2(scheme="signed_kaiming_constant")), tmp_path / "net")
    for scheme in ("unsigned_kaiming_constant", "kaiming_normal", "pretrained"):
        net = conv2(scheme=scheme)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ps.ArtifactError, match=r"the weights of 'features\.0\.weight' differ"):
            ps.start_from(net, tmp_path / "net")
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_file_without_redraws_is_as_it_was(tmp_path: Path) -> None:
    net = conv2()
    expected = saved(net, tmp_path)
    ps.redraw(net, 1)
    assert saved(net, tmp_path) == expected
    ps.redraw(net, 300)
    assert saved(net, tmp_path) == expected, "what takes part is not drawn again"


def test_a_network_that_was_drawn_again_starts_from_a_plain_file(tmp_path: Path) -> None:
    plain, net = conv2(), again(conv2())
    ps.save(plain, tmp_path / "net")
    ps.start_from(net, tmp_path / "net")
    assert equal_states(ps.bake(net), ps.bake(plain))


def test_weights_that_no_generation_explains_are_refused(tmp_path: Path) -> None:
    net = again(conv2())
    net.get_submodule("features.0")._parameters["weight"].data[0] += 1  # type: ignore[union-attr]
    with pytest.raises(ps.ArtifactError, match=r"weights of 'features\.0\.weight' are not those of seed 0 any more"):
        ps.save(net, tmp_path / "net")
