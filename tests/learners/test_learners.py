"""Each learner against its own equations, written out in plain PyTorch, and what becomes of its result."""

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from popup_surgery import (
    ArtifactError,
    ConversionError,
    Recipe,
    RecipeError,
    UnknownName,
    bake,
    build,
    convert,
    evaluate,
    inspect,
    load,
    masks,
    sampled,
    save,
    start_from,
    train,
    verify,
)
from popup_surgery.config.yaml import to_yaml
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.data.seeding import ambient_seed
from popup_surgery.errors import Stopped
from popup_surgery.learners import LEARNERS, EdgePopup, get_learner, register_learner
from popup_surgery.training.distributed import start
from popup_surgery.training.lottery_ticket import TicketTrainer
from popup_surgery.weights import SCHEMES
from popup_surgery.weights.streams import untied
from support import PATIENCE, check_ensemble, equal_states, launch, slow_except, stopped_and_resumed, stopping

# timm's readers hand out open files and leave the closing to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.(png|jpg|tar)'>:ResourceWarning")

SUPERMASK = ["surgery.learner=supermask", "surgery.k=null", "training.lr=50", "training.weight_decay=0"]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def conv(**settings: Any) -> Any:
    return convert(nn.Conv2d(3, 4, 3, bias=False), **settings)


def small(**settings: Any) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return convert(net, **settings)


def build_digits(pretrained: Any = False) -> nn.Module:
    return build("popup_surgery/conv2", pretrained=pretrained, width=0.25, in_chans=1, img_size=8)


def raw(layer: Any) -> Tensor:
    return layer._parameters["weight"].detach()


# every learner


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_file_gives_back_what_was_baked(learner: str, tmp_path: Path) -> None:
    net = small(learner=learner)
    net(x(2, 3, 6, 6))
    if LEARNERS[learner].learns_weights:
        with pytest.raises(ArtifactError, match="trains the weights themselves"):
            save(net, tmp_path / "net")
        assert not list(tmp_path.iterdir())
        return
    save(net, tmp_path / "net", probe=(1, 3, 6, 6))
    baked = bake(net)
    assert equal_states(baked, load(tmp_path / "net", bake(small())))
    assert all(torch.equal(baked.get_parameter(key) != 0, mask) for key, mask in masks(net).items())
    assert verify(tmp_path / "net", bake(small()))


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_goes_on_from_a_file(learner: str, tmp_path: Path) -> None:
    source: Any = small(k=0.4, scaled=False)
    with torch.no_grad():
        source[4].weight_score.copy_(x(5, 64))
    save(source, tmp_path / "net")
    net = small(learner=learner, k=0.4 if LEARNERS[learner].takes_k else None, scaled=False)
    assert not torch.equal(masks(net)["4.weight"], masks(source)["4.weight"])
    start_from(net, tmp_path / "net")
    assert equal_states(bake(net), bake(source))


@pytest.mark.parametrize("learner", slow_except(LEARNERS, ["edge_popup", "dnw"]))
def test_every_learner_runs_in_the_loop_and_goes_on(learner: str, tmp_path: Path) -> None:
    overrides = [f"surgery.learner={learner}", "training.epochs=2", "training.lr=0.01"]
    overrides += [] if LEARNERS[learner].takes_k else ["surgery.k=null"]
    through, result = stopped_and_resumed("digits", overrides, tmp_path)
    moved = any(epoch.changed for epoch in through.history)
    assert moved == LEARNERS[learner].trains
    plain = build_digits(result.file) if LEARNERS[learner].learns_weights else load(result.file)
    assert equal_states(result.model, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["surgery.learner=signed", "surgery.learner_options.threshold=0.01", "surgery.k=null"],
        ["surgery.learner_options={coats: [0.5, 0.2, 0.1]}"],
    ],
)
def test_learners_with_options_run_in_the_loop_and_go_on(overrides: list[str], tmp_path: Path) -> None:
    through, result = stopped_and_resumed("digits", [*overrides, "training.epochs=2", "training.lr=0.01"], tmp_path)
    assert any(epoch.changed for epoch in through.history)
    assert equal_states(result.model, load(result.file))


# supermask: the equations


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("init", [0, 0.7, "uniform"])
def test_supermask_gradient_is_that_of_a_sample_with_the_probability_behind_it(init: Any, rescale: bool) -> None:
    layer: Any = conv(learner="supermask", learner_options={"init": init, "rescale": rescale})
    with torch.no_grad():
        layer.weight_score.add_(x(4, 3, 3, 3))
    images = x(2, 3, 6, 6)
    with sampled(3):
        out = layer(images)
        sample = (layer.weight != 0).float()
    out.pow(3).sum().backward()
    assert 0 < sample.sum() < sample.numel()

    score = layer.weight_score.detach().clone().requires_grad_()
    mask = sample + score.sigmoid() - score.sigmoid().detach()
    weight = raw(layer) * mask
    if rescale:
        weight = weight * (mask.numel() / mask.sum())
    expected = nn.functional.conv2d(images, weight)
    expected.pow(3).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.weight_score.grad, score.grad)
    assert (score.grad != 0).all(), "kept and dropped weights alike"


