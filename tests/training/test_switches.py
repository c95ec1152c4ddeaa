"""What a recipe can switch on: schedules, mixing, numerics, trackers, and going on from somebody's file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from popup_surgery import (
    ArtifactError,
    RecipeError,
    Result,
    RunError,
    bake,
    build,
    convert,
    inspect,
    load,
    masks,
    save,
    start_from,
    train,
)
from popup_surgery.artifact import stored_masks
from popup_surgery.config import Recipe
from popup_surgery.config.schedule import rates
from popup_surgery.config.schema import Training
from popup_surgery.data.batches import quiet
from popup_surgery.data.open import open_data
from popup_surgery.errors import Stopped
from popup_surgery.learners import LEARNERS
from popup_surgery.training import checkpoint
from popup_surgery.training.distributed import numerics, start
from popup_surgery.training.trainer import Trainer
from support import PATIENCE, TWO_EPOCHS, Scope, short, slow_except


def fit(*overrides: str) -> Trainer:
    recipe = Recipe.load("digits", ["training.epochs=1", *overrides])
    data = open_data(recipe.data, (1, 8, 8), 0, torch.device("cpu"), quiet)
    model = build("conv2", width=0.25, in_chans=1, img_size=8)
    return Trainer(convert(model, 0.5), data, recipe.training, start(recipe.training), quiet)


# schedules


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("step", {"decay_epochs": 2, "decay_rate": 0.5}),
        ("multistep", {"decay_milestones": [2, 4], "decay_rate": 0.1}),
        ("poly", {"decay_rate": 1.0, "min_lr": 0.001}),
        ("tanh", {}),
        ("cosine", {"min_lr": 0.01}),
    ],
)
def test_schedules_are_timms(schedule: Any, arguments: dict[str, Any]) -> None:
    from timm.scheduler import create_scheduler_v2

    training = Training(epochs=8, warmup_epochs=2, lr=0.3, schedule=schedule, schedule_kwargs=arguments)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.3)
    theirs, _ = create_scheduler_v2(optimizer, schedule, 6, **arguments)
    wanted = [0.15, 0.3]
    for epoch in range(6):
        theirs.step(epoch)
        wanted.append(optimizer.param_groups[0]["lr"])
    rate = rates(training)
    assert [rate(epoch, 1.0) for epoch in range(8)] == wanted
    assert len(set(wanted)) > 2


def test_a_rate_for_each_step(tmp_path: Path) -> None:
    fitted = fit("training.schedule_per=step", "training.epochs=3", "training.warmup_epochs=1")
    seen = []
    fitted.optimizer.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    fitted.run(lambda epoch: None)
    steps = fitted.data.steps()
    assert steps == 45
    warm = [0.1 * (s + 1) / steps for s in range(steps)]
    down = [0.1 * 0.5 * (1 + np.cos(np.pi * s / (2 * steps))) for s in range(2 * steps)]
    assert seen == pytest.approx(warm + down)
    assert [epoch.lr for epoch in fitted.history] == pytest.approx([seen[44], seen[89], seen[134]])


def test_arguments_that_a_schedule_or_an_optimiser_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"schedule_kwargs is .*; timm's step schedule does not take it: .*'decay'"):
        short(tmp_path / "a", "training.schedule=step", "training.schedule_kwargs={decay: 1}")
    with pytest.raises(RunError, match=r"training\.optimizer sgd does not take training\.optimizer_kwargs {'beta': 1}"):
        short(tmp_path / "b", "training.optimizer_kwargs={beta: 1}")
    assert not list(tmp_path.iterdir())


# mixing


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixed_images_and_targets_belong_together(mode: str) -> None:
    """Of images that are their class's unit vector, the mixture is the target itself."""
    fitted = fit("training.mixup=0.8", "training.mixup_prob=0.9", f"training.mixup_mode={mode}")
    labels = torch.arange(9) % 10
    np.random.seed(1)
    mixed = 0
    for _ in range(20):
        images = functional.one_hot(labels, 10).float().view(9, 10, 1, 1).clone()
        assert fitted.update.mixing is not None
        images, targets = fitted.update.mixing(images, labels)
        assert torch.allclose(images.flatten(1), targets, atol=1e-6)
        assert torch.equal(targets[8], functional.one_hot(labels[8], 10).float()), "the odd one out stays"
        mixed += int(((targets > 0).sum(1) == 2).sum())
    assert mixed > 50


