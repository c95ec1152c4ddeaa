"""One small network of every timm file and every torchvision family, with real passes forward and backward.

Each network is built, converted, trained by one backward pass, baked, saved and loaded in one of two worker processes,
and the tests of a network read what came out.
"""

import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import StochasticDepth

from networks import NETS, TIMM, TORCHVISION, allow_shrinking, input_shape
from popup_surgery import bake, build, convert, load, plan, save
from popup_surgery.models.libraries import architecture_of
from support import asked, slow_except

K = 0.5

# scores that no gradient can reach; in the plain network the weights are without one too, as it is built
ONE_CHANNEL = "behind a LayerNorm over one channel, which gives its bias alone, 0 at first"
UNREAD = "pools the queries of all tokens but the class token, which alone is read after the last block"
IN_CSATV2 = """
    stages.0.0.attn.attn.pos_embed.proj.weight_score
    stages.0.0.attn.attn.qkv.weight_score
    stages.0.0.attn.attn.mlp.fc1.weight_score
    stages.0.0.attn.attn.mlp.fc2.weight_score
    stages.0.1.attn.attn.pos_embed.proj.weight_score
    stages.0.1.attn.attn.qkv.weight_score
    stages.0.1.attn.attn.mlp.fc1.weight_score
    stages.0.1.attn.attn.mlp.fc2.weight_score
    stages.1.1.attn.attn.pos_embed.proj.weight_score
    stages.1.1.attn.attn.qkv.weight_score
    stages.1.1.attn.attn.mlp.fc1.weight_score
    stages.1.1.attn.attn.mlp.fc2.weight_score
    stages.1.2.attn.attn.pos_embed.proj.weight_score
    stages.1.2.attn.attn.qkv.weight_score
    stages.1.2.attn.attn.mlp.fc1.weight_score
    stages.1.2.attn.attn.mlp.fc2.weight_score
    stages.2.1.attn.attn.pos_embed.proj.weight_score
    stages.2.1.attn.attn.qkv.weight_score
    stages.2.1.attn.attn.mlp.fc1.weight_score
    stages.2.1.attn.attn.mlp.fc2.weight_score
    stages.2.2.attn.attn.pos_embed.proj.weight_score
    stages.2.2.attn.attn.qkv.weight_score
    stages.2.2.attn.attn.mlp.fc1.weight_score
    stages.2.2.attn.attn.mlp.fc2.weight_score
    stages.2.3.attn.attn.pos_embed.proj.weight_score
    stages.2.3.attn.attn.qkv.weight_score
    stages.2.3.attn.attn.mlp.fc1.weight_score
    stages.2.3.attn.attn.mlp.fc2.weight_score
    stages.2.4.attn.attn.pos_embed.proj.weight_score
    stages.2.4.attn.attn.qkv.weight_score
    stages.2.4.attn.attn.mlp.fc1.weight_score
    stages.2.4.attn.attn.mlp.fc2.weight_score
    stages.2.5.attn.attn.pos_embed.proj.weight_score
    stages.2.5.attn.attn.qkv.weight_score
    stages.2.5.attn.attn.mlp.fc1.weight_score
    stages.2.5.attn.attn.mlp.fc2.weight_score
    stages.2.6.attn.attn.pos_embed.proj.weight_score
    stages.2.6.attn.attn.qkv.weight_score
    stages.2.6.attn.attn.mlp.fc1.weight_score
    stages.2.6.attn.attn.mlp.fc2.weight_score
    stages.3.1.attn.attn.pos_embed.proj.weight_score
    stages.3.1.attn.attn.qkv.weight_score
    stages.3.1.attn.attn.mlp.fc1.weight_score
    stages.3.1.attn.attn.mlp.fc2.weight_score
    stages.3.2.attn.attn.pos_embed.proj.weight_score
    stages.3.2.attn.attn.qkv.weight_score
    stages.3.2.attn.attn.mlp.fc1.weight_score
    stages.3.2.attn.attn.mlp.fc2.weight_score
    stages.3.3.attn.attn.pos_embed.proj.weight_score
    stages.3.3.attn.attn.qkv.weight_score
    stages.3.3.attn.attn.mlp.fc1.weight_score
    stages.3.3.attn.attn.mlp.fc2.weight_score
    stages.3.4.attn.attn.pos_embed.proj.weight_score
    stages.3.4.attn.attn.qkv.weight_score
    stages.3.4.attn.attn.mlp.fc1.weight_score
    stages.3.4.attn.attn.mlp.fc2.weight_score
"""
DEAD = {("timm/csatv2", key): ONE_CHANNEL for key in IN_CSATV2.split()}
DEAD["torchvision/mvit_v2_s", "blocks.15.attn.pool_q.pool.weight_score"] = UNREAD