def test_supermask_gradient_for_a_weight_that_learns_too() -> None:
    layer: Any = conv(learner="supermask", learner_options={"rescale": True})
    layer._parameters["weight"].requires_grad_()
    with sampled(3):
        layer(x(2, 3, 6, 6)).pow(2).sum().backward()
        mask = masks(layer)["weight"].float()
    weight = raw(layer).clone().requires_grad_()
    nn.functional.conv2d(x(2, 3, 6, 6), weight * mask * (mask.numel() / mask.sum())).pow(2).sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, weight.grad)


@pytest.mark.parametrize("training", [True, False])
def test_supermask_keeps_a_weight_with_the_probability_of_its_score(training: bool) -> None:
    layer: Any = conv(learner="supermask").train(training)
    scores = torch.linspace(-4, 4, 108).view(4, 3, 3, 3)
    layer.weight_score.data.copy_(scores)
    torch.manual_seed(0)
    reads = [layer.weight.detach() != 0 for _ in range(2000)]
    p = 1 / (1 + torch.exp(-scores))
    share = torch.stack(reads).float().mean(0)
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / 2000).sqrt()).all()
    together = (reads[0] & reads[1]).sum() / 108  # of independent reads
    assert abs(float(together - p.pow(2).mean())) < 0.15
    assert len({tuple(read.view(-1).tolist()) for read in reads}) == 2000, "each read is another sample"


def test_supermask_first_scores() -> None:
    assert torch.equal(conv(learner="supermask").weight_score, conv().weight_score), "the uniform ones of edge-popup"
    assert conv(learner="supermask").weight_score.abs().max() <= 1 / math.sqrt(27)
    for constant in (0, -1.5):
        score: Any = conv(learner="supermask", learner_options={"init": constant}).weight_score
        assert torch.equal(score, torch.full_like(score, constant))
    big: Any = convert(nn.Linear(300_000, 1), learner="supermask", learner_options={"init": 2})
    assert big.weight_score.eq(2).all(), "of more than one piece"


# supermask: which sample


def test_a_sample_is_a_function_of_the_generator() -> None:
    net, images = small(learner="supermask"), x(2, 3, 6, 6)
    torch.manual_seed(5)
    first, second = net(images), net(images)
    torch.manual_seed(5)
    assert torch.equal(net(images), first)
    assert torch.equal(net(images), second)
    assert not torch.equal(first, second)


def test_a_named_sample_is_a_function_of_its_name_alone() -> None:
    net: Any = small(learner="supermask").eval()
    images, state = x(2, 3, 6, 6), torch.get_rng_state()
    with sampled(7, 1):
        first = net(images)
        alone = net[4].weight.detach().clone()
        assert torch.equal(net(images), first)
        assert torch.equal(copy.deepcopy(net)(images), first)
        assert torch.equal(bake(net)(images), first)
        with sampled(7, 2):
            assert not torch.equal(net(images), first)
        torch.manual_seed(8)
        assert torch.equal(net(images), first)
    torch.set_rng_state(state)
    with sampled(7, 1):
        assert torch.equal(net[4].weight, alone), "whatever was read before"
        net.to(memory_format=torch.channels_last)
        assert torch.equal(net(images.contiguous(memory_format=torch.channels_last)), first)
    assert torch.equal(torch.get_rng_state(), state), "and PyTorch's own generator is left alone"


def test_layers_of_one_shape_have_other_noise() -> None:
    net = convert(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)), learner="supermask", learner_options={"init": 0})
    with sampled(0):
        one, other = masks(net).values()
    assert not torch.equal(one, other)
    assert 0.4 < (one == other).float().mean() < 0.6


def test_masks_bake_and_save_take_the_most_probable_network_or_the_sample_that_is_named(tmp_path: Path) -> None:
    net: Any = small(learner="supermask")
    net[1](net[0](x(2, 3, 6, 6)))
    probable = {f"{i}.weight": net[i].weight_score > 0 for i in (0, 4)}
    found = masks(net)
    assert all(torch.equal(found[key], mask) for key, mask in probable.items())
    manifest = save(net, tmp_path / "net", probe=(1, 3, 6, 6), provenance={"mask": "another word"})
    assert manifest.provenance["mask"] == "the most probable network"
    assert manifest.kept == sum(int(mask.sum()) for mask in probable.values())
    assert [entry.note["k"] for entry in manifest.masked] == [e.kept / e.numel for e in manifest.masked if e.kept]
    assert not any(entry.note["scaled"] for entry in manifest.masked)
    with sampled(4):
        save(net, tmp_path / "four")
        four = masks(net)
        assert equal_states(bake(net), load(tmp_path / "four", bake(net)))
    assert inspect(tmp_path / "four").provenance["mask"] == "the sample 4"
    assert not torch.equal(four["4.weight"], probable["4.weight"])
    assert equal_states(bake(net), load(tmp_path / "net", bake(net)))

    held: Any = small(learner="supermask", learner_options={"sample": 4})
    held.load_state_dict(net.state_dict())
    assert all(torch.equal(mask, four[key]) for key, mask in masks(held).items())
    assert save(held, tmp_path / "held").provenance["mask"] == "the sample 4"
    assert (tmp_path / "held").read_bytes() == (tmp_path / "four").read_bytes()
    assert not torch.equal(held[4].weight, held[4].weight), "reads go on sampling"


