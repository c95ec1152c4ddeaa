"""Weights that are recycled: against the method in a few lines, and what becomes of a network and its file."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import popup_surgery as ps
from popup_surgery.masking.rewrites import scheme_mistake
from popup_surgery.masking.state import slots_of
from popup_surgery.weights import SCHEMES
from support import equal_states, top


def conv2(**settings: Any) -> nn.Module:
    net = ps.build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8)
    return ps.convert(net, **{"k": 0.3, "scheme": "kaiming_normal", **settings})


def rescored(net: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """The network with other scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.endswith("_score"):
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * scale)
    return net


def recycled(
    net: nn.Module, steps: int = 3, share: float = 0.2, scale: float = 1.0, redraws: bool = False
) -> nn.Module:
    """The network after some recyclings, with other masks at each and after the last, and if asked after redraws."""
    for step in range(1, steps + 1):
        rescored(net, step, scale)
        if redraws:
            ps.redraw(net, step, every=1, share=0.3)
        ps.recycle(net, step, every=1, share=share)
    return rescored(net, 0, scale)


def sources(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name.endswith("_source")}


def raw(net: nn.Module, layer: str = "features.0") -> Tensor:
    weight = net.get_submodule(layer)._parameters["weight"]
    assert weight is not None
    return weight.detach()


def saved(net: nn.Module, folder: Path) -> bytes:
    ps.save(net, folder / "net")
    return (folder / "net").read_bytes()


# the algorithm


def test_ten_steps_are_those_of_the_paper() -> None:
    """Gorbett and Whitley, 2023: edge-popup; after every third step the lowest fifth gets the highest's values."""
    torch.manual_seed(0)
    layer: Any = ps.convert(nn.Linear(30, 20, bias=False), 0.25, scheme="kaiming_normal", scaled=False, seed=3)
    optimizer = torch.optim.SGD([layer.weight_score], lr=0.05, momentum=0.9)
    score, speed = layer.weight_score.detach().clone(), torch.zeros(20, 30)
    weight, source = raw(layer, "").clone(), torch.arange(600)
    first = weight.clone()
    for step in range(1, 11):
        x, y = (torch.randn(8, n, generator=torch.Generator().manual_seed(step)) for n in (30, 20))
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        optimizer.step()
        count = ps.recycle(layer, step, every=3, share=0.2)

        gradient = 2 * (x @ (weight * top([score], 150)[0]).T - y).T @ x
        speed = 0.9 * speed + gradient * weight * score.sign()
        score -= 0.05 * speed
        if step % 3 == 0:
            ranked = sorted(range(600), key=lambda i: -abs(float(score.view(-1)[i])))
            for high, low in zip(ranked[:120], reversed(ranked[-120:]), strict=True):
                weight.view(-1)[low] = weight.view(-1)[high]
                source[low] = source[high]
        assert count == (120 if step % 3 == 0 else 0)
        torch.testing.assert_close(layer.weight_score.detach(), score, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.state_dict().get("weight_source", torch.arange(600)).view(-1), source)
        assert torch.equal(raw(layer, ""), weight)
    assert torch.equal(weight.view(-1), first.view(-1)[source]), "the first values, however often they were copied"


def test_only_weights_that_do_not_take_part_get_other_values() -> None:
    net = rescored(conv2(k=0.9), 1)
    before, masks = copy.deepcopy(net.state_dict()), ps.masks(net)
    count = ps.recycle(net, 40, every=20, share=0.5)
    assert count == sum(int((~mask).sum()) for mask in masks.values()), "fewer than the share"
    for name, mask in masks.items():
        changed = net.state_dict()[f"{name}_source"].view(-1) != torch.arange(mask.numel())
        assert torch.equal(changed.view(mask.shape), ~mask)
        assert torch.equal(before[name][mask], net.state_dict()[name][mask])
    assert all(torch.equal(mask, ps.masks(net)[name]) for name, mask in masks.items())


def test_of_equal_scores_that_of_the_lower_index_is_higher() -> None:
    layer: Any = ps.convert(nn.Linear(10, 1), 0.5, scheme="kaiming_normal")
    with torch.no_grad():
        layer.weight_score.copy_(torch.tensor([[1, -2, 2, 0, 0, 0, 1, 2, 1, -1.0]]))
    assert ps.recycle(layer, 1, every=1, share=0.35) == 3
    assert layer.state_dict()["weight_source"].view(-1).tolist() == [0, 1, 2, 7, 2, 1, 6, 7, 8, 9]


