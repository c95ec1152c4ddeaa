"""The tools around a network go on working on a converted one: timm, torchvision, torch, ONNX and transformers."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import ClassifierHead, ConvNormAct, ScaledStdConv2d
from timm.models import FeatureGraphNet, load_checkpoint, load_state_dict, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models.feature_extraction import create_feature_extractor

from popup_surgery import MaskedWeightError, Tracer, bake, convert, load, masks, save, verify
from popup_surgery.masking.layer import is_masked
from popup_surgery.selection import kept_count
from support import Scope, slow_except, top

K = 0.4
NETS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=32),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    "nfnet": lambda: timm.create_model("test_nfnet", num_classes=5),  # reads its weights outside torch.nn
}
resnet, vit = NETS["resnet"], NETS["vit"]
every_net = pytest.mark.parametrize("net", NETS)
every_scope = pytest.mark.parametrize("scope", ["layer", "global"])


def images(seed: int = 1, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def hidden(make: Callable[[], nn.Module], seed: int = 5, **how: Any) -> nn.Module:
    """A converted network whose scores have moved, as training would move them."""
    model, generator = convert(make(), K, **how), torch.Generator().manual_seed(seed)
    for score in scores(model).values():
        score.data.copy_(torch.randn(score.shape, generator=generator) / 10)
    return model


def scores(model: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    optimizer.zero_grad()
    model(images(seed)).square().sum().backward()
    optimizer.step()


def best(score: Tensor) -> Tensor:
    """The right mask of a layer."""
    return top([score], kept_count(score.numel(), K))[0]


def right_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_score"): best(score) for name, score in scores(model).items()}


def twin(model: nn.Module, make: Callable[[], nn.Module]) -> Any:
    """The plain network that the scores of `model` call for, made without the code under test."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in [key for key in state if f"{key}_score" in state]:
        state[key] = torch.where(best(state.pop(f"{key}_score")), state[key], 0.0)
    plain = make()
    plain.load_state_dict(state)
    return plain.train(model.training)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same entries in the same order, equal to the bit."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def gradients(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient of each score."""
    model.zero_grad()
    model(images() if x is None else x).float().square().sum().backward()
    return {name: score.grad.clone() for name, score in scores(model).items()}