@pytest.mark.slow
@pytest.mark.parametrize("backend", slow_except(["aot_eager", "inductor"], ["aot_eager"]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_a_compiled_network_samples_at_each_call(backend: str) -> None:
    torch._dynamo.reset()
    layer: Any = conv(learner="supermask", learner_options={"rescale": True})
    images = x(2, 3, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.manual_seed(5)
    got = [compiled(images) for _ in range(3)]
    torch.manual_seed(5)
    expected = [layer(images) for _ in range(3)]
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got[0], got[1])
    (by_compiled,) = torch.autograd.grad(got[1].pow(2).sum(), layer.weight_score)
    (by_eager,) = torch.autograd.grad(expected[1].pow(2).sum(), layer.weight_score)
    torch.testing.assert_close(by_compiled, by_eager)
    torch._dynamo.reset()


def test_an_ensemble_by_vmap_samples_each_members_scores() -> None:
    members = [convert(nn.Linear(6, 5), learner="supermask", seed=seed) for seed in (1, 2, 3)]
    with sampled(2):
        check_ensemble(members, x(4, 6))


def test_gradient_checkpointing_sees_the_same_sample_twice() -> None:
    layer: Any = conv(learner="supermask")
    images = x(2, 3, 6, 6)
    for name in ((), (6,)):
        torch.manual_seed(3)
        with sampled(*name) if name else torch.enable_grad():
            out = torch.utils.checkpoint.checkpoint(layer, images, use_reentrant=False)
            (by_checkpoint,) = torch.autograd.grad(out.pow(2).sum(), layer.weight_score)
        torch.manual_seed(3)
        with sampled(*name) if name else torch.enable_grad():
            (plain,) = torch.autograd.grad(layer(images).pow(2).sum(), layer.weight_score)
        torch.testing.assert_close(by_checkpoint, plain)


# supermask: rescaled weights in a file


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rescaled_weights_are_the_files_to_the_bit(scheme: str, tmp_path: Path) -> None:
    net: Any = small(learner="supermask", scheme=scheme, learner_options={"rescale": True})
    net[0].weight_score.data.sub_(0.1)
    manifest = save(net, tmp_path / "net", probe=(1, 3, 6, 6))
    baked = bake(net)
    assert equal_states(baked, load(tmp_path / "net", bake(small())))
    assert verify(tmp_path / "net", bake(small()))
    for key, mask in masks(net).items():
        layer = net.get_submodule(key.removesuffix(".weight"))
        product = raw(layer) * mask * (mask.numel() / int(mask.sum()))
        torch.testing.assert_close(baked.get_parameter(key), product)
        assert 0.2 < mask.float().mean() < 0.7
    plain = small(scheme=scheme, scaled=False)
    for entry, before in zip(manifest.masked, save(plain, tmp_path / "plain").masked, strict=True):
        assert entry.kept
        assert entry.std == before.std * (entry.numel / entry.kept)


def test_a_mask_without_any_weight_rescales_nothing(tmp_path: Path) -> None:
    layer: Any = conv(learner="supermask", learner_options={"init": -50, "rescale": True})
    out = layer(x(2, 3, 6, 6))
    assert not out.any()
    out.square().sum().backward()
    assert layer.weight_score.grad.isfinite().all()
    save(layer, tmp_path / "none")
    assert not load(tmp_path / "none", nn.Conv2d(3, 4, 3, bias=False)).get_parameter("weight").any()


def test_weights_that_are_not_the_seeds_are_rescaled_as_they_are() -> None:
    layer = conv(learner="supermask", learner_options={"rescale": True})
    layer.load_state_dict({"weight": x(4, 3, 3, 3)})
    mask = masks(layer)["weight"]
    torch.testing.assert_close(bake(layer).weight, x(4, 3, 3, 3) * mask * (108 / mask.sum()))


@pytest.mark.parametrize("options", [{}, {"init": 0}, {"rescale": True}])
def test_supermask_goes_on_from_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    net: Any = small(learner="supermask", learner_options=options)
    with torch.no_grad():
        net[4].weight_score.add_(x(5, 64))
    save(net, tmp_path / "net")
    fresh: Any = small(learner="supermask", learner_options=options)
    before = fresh[4].weight_score.detach().clone()
    start_from(fresh, tmp_path / "net")
    assert all(torch.equal(mask, masks(net)[key]) for key, mask in masks(fresh).items())
    assert equal_states(bake(fresh), bake(net))
    torch.testing.assert_close(fresh[4].weight_score.abs(), before.abs())
    if "rescale" in options:
        with pytest.raises(ArtifactError, match="differ: the file"):
            start_from(small(learner="supermask"), tmp_path / "net")


# supermask: settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learner": "supermask", "k": 0.5}, r"k is 0\.5; expected None; supermask takes no k"),
        ({"learner": "supermask", "scaled": True}, r"scaled is True; expected False; supermask takes no k"),
        ({"learner": "supermask", "scope": "global"}, r"scope is 'global'; expected 'layer'; supermask takes no k"),
        (
            {"learner": "supermask", "learner_options": {"init": "zero"}},
            r"init is 'zero'; expected 'uniform', or a num",
        ),
        ({"learner": "supermask", "learner_options": {"init": math.nan}}, r"init is nan; expected"),
        ({"learner": "supermask", "learner_options": {"init": 1e300}}, r"init is 1e\+300; expected"),
        ({"learner": "supermask", "learner_options": {"init": True}}, r"init is True; expected"),
        ({"learner": "supermask", "learner_options": {"rescale": 1}}, r"rescale is 1; expected true or false"),
        ({"learner": "supermask", "learner_options": {"sample": -1}}, r"sample is -1; expected an integer from 0"),
        ({"learner": "supermask", "learner_options": {"rescal": True}}, r"no option 'rescal'; nearest: rescale"),
        ({"learner": "supermask", "learner_options": "rescale"}, r"learner_options is 'rescale'; expected a mapping"),
        ({"learner_options": {"rescale": True}}, r"edge_popup has no option 'rescale'; nearest: coats"),
    ],
)
def test_what_convert_refuses(settings: dict[str, Any], says: str) -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(ConversionError, match=says) as caught:
        convert(layer, **settings)
    assert "\n" not in str(caught.value)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)


