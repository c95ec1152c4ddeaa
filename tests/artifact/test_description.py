"""What a file says of its network: a name only where that name builds what was saved, and otherwise why not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from popup_surgery import ArtifactError, bake, build, convert, load, save, verify
from popup_surgery.artifact import inspect
from support import equal_states, slow_except

FILE = "subnetwork.popup.safetensors"
NAME = "timm/test_resnet"


def saved(model: nn.Module, folder: Path, **how: Any) -> tuple[Any, dict[str, Any]]:
    """Convert and save; return the architecture that the file records, and its provenance."""
    save(convert(model, **how), folder / FILE)
    manifest = inspect(folder / FILE)
    return manifest.architecture, manifest.provenance


def outputs(model: nn.Module, channels: int = 3, size: int = 64) -> Tensor:
    parameter = next(model.parameters())
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x.to(parameter.dtype))


# the architecture


def _head(classes: int, pool: str | None = None) -> Callable[[Any], None]:
    return lambda model: model.reset_classifier(classes, pool)


def _new_head(model: Any) -> None:
    model.fc = nn.Linear(model.fc.in_features, 7)


@pytest.mark.parametrize(
    ("mutate", "kwargs"),
    [
        (_head(7), {"num_classes": 7}),
        (_head(0), {"num_classes": 0}),
        (_head(7, "max"), {"num_classes": 7, "global_pool": "max"}),
        (_new_head, {"num_classes": 7}),
    ],
    ids=["head", "no head", "pooling", "a layer"],
)
def test_a_new_head_is_recorded(mutate: Callable[[Any], None], kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = build(NAME)
    mutate(model)
    architecture, provenance = saved(model, tmp_path)
    assert (architecture.library, architecture.name, architecture.kwargs) == ("timm", "test_resnet", kwargs)
    assert "custom" not in provenance
    assert torch.equal(outputs(load(tmp_path / FILE)), outputs(bake(model)))


def test_a_network_that_differs_is_custom_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build("timm/resnet18", num_classes=10)
    model.maxpool = nn.Identity()
    architecture, provenance = saved(model, tmp_path)
    why = "it is not timm/resnet18: maxpool is an Identity, not a MaxPool2d"
    assert (architecture.library, architecture.name) == ("custom", "ResNet")
    assert provenance["custom"] == why
    assert why in caplog.text
    with pytest.raises(ArtifactError, match=r"custom \(ResNet\).*maxpool is an Identity.*as `model`"):
        load(tmp_path / FILE)
    fresh: Any = build("timm/resnet18", num_classes=10)
    fresh.maxpool = nn.Identity()
    assert torch.equal(outputs(load(tmp_path / FILE, fresh)), outputs(bake(model)))


def test_a_wrong_name_is_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture, provenance = saved(torchvision.models.resnet18(), tmp_path, architecture="timm/resnet18")
    assert architecture.library == "custom"
    assert "torchvision.models.resnet.ResNet, not timm.models.resnet.ResNet" in provenance["custom"]
    caplog.clear()
    architecture, _ = saved(torchvision.models.resnet18(), tmp_path, architecture="torchvision/resnet18")
    assert architecture.library == "torchvision"
    assert "custom" not in caplog.text


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 4, "in_chans": 2}, {"global_pool": "max"}])
def test_timms_own_networks_are_recorded_by_name(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", **kwargs)
    architecture, _ = saved(model, tmp_path)
    assert (architecture.library, architecture.name, architecture.kwargs) == ("timm", "test_resnet", kwargs)
    channels = kwargs.get("in_chans", 3)
    assert torch.equal(outputs(load(tmp_path / FILE), channels), outputs(bake(model), channels))


def test_an_input_size_is_recorded(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=64)
    architecture, _ = saved(model, tmp_path)
    assert architecture.kwargs == {"img_size": [64, 64]}
    assert torch.equal(outputs(load(tmp_path / FILE)), outputs(bake(model)))


def test_without_a_name_the_warning_says_how_to_give_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(torchvision.models.resnet18(), tmp_path)
    assert "architecture='timm/resnet50'" in caplog.text


# dtypes


def _norms_in_float32(model: nn.Module) -> None:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.float()


@pytest.mark.parametrize("name", slow_except([NAME, "timm/test_vit", "timm/swin_tiny_patch4_window7_224"], [NAME]))
@pytest.mark.parametrize(
    "cast",
    [_norms_in_float32, lambda m: m.get_submodule("fc" if hasattr(m, "fc") else "head").half(), nn.Module.double],
    ids=["norms", "head", "double"],
)
def test_networks_of_several_dtypes_load(name: str, cast: Callable[[Any], Any], tmp_path: Path) -> None:
    model = convert(build(name))
    cast(model)
    save(model, tmp_path / FILE)
    loaded, plain = load(tmp_path / FILE), bake(model)
    assert equal_states(loaded, plain)
    buffers = dict(loaded.named_buffers())
    assert all(
        torch.equal(value, buffers[key]) for key, value in plain.named_buffers() if key not in plain.state_dict()
    )
    assert {key: value.dtype for key, value in buffers.items()} == {k: v.dtype for k, v in plain.named_buffers()}
    assert verify(tmp_path / FILE)


@pytest.mark.slow
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [NAME, "timm/vit_small_patch16_rope_224"])
def test_the_files_dtypes_count_whatever_the_default(name: str, default: torch.dtype, tmp_path: Path) -> None:
    model = convert(build(name))
    save(model, tmp_path / FILE)
    plain = bake(model)
    torch.set_default_dtype(default)
    try:
        loaded = load(tmp_path / FILE)
        assert verify(tmp_path / FILE)
        save(model, tmp_path / "again")
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal_states(loaded, plain)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in plain.named_buffers())
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


# what a module keeps outside its parameters and buffers


class Counting(nn.Module):
    """Keeps a tensor in its extra state, whose shape depends on what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.seen = torch.zeros(0)

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state.clone()


