"""The masked weights of all layers, made together as on a GPU. Triton's interpreter runs the kernels, on the CPU."""

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from masking.layers import Block, K, images, layers_of, raw, reverse, right, right_globally, sequential
from popup_surgery import MaskedWeightError, bake, convert, masks
from popup_surgery.learners import LEARNERS, EdgePopup
from popup_surgery.masking import forwards, together
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import segments
from popup_surgery.selection.shards import whole
from support import Scope, by_kernels, slow_except

every_scope = pytest.mark.parametrize("scope", ["layer", "global"])

Step = tuple[Tensor, list[Tensor]]


@contextmanager
def alone() -> Iterator[None]:
    """Each layer makes its own weight, as on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "DEVICES", set())
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are started."""
    from triton.runtime.interpreter import GridExecutor

    found: list[str] = []
    real = GridExecutor.__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter copies tensors
            real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", spy)
        yield found


PASS = ["count"] * 4 + ["count_ties", "write"]


def deep(depth: int = 1) -> Any:
    inner = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *inner, nn.Flatten(), nn.Linear(64, 5))


def converted(net: nn.Module, **settings: Any) -> Any:
    """A network whose weights are the same in bfloat16, to which Triton's interpreter rounds in its own way."""
    net = convert(net, settings.pop("k", K), **settings)
    for layer in layers_of(net):
        raw(layer).data.copy_(raw(layer).bfloat16())
    return net


def step(net: nn.Module, x: Tensor | None = None, call: Callable[..., Tensor] | None = None) -> Step:
    """The output of a network, and the gradients that a backward gives its scores."""
    net.zero_grad()
    out = (call or net)(images() if x is None else x)
    out.float().square().sum().backward()
    return out.detach(), [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def same(one: Step, other: Step) -> bool:
    return (
        torch.equal(one[0], other[0])
        and len(one[1]) == len(other[1])
        and all(map(torch.equal, one[1], other[1]))
        and any(gradient.any() for gradient in one[1])
    )


def check(net: nn.Module, call: Callable[..., Tensor] | None = None, made: bool = True) -> None:
    """A step made together is that of layers by themselves, to the bit."""
    with alone():
        expected = step(net, call=call)
    with launches() as found:
        assert same(step(net, call=call), expected)
    assert bool(found) == made, found


# what is made


@pytest.mark.parametrize(
    ("scope", "autocast", "layout"),
    slow_except(
        product(["layer", "global"], [False, True], [torch.contiguous_format, torch.channels_last]),
        [("layer", False, torch.contiguous_format), ("global", True, torch.channels_last)],
    ),
)
@by_kernels
def test_steps_are_those_of_the_layers_by_themselves(scope: Scope, autocast: bool, layout: torch.memory_format) -> None:
    net = converted(deep(), scope=scope).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=True)
    before = masks(net)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            check(net)
        optimizer.step()
    assert any(not torch.equal(mask, before[key]) for key, mask in masks(net).items())


@pytest.mark.parametrize("autocast", [False, True])
@by_kernels
def test_the_number_of_kernels_does_not_depend_on_the_depth(autocast: bool) -> None:
    """A step has those of the dense network and 7 + 1 for each bucket."""
    more = []
    for depth in (1, 4):
        dense, hidden = Operators(), Operators()
        for model, mode in ((deep(depth), dense), (converted(deep(depth)), hidden)):
            for parameter in model.parameters():  # both have as many gradients
                parameter.requires_grad_(parameter.requires_grad and parameter.ndim > 1)
            step(model)
            model.zero_grad()
            with mode, launches() as found, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(images()).float().square().sum().backward()
        assert found == [*PASS, "differentiate"]  # the last mode is of the hidden network
        assert hidden.names.count("aten.zeros.default") == 1
        more.append(len(found) + len(hidden.names) - len(dense.names))
    assert max(more) <= 8
    assert more[0] == more[1] or autocast, "with autocast each layer saves two casts of the dense network"