def test_rescaled_pretrained_weights_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"rescale is True, and weight is pretrained"):
        convert(nn.Linear(3, 2), scheme="pretrained", learner="supermask", learner_options={"rescale": True})
    layer: Any = nn.Linear(30, 20)
    weight = layer.weight.detach().clone()
    convert(layer, scheme="pretrained", learner="supermask")
    assert torch.equal(bake(layer).get_parameter("weight"), torch.where(layer.weight_score > 0, weight, 0.0))


def test_a_converted_network_keeps_its_options() -> None:
    net: Any = small(learner="supermask", learner_options={"init": 3})
    net[4] = nn.Linear(64, 7)
    convert(net)
    assert net[4].weight_score.eq(3).all()
    convert(net, learner="supermask", learner_options={"init": 3})
    with pytest.raises(ConversionError, match=r"converted with learner_options=\{'init': 3\}, which"):
        convert(net, learner_options={"init": 4})
    with pytest.raises(UnknownName):
        get_learner("supermsk", {})
    assert not get_learner("supermask").rescale, "the registered one is as it was"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["surgery.learner=supermask"], r"surgery\.k is 0\.5; expected null; supermask takes no k"),
        (["surgery.k=null"], r"surgery\.k is missing"),
        ([*SUPERMASK, "surgery.scaled=true"], r"surgery\.scaled is true; expected false;"),
        ([*SUPERMASK, "surgery.scope=global"], r"surgery\.scope is 'global'; expected \"layer\";"),
        ([*SUPERMASK, "surgery.learner_options.init=many"], r"surgery\.learner_options is .*init is 'many'; expected"),
        (["surgery.learner_options.init=0"], r"surgery\.learner_options is .*edge_popup has no option 'init'"),
    ],
)
def test_what_a_recipe_refuses(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.load("digits", overrides)
    assert "\n" not in str(caught.value)


def test_convert_on_the_command_line(cli: Any, tmp_path: Path) -> None:
    done = cli("convert", "fc", "--learner", "supermask", "-o", tmp_path / "file")
    assert (done.status, done.err) == (0, "")
    assert "266,200 weights, the scores decide how many are kept" in done.out
    assert 0.4 < inspect(tmp_path / "file").kept / 266_200 < 0.6
    for bad in (["--k", "0.3"], ["--scaled"]):
        done = cli("convert", "fc", "--learner", "supermask", "-o", tmp_path / "other", *bad)
        assert done.status == 2
        assert re.fullmatch(r"error: (k|scaled) is .*; supermask takes no k, because its scores decide .*\n", done.err)
    assert " kept " not in cli("convert", "fc", "--learner", "supermask", "--dry-run").out.splitlines()[1]


# dnw


def test_dnw_trains_all_weights_and_uses_the_largest() -> None:
    """Against the same steps written out: SGD with momentum and weight decay on v, of which the top k are used."""
    layer: Any = conv(learner="dnw", k=0.4, scaled=False)
    rule: Any = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    weights = raw(layer).clone()
    v: Any = layer.weight_score.detach().clone().requires_grad_()
    ours, theirs = torch.optim.SGD([layer.weight_score], **rule), torch.optim.SGD([v], **rule)
    used = []
    for step in range(6):
        images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        mask = torch.zeros(108)
        mask[v.detach().abs().view(-1).argsort(descending=True, stable=True)[:44]] = 1
        used.append(mask)
        mask = mask.view(4, 3, 3, 3)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        layer(images).pow(2).sum().backward()
        weight = (v.detach() * mask).requires_grad_()
        nn.functional.conv2d(images, weight).pow(2).sum().backward()
        v.grad = weight.grad  # straight through, for all
        assert torch.equal(layer.weight.detach(), (v * mask).detach())
        assert torch.equal(layer.weight_score.grad, v.grad)
        assert layer.weight_score.grad[mask == 0].any()
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.weight_score, v)
    assert not torch.equal(used[0], used[-1]), "other weights became the largest"
    assert torch.equal(raw(layer), weights)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dnw_starts_as_the_weights(scheme: str) -> None:
    net: Any = small(learner="dnw", scheme=scheme)
    constant = "constant" in scheme
    close: Any = {"rtol": 1 / 16 if constant else 0, "atol": 0}
    for layer in (net[0], net[4]):
        torch.testing.assert_close(layer.weight_score.detach(), raw(layer), **close)
        assert torch.equal(layer.weight_score.sign(), raw(layer).sign())
        assert not constant or layer.weight_score.unique().numel() > 0.95 * layer.weight_score.numel()
    low: Any = small(learner="dnw", scheme=scheme).bfloat16()
    assert low[4].weight.dtype == torch.bfloat16
    kept = low[4].weight != 0
    close["rtol"] += 2**-7 if constant else 0
    torch.testing.assert_close(low[4].weight[kept].detach(), raw(low[4])[kept].detach(), **close)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "constant" in name])