# one of each kind that differs for a mask; the others are slow
QUICK = """
    timm/test_nfnet timm/test_resnet timm/test_vit timm/vit_tiny_r_s16_p8_224
    torchvision/lraspp_mobilenet_v3_large torchvision/quantized_shufflenet_v2_x0_5 torchvision/squeezenet1_1
"""
every_net = pytest.mark.parametrize("name", slow_except(NETS, QUICK.split()))


@dataclass
class Outcome:
    """What a network's passes gave.

    Attributes:
        dead: scores without a gradient, or with one that is all 0 or not finite.
        error: the largest relative error of the converted network's outputs.
        differ: two inputs give two outputs.
        found: what is wrong, by check.
    """

    dead: list[str] = field(default_factory=list)
    error: float = 0.0
    differ: bool = False
    found: dict[str, list[str]] = field(default_factory=dict)


# in a worker process ---------------------------------------------------------------------------------------------


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    allow_shrinking()


def _still(model: nn.Module, name: str) -> nn.Module:
    """`model` without its dropout; a detector leaves images at their size, and its boxes stay near their anchors."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, GeneralizedRCNNTransform) and module.fixed_size is None:
            module.min_size, module.max_size = (input_shape(name)[-1],), input_shape(name)[-1]
        elif isinstance(module, RegionProposalNetwork | RoIHeads):
            module.box_coder.weights = (1e4,) * 4
            if isinstance(module, RoIHeads):
                module.score_thresh, module.detections_per_img, module.fg_bg_sampler.batch_size_per_image = 0.0, 8, 16
    return model


def _is_detector(model: nn.Module) -> bool:
    return isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform)


def _pass(model: nn.Module, name: str, seed: int) -> list[Tensor]:
    """All outputs for the inputs of that seed; a detector's in training are its losses."""
    generator, shape = torch.Generator().manual_seed(seed), input_shape(name)
    count = 1 if len(shape) == 4 and shape[-1] > 64 else 3 if shape[-1] < 200 else 2
    x = torch.randn(count, *shape, generator=generator)
    torch.manual_seed(0)  # detectors choose at random what they learn from
    if "raft" in name:
        return _tensors(model(x.tanh(), x.flip(0).tanh()))
    if not _is_detector(model):
        return _tensors(model(x))
    sides = torch.tensor([0.07, 0.15, 0.2, 0.33, 0.5, 0.67, 0.8, 0.95])[:, None]  # one at least for each anchor's size
    boxes = torch.cat([(1 - sides) / 3, (1 - sides) / 2, (1 + 2 * sides) / 3, (1 + sides) / 2], 1)
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 0.7, 0.7]])]) * shape[-1]
    masks = torch.zeros(len(boxes), *shape[1:], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int(), strict=True):
        mask[top:bottom, left:right] = 1
    points = torch.cat([boxes.view(-1, 2, 2).mean(1), torch.ones(len(boxes), 1)], 1)[:, None].expand(-1, 17, -1)
    target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks, "keypoints": points}
    return _tensors(model(list(x.sigmoid()), [target] * count if model.training else None))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of floats within `value`."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _dead(model: nn.Module, name: str) -> list[str]:
    """The scores that one pass backward from all outputs gives no gradient."""
    outputs = _pass(model.train(), name, 1)
    generator = torch.Generator().manual_seed(2)
    torch.stack([(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]).sum().backward()
    learning = {key: tensor.grad for key, tensor in model.named_parameters() if tensor.requires_grad}
    model.zero_grad()
    return [key for key, grad in learning.items() if grad is None or not grad.isfinite().all() or not grad.any()]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel()]
    if not pairs or not all(tensor.isfinite().all() for pair in pairs for tensor in pair):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _transient(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no `state_dict` holds."""
    state = model.state_dict()
    return {key: tensor.clone() for key, tensor in model.named_buffers() if key not in state}


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    missing = [f"{key} on one side alone" for key in found.keys() ^ expected.keys()]
    return missing + [key for key in found if key in expected and not torch.equal(found[key], expected[key])]


def _run(name: str) -> Outcome:
    kwargs = NETS[name]
    torch.manual_seed(0)
    model = build(name, **kwargs)
    buffers = _transient(model)
    left = {other.key for other in plan(model, K).rest if other.treatment.action == "left"}
    convert(model, K)
    outcome = Outcome(found={"by name": _by_name(name, model, buffers, left)})
    _still(model, name)
    outcome.dead = _dead(model, name)
    with torch.no_grad():
        found, other = (_pass(model.eval(), name, seed) for seed in (1, 2))
        plain = bake(model).eval()  # after a pass without a graph: RAFT holds tensors of its last one, graph included
        expected = _pass(plain, name, 1)
    outcome.error = _error(found, expected)
    outcome.differ = not _equal(found, other)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net"
        named = save(model, file).architecture.library != "custom"
        del model
        outcome.found["name"] = [] if named or _is_detector(plain) else ["saved as custom"]
        loaded = _still(load(file, None if named else build(name, **kwargs)), name)  # `_still` changes detectors
    outcome.found["state"] = _differences(loaded.state_dict(), plain.state_dict())
    outcome.found["buffers"] = _differences(_transient(loaded), buffers)
    with torch.no_grad():
        again = _pass(loaded, name, 1)
    outcome.found["output"] = [] if _equal(again, expected) else [f"relative error {_error(again, expected)}"]
    return outcome


def _by_name(name: str, model: nn.Module, buffers: dict[str, Tensor], left: set[str]) -> list[str]:
    """Where the network that `convert` builds by name is another than `model`, which was built first.

    What conversion leaves as the network's own initialisation has made it must depend on convert's seed alone.
    """
    named = _named(name, 1)
    state, trained = named.state_dict(), [key for key, p in named.named_parameters() if p.requires_grad]
    found = _differences(state, model.state_dict())
    if left.intersection(found):
        again = _named(name, 2).state_dict()
        found = [key for key in found if key not in left or not torch.equal(state[key], again[key])]
    found += _differences(_transient(named), buffers)
    found += [f"{key} is NaN" for key, tensor in state.items() if tensor.isnan().any()]
    return found + (["trained"] if trained != [key for key, p in model.named_parameters() if p.requires_grad] else [])


def _named(name: str, seed: int) -> nn.Module:
    """The network converted by name, where memory that is reserved and not filled is NaN; `seed` is torch's own."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    try:
        return convert(architecture_of(name, **NETS[name]), K)
    finally:
        torch.use_deterministic_algorithms(False)


# tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """What comes out for each network that is asked for, from two processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=_start) as pool:
        yield {name: pool.submit(_run, name) for name in asked(request, "outcomes", "name")}
        pool.shutdown(cancel_futures=True)


@every_net
def test_the_output_is_that_of_the_plain_network(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    assert outcomes[name].result().error <= 1e-5


@every_net
def test_every_score_tensor_learns(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    expected = [key for net, key in DEAD if net == name]
    assert sorted(outcomes[name].result().dead) == sorted(expected)  # an exception that is none any more fails too


@every_net
def test_two_inputs_give_two_outputs(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    assert outcomes[name].result().differ


@every_net
@pytest.mark.parametrize("what", ["name", "state", "buffers", "output"])
def test_a_file_gives_the_plain_network(name: str, what: str, outcomes: dict[str, Future[Outcome]]) -> None:
    assert not outcomes[name].result().found[what]


@every_net
def test_built_by_name_it_is_the_same_network(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    assert not outcomes[name].result().found["by name"]


def test_exceptions_are_of_networks_that_are_tested() -> None:
    assert {net for net, _ in DEAD} <= NETS.keys()


def test_every_timm_file_is_covered() -> None:
    covered = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in TIMM}
    assert sorted(covered) == sorted(timm.list_modules())


def test_every_torchvision_family_is_covered() -> None:
    def family(name: str) -> str:
        return torchvision.models.get_model_builder(name).__module__

    assert {family(name) for name in TORCHVISION} == {family(name) for name in torchvision.models.list_models()}
