"""Whole steps as CUDA graphs. Without a GPU, a recording of the operators and kernels takes the graph's place."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from popup_surgery import RecipeError, RunError, build, convert, masks
from popup_surgery.config import Recipe
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.errors import Stopped
from popup_surgery.masking.k_schedule import KSchedule
from popup_surgery.torch_compat import SURVIVES_FAILED_CAPTURE
from popup_surgery.training import graph
from popup_surgery.training.distributed import start
from popup_surgery.training.trainer import Trainer
from support import by_kernels, slow_except

FEW = ["data.max_train=100", "data.max_validation=32", "data.batch_size=16", "data.pad=1", "data.hflip=0.5"]
RAMP = KSchedule.of({"kind": "cubic", "start": 0.9, "epochs": 1})
NEEDS_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}


class Recorder(TorchDispatchMode):
    """Notes the operators that run, and undoes what they write to tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.own: dict[int, torch.UntypedStorage] = {}  # all memory since the start, which stays allocated
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in NEEDS_THE_HOST:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        kwargs, given = kwargs or {}, tensors((args, kwargs))
        if (
            func._schema.is_mutable or func._schema.name == "aten::native_batch_norm"
        ):  # which does not say that it writes
            for tensor in given:
                if memory(tensor) not in self.own:
                    self.before.setdefault(memory(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        held, made = {memory(tensor) for tensor in given}, tensors(result)
        new = [place for place, tensor in enumerate(made) if memory(tensor) not in held]
        self.own |= {memory(made[place]): made[place].untyped_storage() for place in new}

        def again() -> None:
            found = tensors(func(*args, **kwargs))
            for place in new:
                made[place].data.copy_(found[place])  # as a GPU does: no version counter tells of it

        if func._schema.name != "aten::set_" and (new or func._schema.is_mutable):  # what only the host notes stays
            self.calls.append(again)
        return result


class Recording:
    """In place of `graph.CudaGraph`: repeats operators with the numbers that the host gave, on the same memory."""

    captures = replays = 0

    def run(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> None:
        from triton.runtime.interpreter import GridExecutor

        real, recorder = GridExecutor.__call__, Recorder()

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            def again() -> None:
                with _disable_current_modes():
                    real(executor, *args, **kwargs)

            recorder.calls.append(again)
            again()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", launch)
            with torch.random.fork_rng([]), recorder:
                work()
        with torch.no_grad():
            for tensor, value in recorder.before.values():
                tensor.copy_(value)
        self.recorder = recorder
        Recording.captures += 1

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.recorder.calls:
            call()
        Recording.replays += 1

    def drop(self) -> None:
        self.recorder = Recorder()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def prepare(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph, "DEVICES", {"cpu"})
    patch.setattr(graph, "CudaGraph", Recording)
    Recording.captures = Recording.replays = 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = build("conv2", width=0.125, in_chans=1, img_size=8)
        self.norm, self.drop = nn.BatchNorm1d(10), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.body(x)))


class Asking(Net):
    """It asks the device in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > -100 else -x)


class Drawing(Net):
    """It draws on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if random.random() > 0.5 else -x)