def test_dnw_under_a_constant_scheme_keeps_weights_of_the_seeds_choice(scheme: str) -> None:
    def found(seed: int) -> dict[str, Tensor]:
        return masks(convert(build("popup_surgery/conv2"), k=0.5, learner="dnw", scheme=scheme, seed=seed))

    first, other = found(0), found(1)
    assert all(torch.equal(mask, again) for mask, again in zip(first.values(), found(0).values(), strict=True))
    for key, mask in first.items():
        assert 0.4 < (mask == other[key]).float().mean() < 0.6
        for share in (mask.flatten(1).float().mean(1), mask.float().mean(0).flatten()):  # of each output, of each input
            assert abs(share.mean() - 0.5) < 0.01
            assert share.var() < 2 * 0.25 * share.numel() / mask.numel(), "as if each were chosen by itself"


@pytest.mark.parametrize("k", slow_except([0.3, 0.5], [0.5]))
def test_dnw_learns_under_a_constant_scheme(k: float, tmp_path: Path) -> None:
    overrides = ["surgery.learner=dnw", f"surgery.k={k}", "surgery.seed=1", "training.epochs=3", "training.lr=0.02"]
    assert train("digits", overrides=overrides, output=tmp_path / "run").accuracy > 0.8


@pytest.mark.parametrize("levels", [[0.0, 1.0], [-1.0, 0.0, 1.0], [0.5, 1.0, 2.0], [1.0]])
def test_ties_of_pretrained_weights_are_broken_by_the_seed(levels: list[float]) -> None:
    """As of weights that were quantised, or pruned before. In half and bfloat16 nothing changes."""
    weight = torch.tensor(levels)[torch.randint(len(levels), (200, 100), generator=torch.Generator().manual_seed(0))]
    shares = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer: Any = nn.Linear(100, 200).to(dtype)
        layer.weight.data.copy_(weight)
        convert(layer, 0.8, scheme="pretrained", learner="dnw")
        mask = masks(layer)["weight"]
        assert layer.weight_score.detach().abs().isfinite().all()
        assert layer.weight_score[mask].abs().min() >= layer.weight_score[~mask].abs().max()
        if len(levels) > 1:
            assert torch.equal(layer.weight_score.to(torch.float16).abs().float(), weight.abs())
            assert torch.equal(layer.weight.float()[mask].half(), weight[mask].half())
        shares.append(mask.float().mean(1))
    assert all(share.min() > 0.6 for share in shares), "the last rows as well as the first"


@pytest.mark.parametrize("values", [[0.0], [float("inf"), 1.0], [float("nan"), 0.0], [3.4e38, -3.4e38]])
def test_breaking_ties_makes_no_number_another_kind(values: list[float]) -> None:
    piece = np.array(values * 600, np.float32)
    (found,) = untied([piece], 0, "weight")
    assert (np.isfinite(found) == np.isfinite(piece)).all()
    assert (
        np.sign(found[np.isfinite(piece) & (piece != 0)]) == np.sign(piece[np.isfinite(piece) & (piece != 0)])
    ).all()


