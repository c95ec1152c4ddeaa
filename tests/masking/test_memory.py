"""Parameters that share memory without being one Parameter."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from popup_surgery import ConversionError, convert, plan
from popup_surgery.masking.memory import overlapping, overlaps_itself

SHARED = r"{} shares memory with {} and is not the same Parameter.*give both the same Parameter, or.*clone\(\)"


def tied(make: Callable[[Tensor], Tensor], second: str = "weight", first: str = "weight", **sizes: Any) -> Any:
    """An encoder and a decoder, of which one parameter of the second is made of one of the first."""
    net: Any = nn.ModuleDict(
        {"encoder": nn.Linear(6, 4), "decoder": nn.Linear(**{"in_features": 4, "out_features": 6} | sizes)}
    )
    held = getattr(net["encoder"], first).detach()
    setattr(net["decoder"], second, nn.Parameter(make(held)))
    return net


def another_storage(weight: Tensor) -> Tensor:
    return torch.frombuffer(memoryview(weight.numpy().data).cast("B"), dtype=torch.float32).view(6, 4)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "t()": lambda: tied(lambda w: w.t()),
    "the same values": lambda: tied(lambda w: w, in_features=6, out_features=4),
    "view": lambda: tied(lambda w: w.view(6, 4)),
    "a slice": lambda: tied(lambda w: w[1:3], in_features=6, out_features=2),
    "a column": lambda: tied(lambda w: w[:, 2:3], in_features=1, out_features=4),
    "every other one": lambda: tied(lambda w: w[::2, ::3], in_features=2, out_features=2),
    "as_strided": lambda: tied(lambda w: w.as_strided((2, 2), (7, 5)), in_features=2, out_features=2),
    "through NumPy": lambda: tied(lambda w: torch.from_numpy(w.numpy()).t()),
    "another storage": lambda: tied(another_storage),
    "a bias of a weight": lambda: tied(lambda w: w.view(-1)[:6], second="bias"),
    "a weight of a bias": lambda: tied(lambda b: b.view(4, 1), first="bias", in_features=1, out_features=4),
    "a bias of a bias": lambda: tied(lambda b: b[:3], second="bias", first="bias", out_features=3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", [plan, convert])
def test_shared_memory_is_refused_when_planning(way: str, verb: Callable[..., Any]) -> None:
    net = WAYS[way]()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ConversionError, match=SHARED.format(r"\w+\.(weight|bias)", r"\w+\.(weight|bias)")):
        verb(net)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert all(type(layer) is nn.Linear for layer in net.children())


@pytest.mark.parametrize("options", [{"exclude": "decoder"}, {"exclude": "encoder"}])
def test_memory_shared_with_what_stays_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=r"coder\.weight shares memory with"):
        plan(tied(lambda w: w.t()), **options)


def test_shared_memory_is_seen_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = tied(lambda w: w.t())
        plan(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    with pytest.raises(ConversionError, match=r"decoder\.weight shares memory with encoder\.weight"):
        plan(net)


def test_a_plan_made_elsewhere_is_not_applied_to_shared_memory() -> None:
    from popup_surgery.masking.apply import apply

    net = tied(lambda w: w.t())
    planned = plan(nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6)}))
    with pytest.raises(ConversionError, match="shares memory"):
        apply(net, planned)


def test_a_layer_that_comes_later_must_not_share_a_masked_weights_memory() -> None:
    net: Any = convert(nn.ModuleDict({"encoder": nn.Linear(6, 4)}))
    for name in ("weight", "weight_score"):
        net["later"] = nn.Linear(4, 6)
        net["later"].weight = nn.Parameter(net["encoder"]._parameters[name].detach().t())
        with pytest.raises(ConversionError, match=rf"later\.weight shares memory with encoder\.{name}"):
            convert(net)


def test_one_parameter_in_two_places_and_neighbours_in_one_storage_are_no_overlap() -> None:
    one: Any = nn.ModuleDict({"encoder": nn.Linear(6, 6), "decoder": nn.Linear(6, 6)})
    one["decoder"].weight = one["encoder"].weight
    assert [weight.owners for weight in plan(one).masked] == [("encoder.weight", "decoder.weight")]
    flat = torch.randn(60)
    neighbours: Any = nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(5, 6)})
    neighbours["a"].weight, neighbours["b"].weight = (
        nn.Parameter(flat[:30].view(6, 5)),
        nn.Parameter(flat[30:].view(6, 5)),
    )
    columns = flat.view(6, 10)
    assert len(plan(neighbours).masked) == 2
    neighbours["a"].weight, neighbours["b"].weight = nn.Parameter(columns[:, :5]), nn.Parameter(columns[:, 5:])
    assert len(plan(neighbours).masked) == 2
    neighbours["b"].weight = nn.Parameter(columns[:, 4:9])
    with pytest.raises(ConversionError, match=r"a\.weight shares memory with b\.weight"):
        plan(neighbours)


def test_what_nobody_writes_to_may_share_memory() -> None:
    net: Any = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3), "c": nn.Linear(3, 4)})
    net["b"].weight = nn.Parameter(net["a"].weight.detach().t())
    assert [weight.key for weight in plan(net, include="c").masked] == ["c.weight"]
    pretrained = plan(net, scheme="pretrained")
    assert len(pretrained.masked) == 3, "their values stay"


def test_overlapping_agrees_with_numpy() -> None:
    rng, flat = np.random.default_rng(0), torch.arange(40.0)
    for _ in range(200):
        views = [
            flat.as_strided(
                tuple(rng.integers(1, 4, 2).tolist()), tuple(rng.integers(1, 8, 2).tolist()), int(rng.integers(0, 12))
            )
            for _ in range(4)
        ]
        marked = [set(view.reshape(-1).tolist()) for view in views]
        expected = {(i, j) for i in range(4) for j in range(i + 1, 4) if marked[i] & marked[j]}
        assert set(overlapping(views)) == expected
        for view, elements in zip(views, marked, strict=True):
            assert overlaps_itself(view) or len(elements) == view.numel()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 6).expand(4, 6),
        lambda: torch.randn(4, 1).expand(4, 6),
        lambda: torch.randn(10).as_strided((4, 6), (1, 1)),
        lambda: torch.randn(20).unfold(0, 6, 2)[:4],
    ],
)
def test_a_tensor_whose_own_elements_share_memory_is_refused(make: Callable[[], Tensor]) -> None:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(make())
    with pytest.raises(
        ConversionError, match=r"weight is an expanded tensor, whose elements share memory; make it con"
    ):
        convert(layer)
    layer.weight = nn.Parameter(layer.weight.detach().contiguous())
    convert(layer)


def test_a_buffer_that_shares_a_weights_memory() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("copy", model[0].weight.data[0])
    with pytest.raises(ConversionError, match=r"0\.weight shares memory with copy"):
        plan(model)
