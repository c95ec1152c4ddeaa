"""`fully_shard` spreads a converted network over processes: its masks and updates are those of one process."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from popup_surgery import MaskedWeightError, bake, convert, load, masks, save
from popup_surgery.masking.state import slots_of
from popup_surgery.selection.shards import find_cut, whole
from popup_surgery.torch_compat import of_fsdp
from support import equal_states, launch, top

OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global"},
    "floor": {"scope": "global", "floor": 0.1},
    "fixed": {"fixed": {"dropped": 0.3, "kept": 0.1}},
    "pattern": {"k": None, "pattern": "1:2"},
    "piggyback": {"learner": "piggyback", "scheme": "kaiming_normal", "k": None},
    "rescaled": {"learner": "edge_popup", "scheme": "kaiming_normal", "scaled": True},
    "root alone": {},
}


def plain() -> nn.Sequential:
    """No dimension is a multiple of the number of processes."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(7 * 36, 13), nn.ReLU(), nn.Linear(13, 11, bias=False))
    return nn.Sequential(
        nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), block, nn.ReLU(), nn.Linear(11, 5)
    )


def hidden(**options: Any) -> Any:
    arguments = {"k": 0.3, "seed": 3} | options
    return convert(plain(), **{key: value for key, value in arguments.items() if value is not None})


def spread(model: Any, root_alone: bool = False, **options: Any) -> Any:
    for module in [model] if root_alone else [model[4], model[0], model]:
        fully_shard(module, **options)
    return model


def scores(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def same_masks(one: nn.Module, other: nn.Module) -> bool:
    mine, its = masks(one), masks(other)
    return list(mine) == list(its) and all(torch.equal(mine[key], its[key]) for key in mine)


def compare(name: str, folder: Path) -> None:
    """Each of the processes trains a spread network on its images, and another one by itself on all of them."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    alone, model = hidden(**OPTIONS[name]).eval(), spread(hidden(**OPTIONS[name]).eval(), name == "root alone")
    assert same_masks(alone, model)
    optimizers = [torch.optim.SGD(scores(each), lr=0.5, momentum=0.9) for each in (alone, model)]
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(0, 5, (6,))
    for _ in range(3):
        for each, optimizer, mine in zip((alone, model), optimizers, (slice(None), slice(rank, None, processes))):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(images[mine]), labels[mine]).backward()
            optimizer.step()
        for one, shard in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(whole(shard), one.detach(), rtol=1e-5, atol=1e-6)
        assert same_masks(alone, model)
    with torch.no_grad():  # sums are in another order, so that scores are equal to the last bit from here on
        for one, shard in zip(alone.parameters(), model.parameters(), strict=True):
            one.copy_(whole(shard))
    assert torch.equal(model[6].weight, alone[6].weight)
    assert equal_states(bake(model), bake(alone))
    file = folder / f"{rank}.popup.safetensors"
    save(model, file)
    assert equal_states(load(file, plain()), bake(alone))
    save(alone, folder / f"{rank}.alone")
    assert file.read_bytes() == (folder / f"{rank}.alone").read_bytes()


def rank_many() -> None:
    """Many groups of scores, with ties across shards, against a stable sort."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(int(n), 3) for n in torch.randint(1, 9, (3,), generator=generator)]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        if seed % 3:  # few different magnitudes
            values = [(value * (1 if seed % 3 == 1 else 0)).round() for value in values]
        total = sum(value.numel() for value in values)
        kept = int(torch.randint(0, total + 1, (), generator=generator))
        spread_: list[Tensor] = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
        spread_[seed % 3] = values[seed % 3]  # one that all processes have
        cut = find_cut(spread_, kept)
        assert cut is not None
        for i, expected in enumerate(top(values, kept)):
            assert torch.equal(cut.mask(i, spread_[i]), expected), (seed, i)
            assert torch.equal(cut.mask(i, values[i]), expected), (seed, i)
    by_columns = distribute_tensor(torch.randn(3, 2 * mesh.size()), mesh, [Shard(1)])
    assert find_cut([by_columns], 3) is None


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "names"), [(2, list(OPTIONS)), (3, ["layer", "global"])])
def test_several_processes_rank_and_train_as_one(processes: int, names: list[str], tmp_path: Path) -> None:
    launch(processes, __file__, tmp_path, *names)


# in one process --------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("scope", "root_alone", "autocast"),
    [("layer", False, False), ("global", False, False), ("layer", True, False), ("layer", False, True)],
)
def test_one_process_trains_as_without(scope: str, root_alone: bool, autocast: bool, process_group: None) -> None:
    alone, model = hidden(scope=scope), spread(hidden(scope=scope), root_alone)
    assert type(model[0]._parameters["weight_score"]) is DTensor
    images = torch.randn(4, 1, 8, 8)
    for each in (alone, model):
        optimizer = torch.optim.SGD(scores(each), lr=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = each(images)
        found.float().square().sum().backward()
        optimizer.step()
    assert all(torch.equal(whole(its), one) for one, its in zip(scores(alone), scores(model), strict=True))
    assert same_masks(alone, model)
    assert equal_states(bake(alone), bake(model))
    assert of_fsdp(model)  # as it was
    model(images).sum().backward()
    assert not of_fsdp(bake(model))
    twin = bake(model)
    twin.load_state_dict(twin.state_dict())  # none of the hooks is left
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize("autocast", [False, True])
def test_masked_weights_are_made_again_for_the_backward(autocast: bool, process_group: None) -> None:
    model = spread(hidden())
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
    ):
        loss = model(torch.randn(4, 1, 8, 8)).sum()
    (watch,) = slots_of(model[4][0])["weight"]._watches
    assert max(saved.untyped_storage().size() for saved in kept) < 2 * 13 * 7 * 36  # no weight of the block is kept
    kept.clear()
    assert watch.freed()  # with the parameters of its block
    assert slots_of(model[4][0])["weight"].ranking._selection is None  # which has the mask
    loss.backward()
    assert watch.over()


def test_a_weight_that_fully_shard_does_not_assign_is_refused(process_group: None) -> None:
    model = spread(hidden())
    with pytest.raises(MaskedWeightError, match="weight of MaskedLinear is masked and cannot be assigned"):
        model[6].weight = nn.Parameter(torch.zeros(5, 11))


def test_scores_of_another_precision_are_refused(process_group: None) -> None:
    model = spread(hidden(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(MaskedWeightError, match="because fully_shard was called with a MixedPrecisionPolicy"):
        model(torch.randn(4, 1, 8, 8))


if __name__ == "__main__":  # one of the processes
    dist.init_process_group("gloo")
    rank_many()
    for each in sys.argv[2:]:
        print(each, file=sys.stderr)  # where a failure shows it
        compare(each, Path(sys.argv[1]))
    dist.destroy_process_group()