def test_values_that_differ_are_left_as_they_are() -> None:
    for scheme in ("kaiming_normal", "kaiming_uniform"):
        layer: Any = convert(nn.Linear(300, 500), scheme=scheme, learner="dnw")
        assert torch.equal(layer.weight_score, raw(layer))


def test_dnw_of_pretrained_weights() -> None:
    layer: Any = nn.Linear(30, 20)
    weight = layer.weight.detach().clone()
    convert(layer, 0.2, scheme="pretrained", learner="dnw")
    assert torch.equal(layer.weight_score, weight)
    assert layer.weight.abs()[layer.weight != 0].min() >= weight.abs().view(-1).sort(descending=True).values[119]


def test_dnw_is_no_subnetwork_that_a_file_could_hold(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"dnw trains the weights themselves, .*bake\(model\)\.state_dict\(\)"):
        save(small(learner="dnw"), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dnw_in_the_loop_writes_its_weights_and_masks(tmp_path: Path) -> None:
    overrides = ["surgery.learner=dnw", "surgery.k=0.3", "training.epochs=4", "training.lr=0.02"]
    result = train("digits", overrides=overrides, output=tmp_path / "run")
    assert result.accuracy > 0.8
    assert result.file.name == "digits.safetensors"
    assert (result.weights, result.kept) == (23_568, sum(n - int(0.7 * n) for n in (144, 2304, 16384, 4096, 640)))
    found = load_file(result.file.with_name("digits.masks.safetensors"))
    state = load_file(result.file)
    assert equal_states(result.model, build_digits(result.file))
    assert list(found) == sorted(state)
    assert all(torch.equal(state[key] != 0, mask) for key, mask in found.items())
    drawn = bake(convert(build_digits(), k=1.0, scaled=False)).state_dict()
    assert all((state[key] != drawn[key])[mask].float().mean() > 0.9 for key, mask in found.items()), "they have learnt"
    again = train("digits", overrides=overrides, output=tmp_path / "run", resume=True)
    assert equal_states(again.model, result.model)
    assert dataclasses.replace(again, model=result.model) == result


# random


@pytest.mark.slow
def test_a_random_mask_is_any_choice_of_k_weights() -> None:
    """Over seeds: each weight as often as any other, and each pair too, with the exact number in each mask."""
    n, k, draws = 12, 1 / 3, 3000
    found = []
    for seed in range(draws):
        layer = convert(nn.Linear(n, 1, bias=False), k, learner="random", seed=seed)
        found.append(masks(layer)["weight"].view(-1))
    chosen = torch.stack(found).double()
    kept = n - int((1 - k) * n)
    assert (chosen.sum(1) == kept).all()
    p = kept / n
    assert ((chosen.mean(0) - p).abs() < 4.5 * math.sqrt(p * (1 - p) / draws)).all()
    pairs = (chosen.T @ chosen / draws)[~torch.eye(n, dtype=torch.bool)]
    both = kept * (kept - 1) / (n * (n - 1))
    assert ((pairs - both).abs() < 4.5 * math.sqrt(both * (1 - both) / draws)).all()


def test_nothing_of_a_random_network_learns_unless_it_is_told_to() -> None:
    net = small(learner="random", k=0.5)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert {n for n, p in small(learner="random", norm="train").named_parameters() if p.requires_grad} == {
        "1.weight",
        "1.bias",
    }
    layer: Any = conv(learner="random", k=0.4)
    layer._parameters["weight"].requires_grad_()
    layer(x(2, 3, 6, 6)).sum().backward()
    assert torch.equal(layer._parameters["weight"].grad != 0, masks(layer)["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_random_masks_in_the_loop(processes: int, images: Path, tmp_path: Path) -> None:
    values = {
        "model": {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}},
        "surgery": {"k": 0.5, "scaled": False, "learner": "random"},
        "data": {"name": "folder", "root": str(images), "batch_size": 8, "workers": 0, "input_size": [3, 16, 16]},
        "training": {"epochs": 2, "lr": 0.1, "weight_decay": 0.1, "clip_norm": 1.0},
    }
    (tmp_path / "random.yaml").write_text(to_yaml(values))
    call = ["-m", "popup_surgery", "train", str(tmp_path / "random.yaml"), "-o", str(tmp_path / "run")]
    words = [sys.executable, *call, "--num-processes", str(processes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "run" / "random.popup.safetensors"
    fresh = convert(build("timm/test_resnet", num_classes=3), 0.5, scaled=False)
    loaded = load(file)
    for key, mask in masks(fresh).items():
        assert torch.equal(loaded.get_parameter(key) != 0, mask), "the first mask is the last"
    means = {name: buffer for name, buffer in loaded.named_buffers() if name.endswith("running_mean")}
    assert means
    assert all(mean.any() for mean in means.values()), "and statistics have accumulated"
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate(file, data_dir=images).accuracy == last["accuracy"]
    assert last["changed"] == 0


def test_a_random_network_whose_norms_learn(images: Path, tmp_path: Path) -> None:
    values = {
        "model": {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}},
        "surgery": {"k": 0.5, "scaled": False, "learner": "random", "norm": "train"},
        "data": {"name": "folder", "root": str(images), "batch_size": 4, "workers": 0, "input_size": [3, 16, 16]},
        "training": {"epochs": 1, "lr": 0.1},
    }
    result = train(values, output=tmp_path / "run")
    scales = [p for n, p in result.model.named_parameters() if n.endswith("bn1.weight")]
    assert scales
    assert all((scale != 1).any() for scale in scales)


# in the loop


@pytest.fixture(scope="module")
def supermask_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    overrides = [
        "training.epochs=8",
        "training.optimizer=adam",
        "training.lr=0.3",
        "surgery.learner_options.rescale=true",
    ]
    overrides.append("surgery.scheme=signed_xavier_constant")
    return train("digits", overrides=[*SUPERMASK, *overrides], output=tmp_path_factory.mktemp("supermask") / "run")


@pytest.mark.slow
def test_supermask_learns_digits_in_the_loop(supermask_run: Any) -> None:
    assert supermask_run.accuracy > 0.8
    assert supermask_run.history[-1].changed < supermask_run.history[0].changed
    manifest = inspect(supermask_run.file)
    assert manifest.provenance["mask"] == "the most probable network"
    assert manifest.provenance["accuracy"] == evaluate(supermask_run.file).accuracy
    surgery: Any = Recipe.parse(manifest.provenance["recipe"]).surgery
    assert surgery.learner_options == {"rescale": True}
    assert equal_states(supermask_run.model, load(supermask_run.file))
    assert verify(supermask_run.file)
    assert (manifest.weights, manifest.kept) == (supermask_run.weights, supermask_run.kept)


@pytest.mark.slow
def test_a_supermask_run_that_was_stopped_ends_in_the_same_file(supermask_run: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def after(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise Stop

    recipe = supermask_run.output / "recipe.yaml"
    with pytest.raises(Stop):
        train(recipe, output=tmp_path / "run", after_epoch=after)
    again = train(recipe, output=tmp_path / "run", resume=True)
    assert again.file.read_bytes() == supermask_run.file.read_bytes()
    assert [epoch.accuracy for epoch in again.history] == [epoch.accuracy for epoch in supermask_run.history]


STEP = """
import sys, torch
from popup_surgery import Recipe
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.experiment.setup import _network
from popup_surgery.training.trainer import Trainer
from popup_surgery.training.distributed import leave, start
file, accumulate, *overrides = sys.argv[1:]
recipe = Recipe.load("digits", ["training.epochs=1", f"training.accumulate={accumulate}", *overrides])
accelerator = start(recipe.training)
model = _network(recipe)
data = open_data(recipe.data, (1, 8, 8), 0, accelerator.device, quiet)
fit = Trainer(model, data, recipe.training, accelerator, quiet)
fit._one_step(fit.data.train(0, fit.part))
if accelerator.is_main_process:
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, file)
accelerator.wait_for_everyone()
leave()
"""


@pytest.mark.slow
def test_processes_and_pieces_of_a_step_see_the_same_sample(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP)
    results = []
    for processes, accumulate in ((1, 1), (2, 2)):
        file = tmp_path / f"{processes}.pt"
        launch(processes, script, file, accumulate, *SUPERMASK)
        results.append(torch.load(file, weights_only=True))
    for name, score in results[0].items():
        assert (results[1][name] - score).abs().max() <= 1e-6 * score.abs().max(), name


# the lottery ticket

TICKET = ["surgery=none", "training.lr=0.05", "training.epochs=2", "training.checkpoint_minutes=0"]
TICKET += ["lottery_ticket.k=0.2", "lottery_ticket.rounds=2", "lottery_ticket.rewind_epoch=1"]


def digits_data(recipe: Recipe) -> Any:
    return open_data(recipe.data, (1, 8, 8), recipe.training.seed, torch.device("cpu"), quiet)


@pytest.fixture(scope="module")
def ticket_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train("digits", overrides=TICKET, output=tmp_path_factory.mktemp("ticket") / "run")


def test_the_lottery_ticket_is_iterative_magnitude_pruning_with_rewinding(ticket_run: Any) -> None:
    """Against the same written out: train, prune, rewind to the end of epoch 1, train, prune, rewind, train."""
    recipe = Recipe.load("digits", TICKET)
    data, training = digits_data(recipe), recipe.training
    with ambient_seed([0]):
        net = build_digits()
    mask = {name: torch.ones_like(weight) for name, weight in net.named_parameters()}
    start: dict[str, Tensor] = {}
    for number, (pruned, epoch) in enumerate([(0, 0), (0, 1), (1, 1), (2, 1)]):
        if number == 1:
            start = {name: weight.detach().clone() for name, weight in net.named_parameters()}
        if pruned:
            for name, weight in net.named_parameters():
                n = weight.numel()
                size = torch.where(mask[name] > 0, weight.detach().abs(), -1).view(-1)
                chosen = size.argsort(descending=True, stable=True)[: n - int((1 - 0.2 ** (pruned / 2)) * n)]
                mask[name] = torch.zeros(n).index_fill(0, chosen, 1).view(weight.shape)
                weight.data.copy_(start[name] * mask[name])
        if pruned or number == 0:
            optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
        for images, labels, _ in data.train(number):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            for name, weight in net.named_parameters():
                assert weight.grad is not None
                weight.grad *= mask[name]
            optimizer.step()
    found = load_file(ticket_run.file.with_name("digits.masks.safetensors"))
    assert training.epochs == 2
    assert len(ticket_run.history) == recipe.epochs == 4
    assert all(torch.equal(found[name], chosen > 0) for name, chosen in mask.items())
    state = load_file(ticket_run.file)
    for name, weight in net.named_parameters():
        torch.testing.assert_close(state[name], weight.detach())
        assert not state[name][~found[name]].any()
    assert ticket_run.accuracy > 0.8
    assert [round(epoch.changed, 2) for epoch in ticket_run.history] == [0, 0, 0.55, 0.25]


def test_a_ticket_is_written_densely_with_its_masks(ticket_run: Any) -> None:
    kept = sum(n - int(0.8 * n) for n in (144, 2304, 16384, 4096, 640))
    assert (ticket_run.weights, ticket_run.kept) == (23_568, kept)
    assert {path.name for path in ticket_run.output.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "curve.png", "masks.png", "digits.masks.safetensors", "digits.safetensors",
    }  # fmt: skip
    assert equal_states(ticket_run.model, build_digits(ticket_run.file))
    again = train("digits", overrides=TICKET, output=ticket_run.output, resume=True)
    assert dataclasses.replace(again, model=ticket_run.model) == ticket_run


@pytest.mark.slow
@pytest.mark.parametrize("epoch", slow_except([1, 2, 3], [2]))
def test_a_ticket_that_was_stopped_ends_in_the_same_files(epoch: int, ticket_run: Any, tmp_path: Path) -> None:
    """Also one that was stopped after the first step that follows a pruning."""

    with pytest.raises(Stopped, match=rf"in epoch {epoch + 1}$"):
        train("digits", overrides=TICKET, output=tmp_path / "run", progress=stopping(after=45 * epoch + 1))
    result = train("digits", overrides=TICKET, output=tmp_path / "run", resume=True)
    for name in ("digits.safetensors", "digits.masks.safetensors"):
        assert (result.output / name).read_bytes() == (ticket_run.output / name).read_bytes()
    assert [e.changed for e in result.history] == [e.changed for e in ticket_run.history]


def test_what_is_pruned_does_not_come_back_even_before_a_weight_of_zero() -> None:
    recipe = Recipe.load("digits", [*TICKET, "lottery_ticket.rewind_epoch=0"])
    assert recipe.lottery_ticket is not None
    net = build_digits()
    parts = digits_data(recipe), recipe.training, start(recipe.training), quiet
    fit = TicketTrainer(net, *parts, recipe.lottery_ticket)
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
            weight.view(-1)[-weight.numel() // 2 :] = torch.linspace(1, 2, weight.numel() - weight.numel() // 2)
    fit._prune(0.5)
    first = {key: mask.clone() for key, mask in fit.masks().items()}
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    fit._prune(0.25)
    for key, mask in fit.masks().items():
        assert mask.sum() == mask.numel() // 4
        assert not (mask & ~first[key]).any()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["lottery_ticket.k=0.2"], r"lottery_ticket\.rounds is missing"),
        (["lottery_ticket.rounds=0"], r"lottery_ticket\.rounds is 0"),
        (["lottery_ticket.k=1.5"], r"lottery_ticket\.k is 1\.5"),
        (["lottery_ticket.k=0.2", "lottery_ticket.round=3"], r"lottery_ticket\.round is not a key.*rounds"),
        (
            [*TICKET, "surgery={k: 0.5, scaled: false}"],
            r"lottery_ticket trains a dense network; set surgery to none",
        ),
        ([*TICKET, "lottery_ticket.rewind_epoch=2"], r"lottery_ticket\.rewind_epoch is 2; expected less than .*, 2"),
    ],
)
def test_what_a_lottery_ticket_refuses(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load("digits", overrides)


def test_a_ticket_that_would_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"k=1e-17 keeps none of the 144 weights of features\.0\.weight"):
        train("digits", overrides=[*TICKET, "lottery_ticket.k=1e-17"], output=tmp_path / "run")


@pytest.mark.parametrize(("learner", "what"), [(EdgePopup, "the class EdgePopup"), (3, "3")])
def test_what_is_no_learner_is_not_registered(learner: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"the learner 'mine' is {what}; expected an instance of Learner"):
        register_learner("mine", learner)
    assert "mine" not in LEARNERS