class Operators(TorchDispatchMode):
    """The operators that start a kernel on a GPU."""

    FREE = (
        "empty",
        "detach",
        "alias",
        "set_",
        "view",
        "as_strided",
        "t",
        "transpose",
        "expand",
        "permute",
        "_unsafe_view",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in self.FREE and not func.overloadpacket.__name__.startswith("empty"):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


@by_kernels
def test_reads_outside_a_forward_of_the_root_are_the_layers_own() -> None:
    net, x = converted(sequential()), images()
    with launches() as found:
        expected = [layer.weight.detach().clone() for layer in layers_of(net)]
        net[0](x)
        net.forward(x)
        masks(net)
        bake(net)
        assert not found
        net(x)
        assert found == PASS
        assert forwards.current() is None
        assert all(map(torch.equal, (layer.weight for layer in layers_of(net)), expected))
    assert all(map(torch.equal, expected, map(right, layers_of(net))))


@every_scope
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@by_kernels
def test_without_gradients_weights_have_none(scope: Scope, mode: Any) -> None:
    net, x = converted(sequential(), scope=scope), images()
    seen: list[Tensor] = []
    net[3].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    with mode(), launches() as found:
        out = net(x)
        assert found == PASS
    assert not seen[0].requires_grad
    assert not seen[0].is_inference()
    assert torch.equal(out, bake(net)(x).detach())
    with torch.no_grad():
        net[0].register_forward_pre_hook(lambda *_: (torch.set_grad_enabled(True), None)[1])
        net(x)
    assert seen[1].requires_grad, "a read with gradients after the first read without"
    check(net)


@by_kernels
def test_a_layer_that_reads_its_weight_twice_and_one_that_is_used_twice() -> None:
    net = converted(Block())
    with alone():
        expected = step(net)
    with launches() as found:
        out, gradients = step(net)
    assert found == [*PASS, "differentiate"]
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(gradients, expected[1])


@by_kernels
def test_autocasts_dtype_is_for_torchs_own_layers_alone() -> None:
    net = converted(sequential())
    seen: list[Tensor] = []
    net[3].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    with torch.autocast("cpu", torch.bfloat16), launches() as found:
        net(images())
        assert found == PASS
        assert seen[0].dtype == torch.float32, "read by a hook, which may need it"
        found.clear()
        net(images())
        assert found == PASS
    assert seen[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        check(net)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequential()

        def forward(self, x: Tensor) -> Tensor:
            x = self.body[:3](x)
            with torch.autocast("cpu", enabled=False):
                return self.body[3](x.float())

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return half(x)

    half = converted(Half())
    check(half, cast)
    half.bfloat16()
    check(half, lambda x: half.body(x.bfloat16()), made=False)
    check(half.body, lambda x: half.body(x.bfloat16()), made=False)
    whole = converted(sequential()).bfloat16()
    check(whole, lambda x: whole(x.bfloat16()))


@by_kernels
def test_k_that_changes_is_followed() -> None:
    net, x = converted(sequential()), images()
    for kept in (10, 1, 80):
        for layer in layers_of(net):
            slots_of(layer)["weight"].ranking.at(0.5, kept)
        with launches() as found:
            out = net(x)
        assert found == PASS
        assert torch.equal(out, bake(net)(x))
        assert [int(mask.sum()) for mask in masks(net).values()] == [kept, kept]


@by_kernels
def test_nothing_stays_in_memory() -> None:
    net = converted(deep(2))
    gc.collect()
    gc.disable()
    try:
        step(net)
        assert not [one for one in gc.get_objects() if isinstance(one, together._Bucket)]
    finally:
        gc.enable()


# what changes in a forward


class Meddling(nn.Module):
    """A network that calls something between two layers."""

    def __init__(self, meddle: Callable[[Any], object] = lambda body: None) -> None:
        super().__init__()
        self.body, self.meddle = sequential(), meddle

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:3](x)
        self.meddle(self.body)
        return self.body[3](x)


@every_scope
@by_kernels
def test_a_write_to_a_masked_weight_is_found(scope: Scope) -> None:
    net = converted(Meddling(), scope=scope)
    expected = net(images())
    for write in (lambda body: body[3].weight.data.zero_(), lambda body: body[3].weight[0].detach().mul_(2)):
        net.meddle = write
        with pytest.raises(MaskedWeightError, match=r"body\.3\.weight' was written to"):
            net(images())
        net.meddle = lambda body: None
        assert forwards.current() is None
        assert torch.equal(net(images()), expected)
    net.meddle = lambda body: body[0].weight.data.zero_()
    assert torch.equal(net(images()), expected), "of a layer that is not read again, in memory of its own"
    with pytest.raises(MaskedWeightError, match=r"body\.0\.weight' was written to"):
        net(images())


@every_scope
@by_kernels
def test_scores_and_weights_that_change_in_a_forward_are_seen(scope: Scope) -> None:
    net = converted(Meddling(), scope=scope)
    new = reverse(net.body[3].weight_score)

    def replace(body: Any) -> None:
        body[3].weight_score = nn.Parameter(new)

    for meddle in (
        lambda body: body[3].weight_score.detach().copy_(new),
        replace,
        lambda body: raw(body[3]).detach().mul_(2),
        lambda body: body[3].weight_score.requires_grad_(False),
    ):
        net.meddle = meddle
        found = step(net)
        net.meddle = lambda body: None
        with alone():
            assert same(found, step(net))


@by_kernels
def test_a_change_of_another_layers_scores_in_a_forward_is_seen() -> None:
    net = converted(Meddling(), scope="global")
    new = reverse(net.body[0].weight_score) * 3
    given = {"0.weight_score": new}
    net.forward = lambda x: functional_call(net.body, given, (net.body[3].weight.sum() * 0 + x,))
    out = net(images())
    with alone():
        assert torch.equal(net(images()), out)
    del net.forward
    net.meddle = lambda body: body[0].weight_score.detach().copy_(new)
    out = net(images())
    assert not torch.equal(net(images()), out)
    assert torch.equal(net.body[3].weight, right_globally(net)[1])
    net.body[0].register_forward_hook(lambda *_: seen.append(net.body[3].weight.detach().clone()))
    seen: list[Tensor] = []
    net.meddle = lambda body: seen.append(body[3].weight.detach().clone())
    net(images())
    assert torch.equal(*seen)


@by_kernels
def test_scores_that_change_before_the_backward_are_an_error() -> None:
    net = converted(sequential())
    for where in (nullcontext, alone):
        for tensor in (net[0].weight_score, raw(net[3])):
            with where():
                out = net(images()).sum()
                tensor.detach().mul_(1)
                with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* changed between"):
                    out.backward()


@by_kernels
def test_a_forward_that_fails_or_is_interrupted_leaves_nothing() -> None:
    net, x = converted(sequential()), images()
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 3, 9, 9))
    assert forwards.current() is None

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = net[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    handle.remove()
    net[0].weight_score.data.copy_(reverse(net[0].weight_score))
    assert torch.equal(net(x), bake(net)(x))
    assert forwards.current() is None


# passes of other kinds


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep(2)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:2](x)
        part = self.body[2:6]
        x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return self.body[6:](x)