def through(plain: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The scores' gradients that the weights' gradients of the plain twin give, straight through."""
    found = {}
    for name, score in scores(model).items():
        layer, _, weight = name.removesuffix("_score").rpartition(".")
        raw: Any = model.get_submodule(layer)._parameters[weight]
        given: Any = plain.get_parameter(name.removesuffix("_score")).grad
        found[name] = given.float() * raw * score.detach().sign()
    return found


# timm: averages, checkpoints, optimisers -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("foreach", [True, False])
def test_timm_ema_follows_the_scores_and_ranks_its_own(foreach: bool, tmp_path: Path) -> None:
    model = hidden(resnet)
    optimizer = torch.optim.SGD(scores(model).values(), lr=1e-3)
    ema = ModelEmaV3(model, decay=0.7, foreach=foreach)
    expected = {name: score.detach().clone() for name, score in scores(model).items()}
    for seed in range(3):
        step(model, optimizer, seed)
        ema.update(model)
        ema(images())  # evaluated in between, as in training
        expected = {name: old.lerp(scores(model)[name].detach(), 0.3) for name, old in expected.items()}
    assert not ema.module.training
    torch.testing.assert_close({name: score.detach() for name, score in scores(ema.module).items()}, expected)
    assert_same(masks(ema.module), right_masks(ema.module))
    assert differ(masks(ema.module), masks(model))
    with torch.no_grad():
        assert torch.equal(ema(images()), twin(ema.module, resnet)(images()))
    save(ema.module, tmp_path / "ema")  # which compares the weights with the seed's
    assert_same(load(tmp_path / "ema", resnet()).state_dict(), twin(ema.module, resnet).state_dict())


def saver(folder: Path, model: nn.Module, **more: Any) -> tuple[Path, torch.optim.Optimizer]:
    optimizer = create_optimizer_v2(model, "adamw", lr=0.01)
    step(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), **more).save_checkpoint(3, metric=0.5)
    return folder / "last.pth.tar", optimizer


def test_a_masked_models_own_timm_checkpoint_comes_back(tmp_path: Path) -> None:
    model = hidden(resnet)
    path, optimizer = saver(tmp_path, model)
    other = convert(resnet(), K, seed=7)
    load_checkpoint(other, str(path))
    assert_same(other.state_dict(), model.state_dict())
    assert_same(masks(other), right_masks(model))
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    other = convert(resnet(), K, seed=8)
    resumed = create_optimizer_v2(other, "adamw", lr=0.01)
    assert resume_checkpoint(other, str(path), resumed, log_info=False) == 4  # the next epoch
    for stepping, network in ((optimizer, model), (resumed, other)):
        step(network.train(), stepping, 2)
    assert_same(other.state_dict(), model.state_dict())


def test_a_timm_checkpoint_has_the_averaged_scores_too(tmp_path: Path) -> None:
    model = hidden(resnet)
    ema = ModelEmaV3(hidden(resnet, seed=6))
    path, _ = saver(tmp_path, model, model_ema=ema)
    for use_ema, expected in ((True, ema.module), (False, model)):
        other = convert(resnet(), K, seed=7)
        load_checkpoint(other, str(path), use_ema=use_ema)
        assert_same(other.state_dict(), expected.state_dict())


def test_a_plain_timm_checkpoint_replaces_the_weights_and_keeps_the_scores(tmp_path: Path) -> None:
    plain, model = resnet(), hidden(resnet)
    path, _ = saver(tmp_path, plain)
    before = {name: score.detach().clone() for name, score in scores(model).items()}
    load_checkpoint(model, str(path))
    assert_same(scores(model), before)
    state = model.state_dict()
    assert_same({name: tensor for name, tensor in state.items() if name not in before}, plain.state_dict())
    assert torch.equal(model.eval()(images()), twin(model, resnet)(images()))


def test_a_baked_timm_checkpoint_goes_into_a_plain_network(tmp_path: Path) -> None:
    model = hidden(resnet)
    baked = bake(model)
    CheckpointSaver(baked, torch.optim.SGD(baked.parameters()), checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    expected = twin(model, resnet).eval()
    plain = resnet().eval()
    load_checkpoint(plain, str(tmp_path / "last.pth.tar"))
    assert_same(plain.state_dict(), expected.state_dict())
    assert_same(load_state_dict(str(tmp_path / "last.pth.tar")), expected.state_dict())
    assert torch.equal(plain(images()), expected(images()))


def ids(groups: list[dict]) -> list[int]:
    return [id(parameter) for group in groups for parameter in group["params"]]


@every_net
def test_timm_parameter_groups_hold_each_score_once_and_nothing_else(net: str) -> None:
    model = convert(NETS[net](), K)
    expected = sorted(map(id, scores(model).values()))
    groups = param_groups_weight_decay(model, 0.05)
    assert sorted(ids(groups)) == expected
    assert [group["weight_decay"] for group in groups] == [0.05]  # no score has one dimension
    assert sorted(ids(param_groups_layer_decay(model, 0.05, layer_decay=0.7))) == expected
    assert sorted(ids(create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups)) == expected


def scales(model: nn.Module, suffix: str) -> dict[str, float]:
    """Learning rate scale of each weight or of its score, by the weight's name."""
    names = {id(parameter): name.removesuffix(suffix) for name, parameter in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.7).param_groups
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


@every_net
def test_timm_layer_decay_scales_a_score_as_the_weight_of_the_plain_network(net: str) -> None:
    model = convert(NETS[net](), K)
    found, plain = scales(model, "_score"), scales(NETS[net](), "")
    assert found == {name: plain[name] for name in masks(model)}
    ordered = [found[name] for name in masks(model)]
    assert ordered == sorted(ordered)  # the first layers learn most slowly
    assert len(set(ordered)) > 2
    assert ordered[-1] == 1.0


@pytest.mark.parametrize("name", ["lamb", "lion", "adopt", "nadamw", "lookahead_adamw", "muon"])
def test_after_a_step_of_timms_own_optimisers_the_masks_are_right(name: str) -> None:
    model = hidden(vit)
    optimizer, before = create_optimizer_v2(model, name, lr=0.05, weight_decay=0.05), masks(model)
    for seed in range(2):
        step(model, optimizer, seed)
        assert_same(masks(model), right_masks(model))
    assert differ(masks(model), before)
    assert torch.equal(model(images()), twin(model, vit)(images()))


# features --------------------------------------------------------------------------------------------------------


NODES = {"resnet": ["layer2", "fc"], "convnext": ["stages.1", "head"], "nfnet": ["stages.1", "head"]}


@every_scope
@pytest.mark.parametrize("net", slow_except(NODES, ["nfnet"]))
def test_torchvisions_feature_extractor_meets_the_masks(net: str, scope: Scope) -> None:
    """Layers outside torch.nn must be named as leaves, for a tracer would freeze their masks otherwise."""
    leaves = {"tracer_kwargs": {"leaf_modules": [ScaledStdConv2d]}} if net == "nfnet" else {}
    model = convert(NETS[net](), K, scope=scope).eval()
    extract = create_feature_extractor(model, NODES[net], **leaves)
    for seed in range(2):
        for score in scores(model).values():
            score.data.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(seed)))
        found = extract(images())
        assert_same(found, create_feature_extractor(bake(model), NODES[net])(images()))
        assert torch.equal(found[NODES[net][1]], model(images()))
    if scope == "layer":
        assert torch.equal(found[NODES[net][1]], twin(model, NETS[net])(images()))