def test_cutmix_targets_are_the_share_of_pixels() -> None:
    fitted = fit("training.cutmix=1.0")
    labels = torch.tensor([1, 2])
    np.random.seed(0)
    for _ in range(10):
        assert fitted.update.mixing is not None
        images, targets = fitted.update.mixing(labels.float().view(2, 1, 1, 1).expand(2, 1, 8, 8).clone(), labels)
        assert float((images[0] == 1).float().mean()) == pytest.approx(float(targets[0, 1]))
        assert float((images[0] == 2).float().mean()) == pytest.approx(float(targets[0, 2]))


@pytest.mark.slow
def test_mixing_is_part_of_the_run_and_repeats(first: Result, tmp_path: Path) -> None:
    mix = ["training.mixup=0.2", "training.cutmix=1.0", "training.label_smoothing=0.1"]
    one, other = short(tmp_path / "a", *mix), short(tmp_path / "b", *mix)
    assert one.file.read_bytes() == other.file.read_bytes() != first.file.read_bytes()
    assert one.history[-1].train_loss > first.history[-1].train_loss


# numerics


def test_channels_last_reaches_the_convolutions(first: Result, tmp_path: Path) -> None:
    fitted = fit("training.channels_last=true")
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    convs = [module for module in fitted.core.modules() if isinstance(module, nn.Conv2d)]
    assert convs
    handle = convs[-1].register_forward_pre_hook(look)
    fitted._one_step(fitted.data.train(0))
    handle.remove()
    assert seen == [True]
    assert convs[-1].weight.is_contiguous(memory_format=torch.channels_last)
    result = short(tmp_path / "run", "training.channels_last=true")
    assert result.accuracy == pytest.approx(first.accuracy, abs=0.03)
    for mine, theirs in zip(load(result.file).parameters(), result.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_compiled_run(first: Result, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = train(
        "digits",
        overrides=["training.epochs=1", "training.compile=true", "data.batch_size=479", "model.kwargs.width=0.1"],
        output=tmp_path / "run",
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert result.kept == result.weights // 2
    state = load(result.file).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in result.model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("learner", ["edge_popup", "supermask"])
def test_cuda_graphs_take_the_same_steps(learner: str, tmp_path: Path) -> None:
    own = ["surgery.learner=supermask", "surgery.k=null", "training.lr=20"] if learner == "supermask" else []
    losses = []
    for mode in ("false", "reduce-overhead"):
        torch._dynamo.reset()
        run = short(tmp_path / mode, f"training.compile={mode}", "data.batch_size=719", *own)
        losses.append([epoch.train_loss for epoch in run.history])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_deterministic_algorithms_are_asked_for_within_a_run_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with numerics(Training(epochs=1, lr=0.1, deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    with numerics(Training(epochs=1, lr=0.1)):
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    place, value = torch.tensor([0]), torch.tensor([1.0])
    with (
        pytest.raises(RunError, match=r"training\.deterministic is true; .*put_ .*does not have a deterministic"),
        numerics(Training(epochs=1, lr=0.1, deterministic=True)),
    ):
        torch.zeros(3).put_(place, value)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_a_precision_that_the_device_does_not_have(precision: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip(f"this device has {precision}")
    with pytest.raises(RunError, match=rf"training\.precision is '{precision}', which trains only on GPUs"):
        short(tmp_path / "run", f"training.precision={precision}")
    assert not list(tmp_path.iterdir())


def test_tf32_is_for_the_run_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with numerics(Training(epochs=1, lr=0.1, precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_a_preset_sets_what_the_recipe_does_not() -> None:
    fast = Recipe.load("digits", ["training.preset=fast"])
    assert (fast.training.precision, fast.training.channels_last) == ("bfloat16", True)
    assert Recipe.parse(fast.dump()) == fast
    own = Recipe.load("digits", ["training.preset=fast", "training.precision=float32"])
    assert (own.training.precision, own.training.channels_last) == ("float32", True)


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_float16_scales_its_loss(clip: str, tmp_path: Path) -> None:
    assert short(tmp_path / "run", "training.precision=float16", f"training.clip_norm={clip}").accuracy > 0.8


# trackers


@pytest.mark.slow
def test_tensorboard_has_the_curves_the_layers_and_the_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = short(tmp_path / "run", "training.trackers=[tensorboard]")
    events = EventAccumulator(str(tmp_path / "run" / "popup-surgery"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("accuracy")]
    assert curve == [(epoch.epoch, pytest.approx(epoch.accuracy)) for epoch in result.history]
    layers = list(stored_masks(result.file))
    assert {tag for tag in events.Tags()["scalars"] if "/" in tag} == {
        f"{kind}/{layer}" for kind in ("density", "changed") for layer in layers
    }
    density = [events.Scalars(f"density/{layer}")[-1].value for layer in layers]
    assert density == pytest.approx([float(mask.float().mean()) for mask in stored_masks(result.file).values()])
    (table,) = events.Tensors("result/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert f"| accuracy | {result.accuracy} |" in text
    short(tmp_path / "plain")
    assert result.file.read_bytes() != b""
    assert inspect(result.file).masks_sha256 == inspect(tmp_path / "plain" / result.file.name).masks_sha256


def test_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.tracking import get_available_trackers

    missing = {"wandb", "mlflow", "trackio"} - {str(tracker) for tracker in get_available_trackers()}
    if not missing:
        pytest.skip("all of them are installed")
    name = min(missing)
    with pytest.raises(
        RunError, match=rf"training\.trackers names {name}, which is not installed; run pip install {name}"
    ):
        short(tmp_path / "run", f"training.trackers=[{name}]")
    assert not list(tmp_path.iterdir())


def test_layers_change_and_overlap_with_the_start() -> None:
    fitted = fit()
    before = masks(fitted.core)
    fitted.run(lambda epoch: None)
    after = masks(fitted.core)
    assert fitted.layers()
    for layer in fitted.layers():
        one, other = before[layer.name], after[layer.name]
        assert layer.density == pytest.approx(float(other.float().mean()))
        assert layer.changed == pytest.approx(float((one != other).float().mean()))
        assert layer.overlap == pytest.approx(float((one & other).sum() / other.sum()))
    total = sum(layer.changed * before[layer.name].numel() for layer in fitted.layers())
    assert fitted.history[-1].changed == pytest.approx(total / sum(mask.numel() for mask in before.values()))


# going on from a file


@given(
    st.lists(st.lists(st.floats(-2, 2, width=32).map(lambda x: round(x, 1)), min_size=1, max_size=9), min_size=1),
    st.randoms(),
)
@pytest.mark.slow
def test_favoured_scores_select_the_mask(values: list[list[float]], rng: Any) -> None:
    """Also with equal scores: they are the same numbers but for the smallest step, and select just that mask."""
    scores = [torch.tensor(row) for row in values]
    chosen = [torch.tensor([rng.random() < 0.5 for _ in row]) for row in values]
    count = int(sum(mask.sum() for mask in chosen))
    learner = LEARNERS["edge_popup"]
    moved = learner.seed_from_mask(scores, chosen)
    if count:
        assert all(map(torch.equal, learner.select(moved, count).masks, chosen))
    for one, other in zip(scores, moved, strict=True):
        assert torch.equal(one.signbit(), other.signbit())
    before, after = (torch.cat(some).abs().sort().values for some in (scores, moved))
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_network_starts_with_the_mask_of_a_file(scope: Scope, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 5, "scope": scope}
    torch.manual_seed(0)
    trained: Any = convert(build("timm/resnet18", num_classes=3), 0.4, **settings)
    with torch.no_grad():
        for name, tensor in trained.named_parameters():
            if name.endswith("_score"):
                tensor.normal_()
        trained.bn1.running_mean.normal_()
    save(trained, tmp_path / "file")
    fresh = convert(build("timm/resnet18", num_classes=3), 0.4, **settings)
    assert any(not torch.equal(masks(fresh)[name], mask) for name, mask in masks(trained).items())
    start_from(fresh, tmp_path / "file")
    assert all(torch.equal(masks(fresh)[name], mask) for name, mask in masks(trained).items())
    state = bake(fresh).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bake(trained).state_dict().items())
    wider = convert(build("timm/resnet18", num_classes=3), 0.5, scaled=False, **settings)
    with pytest.raises(ArtifactError, match=r"the weights of 'conv1.weight' differ: the file's are .* and seed 5"):
        start_from(wider, tmp_path / "file")


def test_a_mask_on_pretrained_weights_starts_on_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save(convert(net, 0.5, scheme="pretrained", seed=3), tmp_path / "file")
    again = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    again.load_state_dict(state)
    convert(again, 0.5, scheme="pretrained", seed=4)
    start_from(again, tmp_path / "file")
    assert all(torch.equal(masks(again)[name], mask) for name, mask in masks(net).items())
    with pytest.raises(ArtifactError, match="the masks are for other weights"):
        start_from(convert(other, 0.5, scheme="pretrained"), tmp_path / "file")


def test_a_run_goes_on_from_a_file(first: Result, tmp_path: Path) -> None:
    still = short(tmp_path / "still", f"model.init_from={first.file}", "training.lr=1e-12")
    assert inspect(still.file).masks_sha256 == inspect(first.file).masks_sha256
    further = short(tmp_path / "further", f"model.init_from={first.file}", "training.seed=7")
    assert further.history[0].train_loss < first.history[0].train_loss / 2
    assert inspect(further.file).seed == inspect(first.file).seed
    assert inspect(further.file).provenance["recipe"]["model"]["init_from"] == first.file.name
    assert str(first.file.parent) not in further.file.read_bytes().decode("latin-1")


@pytest.mark.slow
def test_a_run_takes_the_seed_of_the_file_it_goes_on_from(tmp_path: Path) -> None:
    nine = short(tmp_path / "nine", "surgery.seed=9")
    values = Recipe.load("digits", TWO_EPOCHS).model_dump(exclude_unset=True)
    del values["surgery"]["seed"]
    values["model"]["init_from"] = str(nine.file)
    assert inspect(train(values, output=tmp_path / "on").file).seed == 9
    assert Recipe.load(tmp_path / "on" / "recipe.yaml").dump()["surgery"]["seed"] == 9
    with pytest.raises(RecipeError, match=r"surgery\.seed is 3; expected 9, the seed of model\.init_from"):
        short(tmp_path / "x", f"model.init_from={nine.file}", "surgery.seed=3")
    with pytest.raises(ArtifactError, match=r"weights of 'features\.0\.weight' differ"):
        short(tmp_path / "x", f"model.init_from={nine.file}", "surgery.seed=9", "surgery.scheme=kaiming_normal")
    with pytest.raises(ArtifactError, match="the file does not exist"):
        short(tmp_path / "x", "model.init_from=nowhere.popup.safetensors")
    assert not (tmp_path / "x").exists()


OPTIMISERS = ["sgd", "adamw", "lamb", "muon", "lion", "adafactor", "nadam"]


@pytest.mark.parametrize("optimizer", slow_except(OPTIMISERS, ["sgd", "adamw"]))
def test_an_optimisers_whole_state_is_in_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    more = [f"training.optimizer={optimizer}", "training.epochs=2", "training.lr=0.01", "training.schedule_per=step"]
    through, stopped, further = fit(*more), fit(*more), fit(*more)
    through.run(lambda epoch: None)
    with pytest.raises(Stopped):
        stopped.run(lambda epoch: None, lambda *kept: checkpoint.write(tmp_path, *kept), lambda: stopped.step == 50)
    further.restore(checkpoint.read(next(checkpoint.newest_first(tmp_path))))
    assert further.step == 50
    further.run(lambda epoch: None)
    for one, other in zip(through.core.parameters(), further.core.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_any_shape_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """As timm's Kron has it: lists of tensors, and the state of a generator, in tuples."""
    state: dict[int, dict[str, Any]] = {0: {"Q": [torch.eye(2), torch.ones(3)], "step": 3}}
    tree = {"state": state, "param_groups": [{"betas": (0.9, 0.5), "foreach": None}], "rng_state": (3, (1, 2), None)}
    tensors: dict[str, torch.Tensor] = {}
    taken = checkpoint.Checkpoint(tensors, {"optimizer": checkpoint.pack(tree, "optimizer", tensors)})
    checkpoint.write(tmp_path, 1, taken)
    found = checkpoint.read(next(checkpoint.newest_first(tmp_path)))
    back = checkpoint.unpack(found.state["optimizer"], found.tensors)
    for one, other in zip(state[0].pop("Q"), back["state"][0].pop("Q"), strict=True):
        assert torch.equal(one, other)
    assert back == tree
    with pytest.raises(RunError, match=r"^optimizer\.x is a range, which a checkpoint cannot hold$"):
        checkpoint.pack({"x": range(3)}, "optimizer", {})


@pytest.mark.parametrize("optimizer", slow_except(["sgd", "adamw", "lamb", "muon"], ["adamw"]))
def test_finetuning_trains_the_kept_weights_and_no_other(optimizer: str, first: Result, tmp_path: Path) -> None:
    more = ["surgery=none", f"model.init_from={first.file}", f"training.optimizer={optimizer}", "training.lr=0.001"]
    tuned = short(tmp_path / "run", *more, "training.clip_norm=1.0")
    plain = dict(load(first.file).named_parameters())
    for name, mask in stored_masks(first.file).items():
        weight = dict(tuned.model.named_parameters())[name]
        assert not weight[~mask].any()
        assert (weight[mask] != plain[name][mask]).float().mean() > 0.7
    assert (tuned.kept, tuned.weights) == (first.kept, first.weights)
    assert tuned.file.suffixes == [".safetensors"]
    assert tuned.accuracy >= first.accuracy - 0.05
    again = short(tmp_path / "run", *more, "training.clip_norm=1.0", resume=True)
    assert (again.kept, again.weights, again.accuracy) == (tuned.kept, tuned.weights, tuned.accuracy)


def test_writing_to_a_baked_copy_is_no_write_to_the_network() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4)), 0.5)
    baked: Any = bake(model)
    with torch.no_grad():
        baked[0].weight.fill_(7)
    assert not (model(torch.ones(1, 4)) == 28).any()


# processes

TWO = """
import json, os, sys, torch
from popup_surgery import masks, train
from popup_surgery.training.trainer import Trainer
wrong = sys.argv[2] == "differ"
found = []
end = Trainer._end_epoch
def look(self, after):
    end(self, after)
    if wrong and self.part.rank == 1:
        with torch.no_grad():
            next(p for p in self.core.parameters() if p.requires_grad).neg_().add_(1)
    found.append({k: m.flatten().tolist() for k, m in masks(self.core).items()})
Trainer._end_epoch = look
train("digits", overrides=["training.epochs=3", "model.kwargs.width=0.1"], output=sys.argv[1])
with open(f"{sys.argv[1]}-{os.environ['SLURM_PROCID']}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


def two(tmp_path: Path, word: str) -> list[subprocess.CompletedProcess[str]]:
    """The script in two processes that `srun` would start: SLURM's variables alone say who is who."""
    (script := tmp_path / "two.py").write_text(TWO)
    processes = []
    for rank in range(2):
        slurm = {
            "STEP_NUM_TASKS": "2", "PROCID": str(rank), "LOCALID": str(rank), "STEP_NODELIST": "localhost",
            "JOB_ID": str(os.getpid()),
        }  # fmt: skip
        environment = {**os.environ, **{f"SLURM_{key}": value for key, value in slurm.items()}}
        command = [sys.executable, str(script), str(tmp_path / "run"), word]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    done = []
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
def test_masks_are_equal_across_processes_at_every_epoch(tmp_path: Path) -> None:
    done = two(tmp_path, "agree")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    one, other = (json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2))
    assert len(one) == 3
    assert one == other
    assert one[0] != one[2]


@pytest.mark.slow
def test_a_process_with_other_masks_stops_the_run_by_its_number(tmp_path: Path) -> None:
    done = two(tmp_path, "differ")
    assert all(process.returncode for process in done)
    for process in done:
        assert "RunError: after step 45, process 1 has different masks from process 0" in process.stderr


@pytest.mark.parametrize(
    ("nodes", "first_host"),
    [("gpu[003-006,9],cpu1", "gpu003"), ("node7", "node7"), ("a,b", "a"), ("n[1,4]", "n1"), ("a-b[01-02]-ib", "a-b01")],
)
def test_the_first_of_slurms_hosts(nodes: str, first_host: str) -> None:
    from popup_surgery.training.distributed import _first_host

    assert _first_host(nodes) == first_host
