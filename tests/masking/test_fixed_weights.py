"""Networks with `fixed`: what each layer fixes, all that keeps working, ten steps, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from masking.layers import LAYERS, Block, check_ten_steps, images, layers_of, pickled, raw, reverse, saved, sequential
from popup_surgery import ConversionError, KSchedule, bake, convert, load, masks, plan, save, set_k, start_from
from popup_surgery.errors import ArtifactError
from popup_surgery.learners import LEARNERS, EdgePopup
from popup_surgery.masking.k_schedule import check_schedule
from popup_surgery.masking.plan import Plan
from popup_surgery.masking.settings import MaskingSettings
from popup_surgery.masking.shares import fixed_counts
from popup_surgery.selection import kept_count
from popup_surgery.weights.fixed import DROPPED, FREE, KEPT, Fixed
from support import equal_states

SHARES = {"dropped": 0.5, "kept": 0.1}
TAKE = [name for name, learner in LEARNERS.items() if learner.takes_fixed]


def fates(name: str, shape: torch.Size, shares: dict[str, float] = SHARES, seed: int = 0) -> Tensor:
    """What becomes of each weight of a layer."""
    n = shape.numel()
    fixed = Fixed(n - kept_count(n, 1 - shares.get("dropped", 0)), kept_count(n, shares.get("kept", 0)))
    return torch.cat([torch.from_numpy(piece) for piece in fixed.fates(n, seed, name)]).view(shape)


def chosen(score: Tensor, fate: Tensor, kept: int) -> Tensor:
    """The right mask: what is fixed as kept, and by a stable sort the largest of the free ones."""
    order = score.detach().abs().masked_fill(fate != FREE, -1).flatten().argsort(descending=True, stable=True)
    mask = (fate == KEPT).flatten()
    mask[order[: kept - int(mask.sum())]] = True
    return mask.view(score.shape)


@pytest.mark.parametrize("shares", [SHARES, {"dropped": 0.7}, {"kept": 0.25}])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_keeps_its_share_and_chooses_among_its_free_weights(kind: str, shares: dict[str, float]) -> None:
    layer: Any = convert(LAYERS[kind][0](), 0.3, fixed=shares)
    fate = fates("weight", layer.weight_score.shape, shares)
    for _ in range(2):
        mask = chosen(layer.weight_score, fate, kept_count(fate.numel(), 0.3))
        assert torch.equal(masks(layer)["weight"], mask)
        assert torch.equal(layer.weight, torch.where(mask, raw(layer), 0.0))
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    assert plan(LAYERS[kind][0](), 0.3, fixed=shares).kept == int(mask.sum())


def test_another_seed_fixes_others_and_layers_are_independent() -> None:
    nets = [
        convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.2, fixed={"dropped": 0.8}, seed=s) for s in (0, 1)
    ]
    found = [mask for net in nets for mask in masks(net).values()]
    assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))
    assert torch.equal(found[0], fates("0.weight", found[0].shape, {"dropped": 0.8}) == FREE), "k is all that is free"


@pytest.mark.parametrize("learner", TAKE)
@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "kaiming_normal", "pretrained"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_each_scheme_learner_and_scope(learner: str, scheme: str, scope: Any, tmp_path: Path) -> None:
    if LEARNERS[learner].binary and scheme == "pretrained":
        return  # which is refused: tests/learners/test_biprop.py
    plain = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3))
    base = copy.deepcopy(plain) if scheme == "pretrained" else None
    net = convert(copy.deepcopy(plain), 0.3, fixed=SHARES, learner=learner, scheme=scheme, scope=scope)
    found = masks(net)
    assert sum(int(mask.sum()) for mask in found.values()) == sum(
        kept_count(n, 0.3) for n in ([78] if scope == "global" else [60, 18])
    )
    for name, mask in found.items():
        fate = fates(name, mask.shape)
        assert not mask[fate == DROPPED].any()
        assert mask[fate == KEPT].all()
    save(net, tmp_path / "net")
    assert equal_states(load(tmp_path / "net", copy.deepcopy(plain), base=base), bake(net))


def test_all_layers_together_rank_their_free_weights() -> None:
    net = convert(sequential(), 0.3, fixed=SHARES, scope="global", floor=0.2)
    scores = {key: score for key, score in net.named_parameters() if key.endswith("_score")}
    names = [key.removesuffix("_score") for key in scores]
    fate = torch.cat([fates(name, score.shape).flatten() for name, score in zip(names, scores.values(), strict=True)])
    flat = torch.cat([score.flatten() for score in scores.values()])
    found = torch.cat([mask.flatten() for mask in masks(net).values()])
    assert torch.equal(found, chosen(flat, fate, kept_count(flat.numel(), 0.3))), "no floor is reached"
    first = scores[f"{names[0]}_score"]
    first.data.mul_(1e-6)
    assert int(masks(net)[names[0]].sum()) == kept_count(first.numel(), 0.2)
    floorless = convert(sequential(), 0.3, fixed=SHARES, scope="global")
    for key, score in floorless.named_parameters():
        if key.endswith("_score"):
            score.data.copy_(scores[key])
    assert torch.equal(masks(floorless)[names[0]], fates(names[0], first.shape) == KEPT), "fixed weights are a floor"


def test_copies_casts_and_shared_weights() -> None:
    net: Any = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    net["two"].weight = net["one"].weight
    convert(net, 0.3, fixed=SHARES)
    assert list(masks(net)) == ["one.weight"]
    fate = fates("one.weight", net["one"].weight_score.shape)
    for other in (copy.deepcopy(net), pickled(net), saved(net), copy.deepcopy(net).double()):
        other["one"].weight_score.data.copy_(reverse(other["one"].weight_score))
        assert torch.equal(masks(other)["one.weight"], chosen(other["one"].weight_score, fate, kept_count(64, 0.3)))
    block = convert(Block(), 0.3, fixed=SHARES).eval()
    last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    assert all(torch.equal(one, masks(last)[key]) for key, one in masks(block).items())


def test_functional_calls_and_stacks() -> None:
    nets: list[Any] = [convert(nn.Linear(8, 5), 0.3, fixed=SHARES) for _ in range(3)]
    for seed, net in enumerate(nets):
        net.weight_score.data.copy_(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)))
    x = torch.randn(2, 8)
    states, buffers = stack_module_state(nets)
    together = vmap(lambda state, buffer: functional_call(nets[0], (state, buffer), (x,)))(states, buffers)
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_compiled_network(scope: Any) -> None:
    torch._dynamo.reset()
    net, x = convert(sequential(), 0.3, fixed=SHARES, scope=scope), images()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for share in (None, 0.2, None):
        set_k(net, share)
        assert torch.equal(compiled(x), net(x))
        for layer in layers_of(net):
            layer.weight_score.data.copy_(reverse(layer.weight_score))
    torch._dynamo.reset()


def test_new_layers_and_a_file_that_starts_it(tmp_path: Path) -> None:
    net: Any = convert(sequential(), 0.3, fixed=SHARES)
    net.append(nn.Linear(5, 4))
    convert(net, fixed=SHARES)
    fate = fates("4.weight", net[4].weight_score.shape)
    assert torch.equal(masks(net)["4.weight"], chosen(net[4].weight_score, fate, kept_count(20, 0.3)))
    for layer in layers_of(net):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    save(net, tmp_path / "net")
    for shares in (SHARES, {"dropped": 0.5}, None):
        again = convert(sequential().append(nn.Linear(5, 4)), 0.3, fixed=shares)
        start_from(again, tmp_path / "net")
        assert all(torch.equal(mask, masks(net)[key]) for key, mask in masks(again).items())
    save(convert(sequential().append(nn.Linear(5, 4)), 0.3), tmp_path / "free")
    again = convert(sequential().append(nn.Linear(5, 4)), 0.3, fixed=SHARES)
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(
        ArtifactError, match=r"the mask of '0\.weight' keeps weights that the network has fixed as dropp"
    ):
        start_from(again, tmp_path / "free")
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ten_steps_are_those_of_the_equations(scope: Any) -> None:
    """m is what is fixed, and the largest |s| of the rest."""
    net: Any = convert(sequential(), 0.3, fixed=SHARES, scope=scope, scheme="kaiming_normal")
    fate = [fates(name, mask.shape) for name, mask in masks(net).items()]

    def right(scores: list[Tensor]) -> list[Tensor]:
        if scope == "layer":
            return [chosen(s, f, kept_count(s.numel(), 0.3)) for s, f in zip(scores, fate, strict=True)]
        flat, all_fates = (torch.cat([each.flatten() for each in parts]) for parts in (scores, fate))
        together = chosen(flat, all_fates, kept_count(flat.numel(), 0.3)).split([s.numel() for s in scores])
        return [part.view(score.shape) for part, score in zip(together, scores, strict=True)]

    check_ten_steps(net, right)


def test_a_plan_says_what_is_fixed_and_goes_through_json() -> None:
    made = plan(Block(), 0.3, fixed=SHARES)
    assert Plan.from_json(made.to_json()) == made
    assert made.totals().endswith("ranked layer by layer, 50.0% fixed as dropped and 10.3% as kept")
    old = plan(Block(), 0.3)
    assert Plan.from_json(old.to_json().replace(', "fixed": null', "")) == old


# what is refused


EXPECTED = "expected a mapping with dropped, kept, or both"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fixed": 0.5}, rf"fixed is 0\.5: {EXPECTED}"),
        ({"fixed": {}}, rf"fixed is {{}}: {EXPECTED}"),
        ({"fixed": {"drop": 0.5, "kept": 2}}, r"fixed is .*: 'drop' is not one of its keys; nearest: dropped.*; and"),
        ({"fixed": {"dropped": 1}}, r"fixed is .*: dropped is 1; expected a share of each layer's weights, from 0 and"),
        ({"fixed": {"dropped": True}}, r"fixed is .*: dropped is True; expected a share"),
        ({"fixed": {"kept": float("nan")}}, r"fixed is .*: kept is nan; expected a share"),
        ({"fixed": {"kept": "0.1"}}, r"fixed is .*: kept is '0\.1'; expected a share"),
        ({"fixed": {"dropped": 0.0}}, r"fixed is .*: dropped and kept are 0; expected a share above 0, or no such"),
        ({"fixed": {"dropped": 0.8, "kept": 0.2}}, r"fixed is .*: dropped and kept together are 1 or more; expected"),
        ({"fixed": {"dropped": 0.8}}, r"fixed is .*: k is 0\.3; expected a k above 0 and up to 0\.2, as"),
        ({"fixed": {"kept": 0.4}}, r"fixed is .*: k is 0\.3; expected a k from 0\.4 to 1, as kept and"),
        ({"fixed": SHARES, "k": None, "pattern": "2:4"}, r"fixed is .*: it is beside the pattern 2:4, which ranks"),
        ({"fixed": SHARES, "k": {"2": 0.9}}, r"k=0\.9 keeps 19 of the 20 weights of 2\.weight, and fixed=.* keeps 2"),
        ({"fixed": SHARES, "learner": "dnw"}, r"fixed is .*; expected None; the largest scores of the free weights"),
        ({"fixed": SHARES, "learner": "gem_miner"}, r"fixed is .*; expected None; the largest scores .* gem_miner"),
        ({"fixed": SHARES, "learner_options": {"coats": [0.3, 0.1]}}, r"fixed is .*; expected None; the largest"),
        ({"fixed": SHARES, "learner": "supermask", "scaled": False}, r"fixed is .*; expected None; supermask"),
        ({"fixed": SHARES, "learner": "piggyback", "scaled": False}, r"fixed is .*; expected None; piggyback"),
        ({"fixed": {"kept": 0.29}, "scope": "global"}, r"k=0\.3 keeps 6 of the 20 weights of the network, and fixed="),
    ],
)  # fmt: skip
def test_what_does_not_go_together(settings: dict[str, Any], says: str) -> None:
    net: Any = nn.Sequential(*(nn.Linear(2, 2) for _ in range(2)), nn.Linear(4, 5))
    if settings.get("scope") == "global":
        net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    before = copy.deepcopy(net.state_dict())
    for verb in (convert, plan):
        with pytest.raises(ConversionError, match=f"^{says}"):
            verb(net, **settings)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_rule_that_a_layer_cannot_follow_names_the_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40))
    says = r"^the rule balanced with k=0\.1 keeps 16 of the 16 weights of 0\.weight, and fixed=.* 0 to 8$"
    with pytest.raises(ConversionError, match=says):
        convert(net, {"rule": "balanced", "k": 0.1}, fixed={"dropped": 0.5})
    convert(net, {"rule": "erk", "k": 0.1}, fixed={"dropped": 0.1})
    assert sum(int(mask.sum()) for mask in masks(net).values()) == kept_count(1616, 0.1)


@pytest.mark.parametrize("k", [0.1, 0.2, 0.3, 0.7, 0.9])
def test_shares_that_just_fit_are_taken_in_layers_of_every_size(k: float) -> None:
    for shares in ({"dropped": round(1 - k, 12)}, {"kept": k}):
        settings = MaskingSettings.of({"k": k, "fixed": shares})
        for n in range(1, 200):
            fixed = fixed_counts(n, settings)
            assert fixed is not None
            assert fixed.free(n) in (kept_count(n, k), n - kept_count(n, k))
            assert fixed.allows(n, kept_count(n, k))


def test_a_learner_that_selects_in_its_own_way_takes_no_fixed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(EdgePopup):
        def select(self, scores: Any, kept: int, names: Any = (), floors: Any = None, fixed: Any = None) -> Any:
            return super().select(scores, kept)

    class Louder(EdgePopup):
        def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
            return 2 * super().effective(weight, score, mask)

    monkeypatch.setitem(LEARNERS, "own", Own())
    with pytest.raises(ConversionError, match=r"expected None; the largest scores of the free weights .* own chooses"):
        convert(nn.Linear(8, 4), 0.3, fixed=SHARES, learner="own")
    monkeypatch.setitem(LEARNERS, "louder", Louder())
    layer: Any = convert(nn.Linear(8, 4), 0.3, fixed=SHARES, learner="louder")
    assert int((layer.weight != 0).sum()) == kept_count(32, 0.3)


def test_k_stays_within_what_is_fixed() -> None:
    net = convert(nn.Linear(10, 10), 0.3, fixed=SHARES)
    for share in (0.1, 0.5, None):
        set_k(net, share)
        assert int(masks(net)["weight"].sum()) == kept_count(100, 0.3 if share is None else share)
    for share in (0.05, 0.6):
        with pytest.raises(ConversionError, match=r"of weight; expected at least 10 and at most 50, as fixed allows"):
            set_k(net, share)
    check_schedule(net, KSchedule("cubic", start=0.5, epochs=2))
    for start, word in ((0.8, "high"), (0.05, "low")):
        with pytest.raises(ConversionError, match=f"k_schedule starts too {word}: k={start:g} keeps"):
            check_schedule(net, KSchedule("cubic", start=start, epochs=2))