def test_our_tracer_splits_a_network_into_features() -> None:
    model = hidden(NETS["nfnet"]).eval()
    graph = Tracer().trace(model)
    graph.output_node().args = ([node for node in graph.nodes if node.target in ("stem.conv4", "head.fc")],)
    found = torch.fx.GraphModule(model, graph)(images())
    expected = create_feature_extractor(twin(model, NETS["nfnet"]), ["stem.conv4", "head.fc"])(images())
    assert_same(dict(zip(expected, found, strict=True)), expected)


def test_timms_feature_graph_meets_the_masks() -> None:
    model = hidden(resnet).eval()
    found = FeatureGraphNet(model, (1, 2))(images())
    expected = FeatureGraphNet(twin(model, resnet), (1, 2))(images())
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_net
def test_forward_intermediates_meets_the_masks(net: str) -> None:
    model: Any = hidden(NETS[net]).eval()
    last, found = model.forward_intermediates(images())
    expected_last, expected = twin(model, NETS[net]).forward_intermediates(images())
    assert torch.equal(last, expected_last)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


FEATURES = [
    ("test_resnet", {"feature_cls": "list"}, "FeatureListNet"),
    ("test_resnet", {"feature_cls": "hook"}, "FeatureHookNet"),
    ("test_resnet", {"feature_cls": "fx"}, "FeatureGraphNet"),
    ("test_nfnet", {"feature_cls": "fx"}, "FeatureGraphNet"),
    ("test_vit", {"img_size": 32}, "FeatureGetterNet"),
]


@every_scope
@pytest.mark.parametrize(("name", "kwargs", "kind"), FEATURES, ids=[f"{name} {kind}" for name, _, kind in FEATURES])
def test_networks_of_features_only_meet_the_masks(
    name: str, kwargs: dict[str, Any], kind: str, scope: Scope, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return timm.create_model(name, features_only=True, out_indices=(0, 1), **kwargs)

    model = hidden(make, scope=scope).eval()
    assert type(model).__name__ == kind
    found, raw = model(images()), bake(model).eval()
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, bake(model).eval()(images()), strict=True))
    if scope == "layer":
        assert all(torch.equal(a, b) for a, b in zip(found, twin(model, make)(images()), strict=True))
    raw.load_state_dict({name: value for name, value in model.state_dict().items() if name not in scores(model)})
    assert not torch.allclose(found[1], raw(images())[1]), "the masks make no difference"
    save(model, tmp_path / "net")
    assert_same(load(tmp_path / "net", make()).state_dict(), bake(model).state_dict())


# memory and precision --------------------------------------------------------------------------------------------