def fit(
    *overrides: str,
    net: type[nn.Module] = Net,
    device: str = "cpu",
    k: float | None = 0.5,
    k_schedule: KSchedule | None = RAMP,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(0)
    recipe = Recipe.load("digits", [*FEW, "training.epochs=2", *overrides])
    data = open_data(recipe.data, (1, 8, 8), 0, torch.device(device), quiet)
    model = convert(net(), k, others="train", **settings)
    return Trainer(model, data, recipe.training, start(recipe.training), quiet, k_schedule=k_schedule)


def state(fitted: Trainer) -> list[Tensor]:
    momentum = [value for each in fitted.optimizer.state.values() for value in each.values() if value is not None]
    return [*fitted.learned().values(), *masks(fitted.core).values(), *map(torch.as_tensor, momentum)]


def numbers(fitted: Trainer) -> list[Any]:
    return [(e.train_loss, e.train_accuracy, e.accuracy, e.changed, e.density) for e in fitted.history]


def same(one: Trainer, other: Trainer) -> None:
    assert numbers(one) == numbers(other)
    assert len(state(one)) > 10
    assert all(map(torch.equal, state(one), state(other)))


CASES = [
    ["training.clip_norm=0.5", "training.nesterov=true"],
    ["training.optimizer=adamw", "training.optimizer_kwargs={fused: true}", "training.lr=0.01"],
    ["training.precision=bfloat16", "training.channels_last=true", "training.label_smoothing=0.1"],
]


@pytest.mark.parametrize("overrides", slow_except(CASES, CASES[:1]))
@by_kernels
def test_a_captured_step_is_the_step(overrides: list[str]) -> None:
    """The last batch of an epoch is smaller, k and the rate change with the epoch, and dropout with the step."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        eager, graphed = fit(*overrides), fit("training.graph=true", *overrides)
        if "training.optimizer=adamw" in overrides:  # which computes in another way where it can be captured
            for group in eager.optimizer.param_groups:
                group["capturable"] = True
        for fitted in (eager, graphed):
            fitted.run(lambda epoch: None)
        same(eager, graphed)
        assert (Recording.captures, Recording.replays) == (2, 6)


@by_kernels
def test_a_stopped_run_of_graphs_resumes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        whole, stopped, resumed = (fit("training.graph=auto") for _ in range(3))
        whole.run(lambda epoch: None)
        left: list[Any] = []
        with pytest.raises(Stopped):
            stopped.run(lambda epoch: None, lambda step, it: left.append(it), lambda: stopped.step == 9)
        resumed.restore(left[-1])
        resumed.run(lambda epoch: None)
        same(whole, resumed)


@pytest.mark.parametrize(("made", "resumed"), [("false", "auto"), ("auto", "false")])
def test_checkpoints_resume_with_graphs_and_without(as_on_a_gpu: None, made: str, resumed: str) -> None:
    adam = ["training.optimizer=adamw", "training.optimizer_kwargs={fused: true}"]
    one, other = (fit(*adam, f"training.graph={graph}") for graph in (made, resumed))
    left: list[Any] = []
    with pytest.raises(Stopped):
        one.run(lambda epoch: None, lambda step, it: left.append(it), lambda: one.step == 2)
    other.restore(left[-1])
    assert {group["capturable"] for group in other.optimizer.param_groups} == {resumed == "auto"}


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Asking, "operation not permitted when stream is capturing"),
        (Drawing, "it draws random numbers on the host, which a graph would repeat"),
    ],
)
@by_kernels
def test_what_cannot_be_captured_runs_without_a_graph(net: type[nn.Module], why: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        said: list[str] = []
        patch.setattr(graph.log, "warning", lambda text, *values: said.append(text % values))
        eager, graphed = fit(net=net), fit("training.graph=auto", net=net)
        for fitted in (eager, graphed):
            fitted.run(lambda epoch: None)
        same(eager, graphed)
        assert Recording.replays == 0
        assert [text for text in said if "graph" in text] == [
            f"the run trains without a CUDA graph, which cannot capture the network's steps: {why}"
        ]
        expected = rf"^training\.graph is true; expected auto or false for this network: {why}$"
        with pytest.raises(RunError, match=expected):
            fit("training.graph=true", net=net).run(lambda epoch: None)
        patch.setattr(graph, "SURVIVES_FAILED_CAPTURE", False)
        if net is Asking:
            with pytest.raises(RunError, match=r"^training\.graph is auto; expected false for this network: operation"):
                fit("training.graph=auto", net=net).run(lambda epoch: None)


@pytest.mark.parametrize(
    ("overrides", "learner", "why"),
    [
        (["training.optimizer=lion"], "edge_popup", r"training\.optimizer lion works on the host too"),
        (
            ["data.batch_size=30"],
            "edge_popup",
            r"an epoch has 3 whole batches, and the first 3 run without a graph",
        ),
        ([], "supermask", r"the learner supermask works on the host in each step"),
        ([], "gem_miner", r"the learner gem_miner works on the host in each step"),
    ],
)
def test_runs_that_have_no_graph(as_on_a_gpu: None, overrides: list[str], learner: str, why: str) -> None:
    settings: dict[str, Any] = {"k": None, "k_schedule": None} if learner == "supermask" else {}
    with pytest.raises(RunError, match=rf"^training\.graph is true; expected auto or false, because {why}$"):
        fit("training.graph=true", *overrides, learner=learner, **settings)
    assert not isinstance(fit("training.graph=auto", *overrides, learner=learner, **settings).update, graph.GraphedStep)


def test_images_that_are_read_batch_by_batch_have_no_graph(as_on_a_gpu: None, images: Path) -> None:
    streamed = ["data.name=folder", f"data.root={images}", "data.in_memory=false", "data.batch_size=4"]
    with pytest.raises(RunError, match=r"because the images are not all in the device's memory$"):
        fit("training.graph=true", *streamed)
    fit("training.graph=auto", *streamed).run(lambda epoch: None)


def test_a_cpu_has_no_graph() -> None:
    with pytest.raises(RunError, match=r"because the run is on the device cpu$"):
        fit("training.graph=true")
    assert not isinstance(fit("training.preset=fast").update, graph.GraphedStep)


def test_a_recipe_names_all_that_keeps_it_from_graphs() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("digits", [
            "training.graph=true", "training.accumulate=2", "training.mixup=0.1", "training.precision=float16",
            "training.compile=reduce-overhead", "training.schedule_per=step",
        ])  # fmt: skip
    for what in ("accumulate is 2", "mixup and cutmix draw", "is float16", "compile is reduce-overhead", "is step"):
        assert what in str(caught.value)
    assert Recipe.load("digits", ["training.graph=auto", "training.accumulate=2"]).training.graph == "auto"


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cuda_replays_the_step(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for nothing in an epoch, and the masks are those of steps without a graph."""
    overrides = [f"training.optimizer={optimizer}", "training.optimizer_kwargs={fused: true}", "training.epochs=4"]
    eager, graphed = (fit(*overrides, *more, device="cuda") for more in ([], ["training.graph=true"]))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def watch() -> bool:
        torch.cuda.set_sync_debug_mode("error" if graphed.step % 7 in (4, 5) else "default")
        return False

    eager.run(lambda epoch: None)
    try:
        graphed.run(lambda epoch: None, stop=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphed.update.captured is not None  # type: ignore[attr-defined]
    for one, other in zip(numbers(eager), numbers(graphed), strict=True):
        assert one == pytest.approx(other, rel=0.05, abs=0.1)
    for key, mask in masks(eager.core).items():
        assert (mask != masks(graphed.core)[key]).float().mean() < 0.02


@pytest.mark.gpu
def test_cuda_continues_without_a_graph() -> None:
    if not SURVIVES_FAILED_CAPTURE:
        with pytest.raises(RunError, match=r"training\.graph is auto; expected false for this network"):
            fit("training.graph=auto", net=Asking, device="cuda").run(lambda epoch: None)
        return
    eager, graphed = (fit(*more, net=Asking, device="cuda") for more in ([], ["training.graph=auto"]))
    for fitted in (eager, graphed):
        fitted.run(lambda epoch: None)
    for one, other in zip(numbers(eager), numbers(graphed), strict=True):
        assert one == pytest.approx(other, rel=0.05, abs=0.1)