@pytest.mark.parametrize(
    ("scope", "autocast", "reentrant"),
    slow_except(
        product(["layer", "global"], [False, True], [False, True]),
        [("layer", True, False), ("global", False, False), ("layer", False, True)],
    ),
)
@by_kernels
def test_gradient_checkpointing(scope: Scope, autocast: bool, reentrant: bool) -> None:
    net = converted(Checkpointed(), scope=scope)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with alone():
            expected = step(net)
        net.reentrant = reentrant
        assert same(step(net), expected)
        with alone():
            assert same(step(net), expected)


@every_scope
@by_kernels
def test_functional_call_and_transforms(scope: Scope) -> None:
    net, x = converted(sequential(), scope=scope), images()
    before = net(x)
    given = {f"{i}.weight_score": reverse(net[i].weight_score) for i in (0, 3)}
    with alone():
        expected = functional_call(net, given, (x,))
        by_func = torch.func.grad(lambda scores: functional_call(net, scores, (x,)).square().sum())(given)
        by_input = torch.func.grad(lambda x: net(x).sum())(x)
    with launches() as found:
        assert torch.equal(functional_call(net, given, (x,)), expected)
        assert found == PASS
        learning = {name: score.clone().requires_grad_() for name, score in given.items()}
        functional_call(net, learning, (x,)).square().sum().backward()
        torch.testing.assert_close({name: score.grad for name, score in learning.items()}, by_func)
        found.clear()
        again = torch.func.grad(lambda scores: functional_call(net, scores, (x,)).square().sum())(given)
        torch.testing.assert_close(again, by_func)
        assert torch.equal(torch.func.grad(lambda x: net(x).sum())(x), by_input)
        torch.testing.assert_close(torch.func.vmap(net)(x[:, None]).flatten(0, 1), before)
        assert not found
    assert torch.equal(net(x), before)


@by_kernels
def test_gradients_are_derived_again() -> None:
    net, found = converted(sequential()), []
    for where in (alone, nullcontext):
        with where():
            scores = [layer.weight_score for layer in layers_of(net)]
            first = torch.autograd.grad(net(images()).tanh().sum(), scores, create_graph=True)
            found.append(torch.autograd.grad(torch.stack([one.square().sum() for one in first]).sum(), scores))
    assert all(map(torch.equal, *found))
    assert all(one.any() for one in found[0])