def count_forwards(model: nn.Module) -> list[nn.Module]:
    """The masked layers that have computed since, one entry for each time."""
    calls: list[nn.Module] = []
    for module in model.modules():
        if is_masked(module):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


@every_scope
@every_net
def test_gradient_checkpointing_gives_the_same_gradients(net: str, scope: Scope) -> None:
    model: Any = hidden(NETS[net], scope=scope).train()
    expected, calls = gradients(model), count_forwards(model)
    model.set_grad_checkpointing()
    assert_same(gradients(model), expected)
    assert len(calls) > len(set(calls))  # some layers have computed twice
    assert_same(gradients(model), expected)
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("net", ["resnet", "convnext"])
def test_channels_last_networks_compute_and_learn_the_same(net: str) -> None:
    model = hidden(NETS[net]).eval()
    expected, before = gradients(model), model(images()).detach()
    model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients(model, x), expected, atol=1e-3, rtol=1e-3)
    optimizer = torch.optim.AdamW(scores(model).values(), lr=0.01)
    chosen = masks(model)
    step(model, optimizer)
    assert_same(masks(model), right_masks(model))
    assert differ(masks(model), chosen)


@every_net
def test_bfloat16_networks_train_float32_scores(net: str) -> None:
    model = hidden(NETS[net]).to(torch.bfloat16)
    before, chosen = {name: score.detach().clone() for name, score in scores(model).items()}, masks(model)
    assert_same(chosen, right_masks(model))
    optimizer = torch.optim.SGD(scores(model).values(), lr=1e-6)  # steps far below what bfloat16 resolves
    plain = twin(model, lambda: NETS[net]().to(torch.bfloat16))
    x = images().to(torch.bfloat16)
    assert torch.equal(model(x), plain(x))
    found = gradients(model, x)
    plain(x).float().square().sum().backward()
    torch.testing.assert_close(found, through(plain, model), atol=0, rtol=1e-5)
    optimizer.step()
    for name, score in scores(model).items():
        assert score.dtype == score.grad.dtype == torch.float32, name
        torch.testing.assert_close(score.detach(), before[name] - 1e-6 * found[name], atol=0, rtol=1e-6)
        assert not torch.equal(score, score.bfloat16().float()), name
    assert_same(masks(model), right_masks(model))


@every_net
def test_autocast_computes_and_learns_as_the_plain_network(net: str) -> None:
    model = hidden(NETS[net])
    plain = twin(model, NETS[net])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(images()), plain(images())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    found = {name: score.grad for name, score in scores(model).items()}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    torch.testing.assert_close(found, through(plain, model))


# torch: what wraps, averages, distributes ------------------------------------------------------------------------


@every_scope
def test_batch_norms_become_synchronised_ones(scope: Scope) -> None:
    model = hidden(resnet, scope=scope)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) == 15
    assert_same(synced.state_dict(), model.state_dict())
    expected = gradients(model)
    torch.testing.assert_close(gradients(synced), expected)
    assert torch.equal(synced.eval()(images()), model.eval()(images()))
    other = convert(nn.SyncBatchNorm.convert_sync_batchnorm(resnet()), K, scope=scope)
    assert_same(other.state_dict(), convert(resnet(), K, scope=scope).state_dict())


def test_timms_own_batch_norms_become_synchronised_ones() -> None:
    def make() -> nn.Module:
        return timm.create_model("test_efficientnet", num_classes=5)

    model = hidden(make)
    synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) > 5
    assert_same(masks(synced), right_masks(model))
    torch.testing.assert_close(gradients(synced), gradients(model))