def test_it_acts_at_every_so_many_steps() -> None:
    net = conv2()
    assert [bool(ps.recycle(net, step, every=3)) for step in range(8)] == [step in (3, 6) for step in range(8)]


def test_what_never_takes_part_gets_no_value_and_gives_none() -> None:
    net = conv2(fixed={"dropped": 0.5, "kept": 0.1})
    ranking = slots_of(net.get_submodule("features.0"))["weight"].ranking
    seen = torch.stack([ps.masks(rescored(net, seed))["features.0.weight"] for seed in range(40)])
    dropped = ~seen.any(0).view(-1)
    assert 0.45 < dropped.float().mean() < 0.55
    assert ranking.fixed is not None
    recycled(net, steps=5)
    source, own = sources(net)["features.0.weight_source"].view(-1), torch.arange(dropped.numel())
    assert torch.equal(source[dropped], own[dropped])
    assert not dropped[source[source != own]].any()


def test_what_gem_miner_froze_gets_no_value() -> None:
    net: Any = ps.convert(nn.Linear(40, 10), 0.3, scheme="kaiming_normal", learner="gem_miner")
    frozen = torch.arange(400).view(10, 40) % 3 == 0
    net.weight_score.data.masked_fill_(frozen, -1.0)
    assert ps.recycle(net, 1, every=1, share=0.2) == 80
    source = net.state_dict()["weight_source"].view(-1)
    moved = source != torch.arange(400)
    assert not frozen.view(-1)[moved].any()
    assert not frozen.view(-1)[source[moved]].any()


def test_piggyback_ranks_by_the_score_itself() -> None:
    net: Any = ps.convert(nn.Linear(5, 2), None, scheme="kaiming_normal", learner="piggyback", scaled=False)
    net.weight_score.data.copy_(torch.tensor([[-9, 1, 2, 3, 4], [5, 6, 7, 8, -8.0]]))
    assert ps.recycle(net, 1, every=1, share=0.2) == 2
    assert net.state_dict()["weight_source"].view(-1).tolist() == [8, 1, 2, 3, 4, 5, 6, 7, 8, 7]


# the network


def test_a_state_dict_has_the_sources(tmp_path: Path) -> None:
    net, fresh = recycled(conv2()), conv2()
    expected = saved(net, tmp_path)
    fresh.load_state_dict(net.state_dict())
    assert saved(fresh, tmp_path) == expected
    assert ps.recycle(fresh, 4, every=1) == ps.recycle(net, 4, every=1)
    assert saved(rescored(fresh, 9), tmp_path) == saved(rescored(net, 9), tmp_path)
    fresh.load_state_dict(conv2().state_dict())
    assert not sources(fresh), "those that belong to the weights that were loaded"
    ps.save(fresh, tmp_path / "net")
    state = net.state_dict()
    state["features.0.weight_source"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*features\.0\.weight_source"):
        conv2().load_state_dict(state)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_recycled_by_themselves(clone: Any, tmp_path: Path) -> None:
    net = recycled(conv2())
    expected, copied = saved(net, tmp_path), clone(net)
    ps.recycle(net, 9, every=1)
    assert saved(copied, tmp_path) == expected


def test_plain_networks_have_none() -> None:
    assert not sources(ps.bake(recycled(conv2())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 3)).to(dtype)

    net, last = (ps.convert(plain(), 0.3, scheme="kaiming_uniform") for _ in range(2))
    expected = saved(recycled(net), tmp_path)
    last.to(memory_format=torch.channels_last)
    assert saved(recycled(last), tmp_path) == expected
    assert ps.verify(tmp_path / "net", plain())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_shared_weight_is_recycled_once(tmp_path: Path) -> None:
    net = ps.convert(Tied(), 0.3, scheme="kaiming_normal")
    assert ps.recycle(net, 1, every=1, share=0.25) == 36
    assert net.state_dict()["one.weight_source"] is not None
    expected = saved(recycled(net), tmp_path)
    assert ps.verify(tmp_path / "net", Tied())
    fresh = ps.convert(Tied(), 0.3, scheme="kaiming_normal")
    fresh.load_state_dict(net.state_dict())
    assert saved(fresh, tmp_path) == expected


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_reads_the_new_weights(backend: str) -> None:
    net: Any = ps.convert(nn.Linear(12, 5), 0.3, scheme="kaiming_normal")
    compiled, x = torch.compile(net, fullgraph=True, backend=backend), torch.randn(4, 12)
    first = compiled(x)
    recycled(net)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled(x)
    torch.testing.assert_close(found, ps.bake(net)(x))
    assert not torch.allclose(found, first)
    torch._dynamo.reset()


# the file


@pytest.mark.parametrize("redraws", [False, True], ids=["alone", "redraws"])
@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "signed"}, {"learner_options": {"coats": [0.3, 0.1]}}, {"learner": "gem_miner"},
        {"scope": "global"}, {"pattern": "2:4", "k": None}, {"fixed": {"dropped": 0.2}},
        {"learner": "piggyback", "k": None, "scaled": False}, {"scheme": "lecun_uniform"},
        {"scheme": "signed_kaiming_constant"},
        {"scheme": "signed_kaiming_constant", "learner_options": {"coats": [0.3, 0.1]}},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)  # fmt: skip