@by_kernels
def test_parts_of_a_graph_go_backward_by_themselves() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.other(x)], 1)

    net, x = converted(Heads()), torch.randn(2, 3)
    for where in (nullcontext, alone):
        with where():
            net.zero_grad()
            out = net(x)
            one, other = out.split([4, 5], 1)
            one.square().sum().backward(retain_graph=True)
            assert net.other.weight_score.grad is None or not net.other.weight_score.grad.any()
            other.square().sum().backward()
            with alone():
                assert same((out, [p.grad for p in net.parameters() if p.grad is not None]), step(net, x))


@by_kernels
def test_frozen_scores_get_no_gradient() -> None:
    net = converted(deep(2))
    net[2].weight_score.requires_grad_(False)
    check(net)
    assert net[2].weight_score.grad is None
    with launches() as found:
        net = converted(sequential(), learner="random")
        assert torch.equal(net(images()), bake(net)(images()))
        assert found == PASS


@every_scope
@by_kernels
def test_shared_weights_and_copies_with_scores_of_their_own(scope: Scope) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    net = converted(net, scope=scope)
    other: Any = copy.copy(net[0])
    other._parameters = dict(other._parameters, weight_score=nn.Parameter(reverse(net[0].weight_score)))
    net.append(other)
    with alone():
        expected = step(net, torch.ones(2, 6))
    with launches() as found:
        out, gradients = step(net, torch.ones(2, 6))
    assert found == [*PASS, "differentiate"]
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(gradients, expected[1])


@by_kernels
def test_nested_roots_and_networks_within_others() -> None:
    inner = converted(deep())
    outer = converted(nn.Sequential(inner, nn.Linear(5, 3)))
    with launches() as found:
        check(outer)
        assert found == [*PASS, "differentiate"]
        found.clear()
        check(inner)
        assert found == [*PASS, "differentiate"]
    teacher = converted(sequential())
    inner.register_forward_hook(lambda layer, args, out: out + teacher(args[0]).detach())
    with launches() as found:
        outer(images())
    assert found == [*PASS, *PASS]
    check(outer)


@by_kernels
@pytest.mark.slow
def test_threads_have_forwards_of_their_own() -> None:
    net = converted(deep())
    inputs = [images(seed) for seed in range(4)]
    expected = [net(x).detach() for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        found = functional_call(net, {"0.weight_score": scores[i]}, (inputs[i],)) if i % 2 else net(inputs[i])
        if not torch.equal(found, expected[i]):
            wrong.append(i)

    scores = [reverse(net[0].weight_score) for _ in inputs]
    for i in (1, 3):
        expected[i] = functional_call(net, {"0.weight_score": scores[i]}, (inputs[i],)).detach()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    # one after the other: Triton's interpreter has one state for all threads
    for thread in threads:
        thread.start()
        thread.join()
    assert not wrong

    read: list[Tensor] = []
    other = threading.Thread(target=lambda: read.append(net[0].weight))

    def wait(*_: Any) -> None:
        other.start()
        other.join()

    net[0].register_forward_pre_hook(wait)
    assert torch.equal(net(inputs[0]), expected[0])
    assert torch.equal(read[0], right(net[0]))


@by_kernels
@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = deep(2), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for net, unused in ((converted(deep(2)), False), (converted(Partly()), True)):
            with alone():
                expected = step(net)
            wrapped = DistributedDataParallel(net, find_unused_parameters=unused)
            for _ in range(2):
                assert same(step(net, call=wrapped), expected)
    finally:
        dist.destroy_process_group()


# what is left to the layers


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "biprop"}, {"learner": "dnw"}, {"learner": "supermask", "k": None}, {"learner": "signed"},
        {"learner_options": {"coats": [K, 0.1]}}, {"k": None, "pattern": "2:4"}, {"scope": "global", "floor": 0.1},
        {"fixed": {"dropped": 0.1}},
    ],
    ids=str,
)  # fmt: skip
@by_kernels
def test_other_learners_and_rankings_are_left_to_the_layers(settings: dict[str, Any]) -> None:
    from popup_surgery import sampled

    with sampled(0):
        check(converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4)), **settings), made=False)