def test_averaged_model_and_its_batch_norms(tmp_path: Path) -> None:
    model = hidden(resnet)
    averaged: Any = AveragedModel(model)
    optimizer = torch.optim.SGD(scores(model).values(), lr=1e-3)
    seen = []
    for seed in range(3):
        step(model, optimizer, seed)
        averaged.update_parameters(model)
        masks(averaged.module)  # a mask that was read must not stay
        seen.append({name: score.detach().clone() for name, score in scores(model).items()})
    means = {name: torch.stack([each[name] for each in seen]).mean(0) for name in seen[0]}
    torch.testing.assert_close({n: score.detach() for n, score in scores(averaged.module).items()}, means)
    assert_same(masks(averaged.module), right_masks(averaged.module))
    assert differ(masks(averaged.module), masks(model))
    plain = twin(averaged.module, resnet)
    batches = [images(seed, 4) for seed in range(3)]
    update_bn(batches, averaged)
    update_bn(batches, plain)
    assert int(averaged.module.bn1.num_batches_tracked) == 3
    assert_same(dict(averaged.module.named_buffers()), dict(plain.named_buffers()))
    with torch.no_grad():
        assert torch.equal(averaged.eval()(images()), plain.eval()(images()))
    save(averaged.module, tmp_path / "averaged")
    assert_same(load(tmp_path / "averaged", resnet()).state_dict(), plain.state_dict())


@every_net
def test_functional_call_with_a_whole_state_dict(net: str) -> None:
    model, other = hidden(NETS[net]).eval(), hidden(NETS[net], seed=6).eval()
    before = model(images())
    found = torch.func.functional_call(model, dict(other.state_dict()), (images(),))
    assert torch.equal(found, twin(other, NETS[net])(images()))
    assert torch.equal(model(images()), before)


def _train_in_a_process(rank: int, folder: Path) -> None:
    """Two ways to a distributed hidden network; leaves gradients after one step, then scores and masks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    for order in ("convert, wrap", "wrap, convert"):
        core = resnet()
        if order == "convert, wrap":
            model: nn.Module = DistributedDataParallel(convert(core, K))
        else:
            model = convert(DistributedDataParallel(core), K)
        optimizer = torch.optim.SGD(scores(model).values(), lr=0.01)
        step(model, optimizer, seed=rank)
        first = {name: score.grad.clone() for name, score in scores(core).items()}
        step(model, optimizer, seed=rank + 2)
        found[order] = first, {n: s.detach() for n, s in scores(core).items()}, masks(model), right_masks(core)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(_train_in_a_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["convert, wrap", "wrap, convert"])
def test_two_processes_learn_one_mask(order: str, distributed: list[dict]) -> None:
    """Each averages the gradients over both, whichever of DistributedDataParallel and `convert` came first."""
    (first, learnt, chosen, right), (other_first, other_learnt, other_chosen, _) = (each[order] for each in distributed)
    local = [gradients(convert(resnet(), K), images(rank)) for rank in range(2)]
    mean = {name: (local[0][name] + local[1][name]) / 2 for name in local[0]}
    assert not torch.allclose(local[0]["fc.weight_score"], local[1]["fc.weight_score"])
    torch.testing.assert_close(first, mean, atol=1e-5, rtol=1e-3)
    assert_same(first, other_first)
    assert_same(learnt, other_learnt)
    assert_same(chosen, other_chosen)
    assert_same(chosen, right)
    assert differ(chosen, masks(convert(resnet(), K)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Any] = {
    "compile": compiled,
    "DDP": DistributedDataParallel,
    "compile in DDP": lambda model: DistributedDataParallel(compiled(model)),
    "DDP in compile": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrapper", slow_except(WRAPPERS, ["DDP"]))
def test_a_wrapped_network_is_converted_as_the_one_inside(
    wrapper: str, process_group: None, dynamo: None, tmp_path: Path
) -> None:
    expected, core = convert(resnet(), K).eval(), resnet().eval()
    save(expected, tmp_path / "plain")
    wrapped = WRAPPERS[wrapper](core)
    assert not torch.allclose(wrapped(images()), expected(images()))  # a graph made now must not outlive conversion
    assert convert(wrapped, K) is wrapped
    assert_same(core.state_dict(), expected.state_dict())
    assert_same(masks(wrapped), masks(expected))
    torch.testing.assert_close(wrapped(images()), expected(images()))
    manifest = save(wrapped, tmp_path / "wrapped")
    assert all(entry.stream == entry.name for entry in manifest.masked)
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()
    save(WRAPPERS[wrapper](convert(resnet(), K)), tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()
    filled = resnet()
    load(tmp_path / "wrapped", WRAPPERS[wrapper](filled))
    assert_same(filled.state_dict(), bake(expected).state_dict())


class Detector(nn.Module):
    """A backbone that is converted alone, under a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2,))
        self.head = nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0])