class Rescaled(nn.Module):
    """Saves its buffer in other units, and converts it back when it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("range", torch.ones(3))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}range"] = destination[f"{prefix}range"] * 100

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(
            {**state_dict, f"{prefix}range": state_dict[f"{prefix}range"] / 100}, prefix, *rest
        )


def test_an_extra_state_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(), Counting())
    model[0].seen, model[1].seen = torch.tensor([3.0, 4.0, 5.0]), torch.full((2, 2), 7)
    save(convert(model), tmp_path / FILE)
    loaded: Any = load(tmp_path / FILE, nn.Sequential(Counting(), Counting()))
    assert torch.equal(loaded[0].seen, model[0].seen)
    assert torch.equal(loaded[1].seen, model[1].seen)
    assert loaded[1].seen.dtype == torch.int64
    assert equal_states(loaded, bake(model))


def test_a_module_loads_its_state_its_own_way(tmp_path: Path) -> None:
    model: Any = Rescaled()
    model.range.copy_(torch.tensor([0.5, 2.0, 8.0]))
    save(convert(model), tmp_path / FILE)
    loaded: Any = load(tmp_path / FILE, Rescaled())
    assert torch.equal(loaded.range, model.range)
    assert torch.equal(loaded.fc.weight, bake(model).get_parameter("fc.weight"))


def test_an_extra_state_that_the_module_refuses(tmp_path: Path) -> None:
    class Strict(Counting):
        def set_extra_state(self, state: Tensor) -> None:
            raise ValueError(f"{len(state)} values are too many")

    model = Counting()
    model.seen = torch.arange(9.0)
    save(convert(model), tmp_path / FILE)
    with pytest.raises(ArtifactError, match=r"does not take '_extra_state' of the file: .*9 values are too many"):
        load(tmp_path / FILE, Strict())


# weights that moved by rounding


def _average(model: nn.Module) -> None:
    for value in model.state_dict().values():
        if value.is_floating_point():
            for _ in range(10):
                own = value.clone()
                value.mul_(0.9).add_(0.1 * own)


def _federate(model: nn.Module) -> None:
    states = [copy.deepcopy(model.state_dict()) for _ in range(5)]
    model.load_state_dict({k: (sum(s[k] for s in states) / 5).to(v.dtype) for k, v in states[0].items()})


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "average": _average,
    "federated": _federate,
    "half": lambda model: model.half().float(),
    "bfloat16": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "kaiming_normal", "kaiming_uniform"])
@pytest.mark.parametrize("move", MOVES)
def test_weights_within_rounding_are_the_seeds(
    move: str, scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact, moved = convert(build(NAME), scheme=scheme), convert(build(NAME), scheme=scheme)
    MOVES[move](moved)
    for mine, theirs in zip(moved.buffers(), exact.buffers(), strict=True):
        theirs.copy_(mine)
    for (name, mine), theirs in zip(moved.named_parameters(), exact.parameters(), strict=True):
        if name.endswith("_score"):
            theirs.data.copy_(mine)
    caplog.clear()
    save(moved, tmp_path / FILE, probe=(2, 3, 64, 64))
    assert told(caplog) or all(torch.equal(a, b) for a, b in zip(moved.parameters(), exact.parameters(), strict=True))
    assert verify(tmp_path / FILE)
    weights = {entry.name for entry in inspect(tmp_path / FILE).masked}
    loaded, plain = load(tmp_path / FILE).state_dict(), bake(exact).state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in weights)


def told(caplog: pytest.LogCaptureFixture) -> bool:
    return "which is within rounding" in caplog.text


def test_what_really_changed_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model: Any = convert(build(NAME), 0.3, seed=4)
    with torch.no_grad():
        model.fc._parameters["weight"][0, 0] += 0.25
        for name, parameter in model.named_parameters():
            if name.endswith("_score"):
                parameter.normal_()
    with pytest.raises(ArtifactError, match=r"'fc.weight' are not those of seed 4.* by up to 0.25.* end in _score"):
        save(model, tmp_path / FILE)
    assert not (tmp_path / FILE).exists()
    new = convert(build(NAME), 0.3, seed=4)
    new.load_state_dict({n: t for n, t in model.state_dict().items() if n.endswith("_score")}, strict=False)
    save(new, tmp_path / FILE)
    assert torch.equal(
        load(tmp_path / FILE).state_dict()["fc.weight"].ne(0), bake(model).get_parameter("fc.weight").ne(0)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-6])
def test_no_other_value_passes_for_rounding(value: float, tmp_path: Path) -> None:
    model: Any = convert(build(NAME))
    with torch.no_grad():
        model.fc._parameters["weight"][0, 0] = value
    with pytest.raises(ArtifactError, match="not those of seed 0"):
        save(model, tmp_path / FILE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


@pytest.mark.parametrize("move", MOVES)
def test_pretrained_weights_within_rounding_are_the_bases(
    move: str, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact, model = (convert(build(NAME, pretrained=weights), scheme="pretrained") for _ in range(2))
    MOVES[move](model)
    caplog.clear()
    save(model, tmp_path / FILE, probe=(2, 3, 64, 64))
    assert "the pretrained weights of" in caplog.text
    assert told(caplog)
    assert verify(tmp_path / FILE, base=weights)
    loaded, plain = load(tmp_path / FILE, base=weights).state_dict(), bake(exact).state_dict()
    kept = inspect(tmp_path / FILE).masked[3].name
    assert torch.equal(loaded[kept][loaded[kept] != 0], plain[kept][loaded[kept] != 0])


@pytest.mark.parametrize("own", [False, True], ids=["from a file", "the user's own"])
def test_a_base_that_changed_is_one_of_its_own(
    own: bool, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = timm.create_model("test_resnet") if own else build(NAME, pretrained=weights)
    model: Any = convert(plain, scheme="pretrained")
    with torch.no_grad():
        model.fc._parameters["weight"].add_(0.1)
    save(model, tmp_path / FILE)
    assert "the pretrained weights have changed since conversion" in caplog.text
    base = inspect(tmp_path / FILE).base
    assert base is not None
    assert base.tag == ""
    with pytest.raises(ArtifactError, match="masks are for other weights"):
        load(tmp_path / FILE, base=weights)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    assert equal_states(load(tmp_path / FILE, base=tmp_path / "base.safetensors"), bake(model))


def test_a_cast_of_a_base_is_no_change(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = convert(build(NAME, pretrained=weights), scheme="pretrained").bfloat16()
    caplog.clear()
    save(model, tmp_path / FILE)
    assert caplog.text == ""
    assert equal_states(load(tmp_path / FILE, base=weights), bake(model))


# entries that a hook replaces


def test_copies_that_a_hook_puts_into_the_state_dict_are_the_masked_weights(tmp_path: Path) -> None:
    def network() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        model.register_state_dict_post_hook(
            lambda m, state, prefix, rest: state.update({k: v.clone() for k, v in state.items()})
        )
        return model

    model = convert(network(), 0.5)
    manifest = save(model, tmp_path / FILE)
    assert [entry.name for entry in manifest.masked] == ["0.weight", "2.weight"]
    assert equal_states(load(tmp_path / FILE, network()), bake(model))


def test_a_hook_that_changes_a_masked_weight_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_state_dict_post_hook(
        lambda m, state, prefix, rest: state.update({"0.weight": state["0.weight"] * 2})
    )
    with pytest.raises(ArtifactError, match=r"state_dict has another 0\.weight: a hook"):
        save(convert(model), tmp_path / FILE)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.l1_unstructured(layer, "weight_score", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer, "weight_score"),
    ],
    ids=["prune", "parametrised"],
)
def test_what_computes_a_score_is_not_saved(compute: Callable[[Any], object], root: bool, tmp_path: Path) -> None:
    model: Any = convert(nn.Linear(8, 8) if root else nn.Sequential(nn.Linear(8, 8)), 0.5)
    layer = model if root else model[0]
    compute(layer)
    save(model, tmp_path / FILE)
    loaded: Any = load(tmp_path / FILE, nn.Linear(8, 8) if root else nn.Sequential(nn.Linear(8, 8)))
    assert torch.equal((loaded if root else loaded[0]).weight, layer.weight)


def test_a_network_to_fill_whose_tensors_overlap_is_refused(tmp_path: Path) -> None:
    save(convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), tmp_path / FILE)
    tied: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = nn.Parameter(tied[0].weight.t())
    with pytest.raises(ArtifactError, match=r"'0\.weight' and '1\.weight' of the network to fill share memory"):
        load(tmp_path / FILE, tied)


def test_a_counter_of_another_integer_dtype_comes_back(tmp_path: Path) -> None:
    model: Any = convert(build(NAME))
    model.bn1.num_batches_tracked = model.bn1.num_batches_tracked.int()
    save(model, tmp_path / FILE)
    assert equal_states(load(tmp_path / FILE), bake(model))