@by_kernels
def test_tensors_that_do_not_suit_are_left_to_the_layers() -> None:
    net = converted(sequential())
    raw(net[3]).requires_grad_()
    check(net)  # the other layer is made
    raw(net[0]).requires_grad_()
    check(net, made=False)
    net, x = converted(sequential()), images()
    with launches() as found:
        assert torch.equal(net.double()(x.double()), bake(net)(x.double()))
        net.float()[0].compile(backend="eager")
        assert torch.equal(net(x), bake(net)(x))
        assert not found


@by_kernels
def test_replicas_are_left_to_the_layers() -> None:
    net, x = converted(sequential()), images()
    with launches() as found:
        assert torch.equal(_replica(net)(x), bake(net)(x))
        assert not found


def _replica(net: nn.Module) -> Any:
    found = net._replicate_for_data_parallel()
    for name, child in net.named_children():
        found._modules[name] = _replica(child)
    for name, parameter in net._parameters.items():
        setattr(found, name, parameter if parameter is None else parameter.view_as(parameter))
    return found


@every_scope
@by_kernels
def test_compiled_networks_are_left_to_the_layers(scope: Scope) -> None:
    torch._dynamo.reset()
    net = converted(sequential(), scope=scope)
    expected = step(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with launches() as found:
        assert same(step(net, call=compiled), expected)
    assert not found
    torch._dynamo.reset()


@by_kernels
def test_shards_are_left_to_the_layers(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = converted(sequential())
        expected, keys = step(net), list(net.state_dict())
        fully_shard(net[3])
        with launches() as found:
            out, gradients = step(net)
        assert torch.equal(out, expected[0])
        assert [whole(gradient).sum() for gradient in gradients] == [gradient.sum() for gradient in expected[1]]
        assert not found
        assert list(net.state_dict()) == keys
    finally:
        dist.destroy_process_group()


def test_learners_that_suit() -> None:
    class Other(EdgePopup):
        def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
            return 2 * super().effective(weight, score, mask)

    class Same(EdgePopup):
        trains = False

    assert [name for name, learner in LEARNERS.items() if learner.one_pass] == ["edge_popup", "random"]
    assert not Other().one_pass
    assert Same().one_pass
    assert len(convert(sequential(), K)._forward_pre_hooks) == 1
    assert not convert(sequential(), K, learner="dnw")._forward_pre_hooks


@by_kernels
def test_without_triton_layers_make_their_own() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "OnePass", lambda members: 1 / 0)
        segments.works_on.cache_clear()
        net = converted(sequential())
        check(net, made=False)
    segments.works_on.cache_clear()


@every_scope
def test_on_the_cpu_nothing_is_made(scope: Scope) -> None:
    net: Any = convert(sequential(), K, scope=scope)
    made: list[Any] = []
    net[3].register_forward_hook(lambda *_: made.append(forwards.current()))
    expected = right_globally(net) if scope == "global" else [right(layer) for layer in layers_of(net)]
    assert torch.equal(net(images()), bake(net)(images()))
    assert made[0].root is net
    assert made[0].made is None
    assert all(map(torch.equal, (layer.weight for layer in layers_of(net)), expected))


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@every_scope
def test_cuda_starts_twelve_kernels_more_than_the_dense_network(scope: Scope, autocast: bool) -> None:
    device = torch.device("cuda", 0)
    if not segments.works_on(device):
        pytest.skip("Triton builds no kernels here")
    torch.backends.cudnn.deterministic = True
    x = images().to(device)
    for depth in (2, 12):
        dense = deep(depth).to(device)
        hidden = convert(deep(depth), K, scope=scope).to(device)
        for parameter in [*dense.parameters(), *hidden.parameters()]:
            parameter.requires_grad_(parameter.requires_grad and parameter.ndim > 1)
        counts = []
        for net in (dense, hidden):
            for _ in range(3):
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    step(net, x)
            net.zero_grad()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    net(x).float().square().sum().backward()
                torch.cuda.synchronize()
            kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            counts.append(len([event for event in kernels if "Memcpy" not in event.name]))
        assert counts[1] - counts[0] <= 12, counts


@pytest.mark.gpu
@every_scope
def test_cuda_graphs_replay_the_pass(scope: Scope) -> None:
    net, x = convert(deep(2), K, scope=scope).cuda(), images().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, x)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = net(x)
        out.square().sum().backward()
    for layer in layers_of(net):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
    graph.replay()
    torch.testing.assert_close(out, bake(net)(x))