@every_scope
def test_a_part_that_is_converted_alone_is_saved_with_the_whole_and_without(scope: Scope, tmp_path: Path) -> None:
    model = Detector().eval()
    hidden(lambda: model.backbone, scope=scope)
    assert not any(is_masked(module) for module in model.head.modules())
    whole, part = save(model, tmp_path / "whole"), save(model.backbone, tmp_path / "part")
    streams = list(masks(model.backbone))
    assert [entry.stream for entry in whole.masked] == [entry.stream for entry in part.masked] == streams
    assert [entry.name for entry in whole.masked] == [f"backbone.{name}" for name in streams]
    assert [entry.name for entry in part.masked] == streams
    filled = load(tmp_path / "whole", Detector())
    assert_same(filled.state_dict(), bake(model).state_dict())
    assert torch.equal(filled(images()), model(images()))
    assert verify(tmp_path / "whole", Detector())
    filled = load(tmp_path / "part", Detector().backbone)
    assert_same(filled.state_dict(), bake(model.backbone).state_dict())
    if scope == "layer":
        assert_same(filled.state_dict(), twin(model.backbone, lambda: Detector().backbone).state_dict())


@every_scope
def test_a_part_of_a_converted_network_is_saved_under_the_wholes_streams(scope: Scope, tmp_path: Path) -> None:
    model: Any = hidden(Detector, scope=scope).eval()
    manifest = save(model.backbone, tmp_path / "part")
    assert [entry.stream for entry in manifest.masked] == [f"backbone.{entry.name}" for entry in manifest.masked]
    assert len(manifest.masked) == len(masks(model)) - 1
    filled = load(tmp_path / "part", Detector().backbone)
    whole: Any = bake(model).eval()
    assert_same(filled.state_dict(), whole.backbone.state_dict())
    assert torch.equal(filled(images())[0], whole.backbone(images())[0])
    assert verify(tmp_path / "part", Detector().backbone)


@pytest.mark.slow
def test_a_wrapper_around_a_part_is_a_part_of_its_streams(process_group: None, dynamo: None, tmp_path: Path) -> None:
    """Only the prefixes of a wrapped root are left out of stream names: the rest are `state_dict` keys."""
    for wrap, prefix in ((compiled, "backbone._orig_mod."), (DistributedDataParallel, "backbone.module.")):

        def make(wrap: Callable[[nn.Module], nn.Module] = wrap) -> nn.Module:
            model = Detector()
            model.backbone = wrap(model.backbone)
            return model.eval()

        model = hidden(make)
        manifest = save(model, tmp_path / "net")
        assert [entry.stream for entry in manifest.masked] == [entry.name for entry in manifest.masked]
        assert {entry.name.startswith(prefix) for entry in manifest.masked} == {True, False}
        assert_same(load(tmp_path / "net", make()).state_dict(), twin(model, make).state_dict())
        assert torch.equal(load(tmp_path / "net", make())(images()), model(images()))