def test_the_file_gives_the_network(settings: dict[str, Any], redraws: bool, tmp_path: Path) -> None:
    scale = 0.01 if settings.get("learner") == "piggyback" else 1.0  # 0.005 is its threshold
    net = recycled(conv2(**settings), scale=scale, redraws=redraws)
    manifest = ps.save(net, tmp_path / "net", probe=(1, 1, 8, 8))
    constant = "constant" in settings.get("scheme", "")
    coded = ["source", "generation"] if redraws else ["source"]
    assert [kind for kind in manifest.requires if kind in ("source", "generation", "sign")] == (
        ["sign"] if constant else coded + ["sign"] * (settings.get("learner") == "signed")
    )
    assert ps.verify(tmp_path / "net")
    assert equal_states(ps.load(tmp_path / "net"), ps.bake(net))
    fresh = conv2(**settings)
    ps.start_from(fresh, tmp_path / "net")
    assert equal_states(ps.bake(fresh), ps.bake(net))
    ps.save(fresh, tmp_path / "again", probe=(1, 1, 8, 8))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    ps.recycle(fresh, 1, every=1)
    assert ps.save(rescored(fresh, 3, scale), tmp_path / "later")
    assert equal_states(ps.load(tmp_path / "later"), ps.bake(fresh))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme_mistake(scheme)])
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))

    net = recycled(ps.convert(plain(), 0.3, scheme=scheme))
    ps.save(net, tmp_path / "net")
    assert equal_states(ps.load(tmp_path / "net", plain()).eval(), ps.bake(net))
    assert ps.verify(tmp_path / "net", plain())


def test_weights_of_more_than_one_piece(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Linear(700, 400)

    net = recycled(ps.convert(plain(), 0.3, scheme="kaiming_normal"))
    source = sources(net)["weight_source"].view(-1)
    assert (source - torch.arange(280_000)).abs().max() > 2**17, "copied from one piece into another"
    ps.save(net, tmp_path / "net")
    assert equal_states(ps.load(tmp_path / "net", plain()).eval(), ps.bake(net))


def test_a_file_without_copies_is_as_it_was(tmp_path: Path) -> None:
    net = conv2()
    expected = saved(net, tmp_path)
    ps.recycle(net, 1)
    assert saved(net, tmp_path) == expected
    ps.recycle(net, 300)
    assert saved(net, tmp_path) == expected, "what takes part keeps its values"


def test_the_plane_takes_a_mask_and_an_index_for_each_copy(tmp_path: Path) -> None:
    net: Any = recycled(ps.convert(nn.Linear(700, 400), 0.3, scheme="kaiming_normal"))
    ps.save(net, tmp_path / "net")
    mask, own = ps.masks(net)["weight"].view(-1), torch.arange(280_000)
    copied, kept = int((sources(net)["weight_source"].view(-1) != own)[mask].sum()), int(mask.sum())
    limit = sum(math.lgamma(kept + 1) - math.lgamma(m + 1) for m in (copied, kept - copied)) - math.lgamma(kept + 1)
    sizes = ps.Artifact.open(tmp_path / "net").sizes
    assert sizes is not None
    assert copied > 5000
    assert sizes.planes <= 1.001 * limit / math.log(2) / 8 + 64 + 19 * copied / 8 + 5


def test_a_network_that_was_recycled_starts_from_a_plain_file(tmp_path: Path) -> None:
    plain, net = conv2(), recycled(conv2())
    ps.save(plain, tmp_path / "net")
    ps.start_from(net, tmp_path / "net")
    assert equal_states(ps.bake(net), ps.bake(plain))


def test_weights_that_no_source_explains_are_refused(tmp_path: Path) -> None:
    net = recycled(conv2())
    raw(net)[0] += 1
    with pytest.raises(ps.ArtifactError, match=r"weights of 'features\.0\.weight' are not those of seed 0 any more"):
        ps.save(net, tmp_path / "net")