# compilers and exporters -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor_computes_and_learns_the_same(dynamo: None) -> None:
    model = hidden(lambda: nn.Sequential(ConvNormAct(3, 8, 3), ClassifierHead(8, 5)))
    fast = torch.compile(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(fast(images()), model(images()), atol=1e-4, rtol=1e-4)
        expected = gradients(model)
        model.zero_grad()
        fast(images()).square().sum().backward()
        found = {name: score.grad for name, score in scores(model).items()}
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        chosen = masks(model)
        for score in scores(model).values():
            score.data.copy_(score.data.flip(0))
        assert differ(masks(model), chosen)  # a compiled graph holds no mask


@pytest.mark.parametrize(
    ("net", "scope"),
    [*(pytest.param(net, "layer", marks=[pytest.mark.slow] * (net != "vit")) for net in NETS), ("resnet", "global")],
)
def test_export_of_a_converted_network_ranks_when_it_runs(net: str, scope: Scope) -> None:
    model = hidden(NETS[net], scope=scope).eval()
    program = torch.export.export(model, (images(),)).module()
    assert torch.equal(program(images(2)), model(images(2)))
    other = hidden(NETS[net], seed=6, scope=scope).eval()
    assert not torch.equal(other(images()), model(images()))
    program.load_state_dict(other.state_dict())
    assert torch.equal(program(images()), other(images()))


@pytest.mark.parametrize("net", slow_except(NETS, ["resnet"]))
def test_export_of_a_baked_network(net: str, tmp_path: Path) -> None:
    model = hidden(NETS[net]).eval()
    torch.export.save(torch.export.export(bake(model), (images(),)), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    expected = twin(model, NETS[net]).state_dict()
    assert_same({name: program.state_dict[name] for name in expected}, expected)
    assert len(program.state_dict) == len(expected)
    assert torch.equal(program.module()(images(2)), model(images(2)))


@pytest.mark.slow
@pytest.mark.parametrize("net", slow_except(NETS, ["vit"]))
def test_onnx_of_a_baked_network(net: str, tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    import onnxruntime

    model = hidden(NETS[net]).eval()
    torch.onnx.export(bake(model), (images(),), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images(2)).detach(), atol=1e-4, rtol=1e-4)


# Hugging Face transformers ---------------------------------------------------------------------------------------


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"vocab_size": 23, "max_position_embeddings": 12, **TINY}
GPT2 = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 23, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {**TINY, "vocab_size": 23, "num_key_value_heads": 1, "tie_word_embeddings": True}
T5 = {"vocab_size": 23, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}

# by class: its configuration, and what is tied to the input embedding
LANGUAGE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "BertForSequenceClassification": ("BertConfig", BERT, []),
    "BertForMaskedLM": ("BertConfig", BERT, ["cls.predictions.decoder.weight"]),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2, []),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, ["lm_head.weight"]),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, ["lm_head.weight"]),
}
VIT = {"image_size": 32, "patch_size": 8, **TINY}
VISION: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ViTForImageClassification": ("ViTConfig", VIT, []),
    "BeitForImageClassification": ("BeitConfig", VIT, []),
    "Dinov2ForImageClassification": ("Dinov2Config", {**VIT, "layerscale_value": 1e-5}, []),
    "ConvNextForImageClassification": ("ConvNextConfig", CONVNEXT, []),
}
every_transformer = pytest.mark.parametrize("name", [*LANGUAGE, *VISION])


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, kwargs, _ = (LANGUAGE | VISION)[name]
    return getattr(transformers, name)(getattr(transformers, config)(**kwargs))


def logits(model: nn.Module, name: str) -> Tensor:
    """What the network says, with the same dropout at each call."""
    torch.manual_seed(0)
    words = torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(1))
    return (model(pixel_values=images()) if name in VISION else model(input_ids=words)).logits


@every_transformer
def test_every_linear_weight_of_a_transformer_is_masked_and_learns(name: str) -> None:
    fresh = transformer(name)
    kinds = {key: type(module).__name__ for key, module in fresh.named_modules()}
    linear = [key for key, kind in kinds.items() if kind in ("Linear", "Conv1D", "Conv2d")]
    model: Any = hidden(lambda: fresh).train()
    assert all(is_masked(model.get_submodule(key)) for key in linear)
    tied = (LANGUAGE | VISION)[name][2]
    embedding: Any = model.get_input_embeddings() if name in LANGUAGE else None
    assert is_masked(embedding) == bool(tied) if name in LANGUAGE else not tied
    assert len(scores(model)) == len(linear)  # a tied one is the embedding's

    plain = twin(model, lambda: transformer(name))
    found = logits(model, name)
    assert torch.equal(found, logits(plain, name))
    found.square().sum().backward()
    logits(plain, name).square().sum().backward()
    for score in scores(model).values():
        assert score.grad.isfinite().all()
        assert score.grad.any()
    torch.testing.assert_close({n: score.grad for n, score in scores(model).items()}, through(plain, model))


@every_transformer
def test_weights_of_a_transformer_have_the_spread_of_their_fan_in(name: str) -> None:
    model = convert(transformer(name), K)
    for key, module in model.named_modules():
        if type(module).__name__ in ("MaskedLinear", "MaskedConv1D", "MaskedConv2d"):
            raw = module._parameters["weight"]
            fan_in = raw.shape[0] if "Conv1D" in type(module).__name__ else raw[0].numel()  # Conv1D is (in, out)
            assert raw.abs().unique().tolist() == pytest.approx([math.sqrt(2 / fan_in / K)]), key
            assert module.weight_score.abs().max() <= 1 / math.sqrt(fan_in), key


@pytest.mark.parametrize(
    ("name", "scale", "count"),
    [
        ("BeitForImageClassification", "lambda_", 4),
        ("Dinov2ForImageClassification", "lambda1", 4),
        ("ConvNextForImageClassification", "layer_scale_parameter", 2),
    ],
)
def test_branches_of_a_transformer_that_start_near_zero_come_alive(name: str, scale: str, count: int) -> None:
    fresh = transformer(name)
    found = [key for key, parameter in fresh.named_parameters() if scale in key and parameter.abs().max() < 0.5]
    assert len(found) == count
    convert(fresh, K)
    assert all(torch.equal(fresh.get_parameter(key), torch.ones_like(fresh.get_parameter(key))) for key in found)


@every_scope
@every_transformer
def test_a_transformer_comes_back_from_its_file(name: str, scope: Scope, tmp_path: Path) -> None:
    model = hidden(lambda: transformer(name), scope=scope).eval()
    manifest = save(model, tmp_path / "net")
    assert (manifest.architecture.library, manifest.architecture.name) == ("custom", name)
    tied = (LANGUAGE | VISION)[name][2]
    assert [alias for alias in manifest.aliases if alias.endswith("weight")] == tied
    loaded: Any = load(tmp_path / "net", transformer(name))
    assert_same(loaded.state_dict(), bake(model).state_dict())
    assert torch.equal(logits(loaded, name), logits(model, name))
    for alias in tied:
        assert loaded.get_parameter(alias) is loaded.get_input_embeddings().weight
    assert verify(tmp_path / "net", transformer(name))
    if scope == "layer":
        assert_same(loaded.state_dict(), twin(model, lambda: transformer(name)).state_dict())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "GPT2LMHeadModel"])
def test_a_baked_transformer_is_saved_and_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    model = hidden(lambda: transformer(name)).eval()
    baked: Any = bake(model)
    baked.save_pretrained(tmp_path)
    loaded = type(baked).from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), baked.state_dict())
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel", "ViTForImageClassification"])
def test_gradient_checkpointing_of_a_transformer(name: str) -> None:
    model: Any = hidden(lambda: transformer(name)).train()
    logits(model, name).square().sum().backward()
    expected, calls = {key: score.grad.clone() for key, score in scores(model).items()}, count_forwards(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    logits(model, name).square().sum().backward()
    assert len(calls) > len(set(calls))
    assert_same({key: score.grad for key, score in scores(model).items()}, expected)


@pytest.mark.parametrize("part", ["vit", "classifier"])
def test_a_part_of_a_transformer_is_converted_alone(part: str, tmp_path: Path) -> None:
    name = "ViTForImageClassification"
    model: Any = transformer(name).eval()
    hidden(lambda: model.get_submodule(part))
    manifest = save(model, tmp_path / "net")
    assert [entry.name for entry in manifest.masked] == [f"{part}.{entry.stream}" for entry in manifest.masked]
    assert {is_masked(model.classifier), is_masked(model.vit.layers[0].mlp.fc1)} == {True, False}
    loaded = load(tmp_path / "net", transformer(name))
    assert_same(loaded.state_dict(), bake(model).state_dict())
    assert torch.equal(logits(loaded, name), logits(model, name))


# ensembles


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_ensemble_by_vmap_ranks_each_members_scores(scope: Scope) -> None:
    members = [
        convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0.5, seed=seed, scope=scope)
        for seed in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(5, 6)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    outputs = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([member(x) for member in members]))


@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.trace:FutureWarning")
def test_a_trace_that_would_freeze_the_mask_is_refused() -> None:
    with pytest.raises(MaskedWeightError, match=r"read by torch\.jit\.trace, which would freeze its mask; trace bake"):
        torch.jit.trace(convert(nn.Linear(3, 2)), torch.ones(1, 3))
