"""plan looks, convert does what the plan says, bake ends in plain layers; and what each refuses."""

import copy
import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from popup_surgery import ConversionError, NothingToConvert, UnknownName, bake, build, convert, masks, plan
from popup_surgery.masking.layer import is_masked
from popup_surgery.masking.walk import unwrap
from popup_surgery.weights import SCHEMES, register_scheme
from popup_surgery.weights.streams import draw, draw_scores
from support import Scope, numpy_state

OPTIONS = [
    {},
    {"k": 0.5, "scheme": "kaiming_normal", "scaled": False, "seed": 9},
    {"scope": "global"},
    {"k": {"layer1.*": 0.7}, "include": "*conv*", "exclude": ["layer3"]},
]


def small() -> nn.Sequential:
    """Two convolutions with a norm between them, a nested head, and parameters that no layer owns."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.GroupNorm(2, 6)),
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 8, 5)),
    )


LAYERS = ["0", "3.0", "3.1", "4.1"]


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def digest(model: nn.Module) -> dict[str, str]:
    state = model.state_dict()
    return {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in state.items()}


def everything(model: nn.Module) -> tuple[object, ...]:
    modules = [(name, id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]
    return digest(model), modules, parameters, model.training


def masked_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_masked(module)]


def values(pieces: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(pieces)))


# plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_plan_touches_nothing(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet10t", num_classes=5, in_chans=1)
    model.conv1[0].weight.requires_grad_(False)
    before, state = everything(model), torch.get_rng_state()
    planned = plan(model, **options)
    assert str(planned)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_prints_every_layer_and_what_is_left_with_the_reason() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=32, init_values=1e-5)
    model.query = nn.Parameter(torch.zeros(3))
    planned = plan(model, 0.5)
    text = str(planned)
    rows = [line.split() for line in text.splitlines()]
    for weight in planned.masked:
        row = next(row for row in rows if row and row[0] == weight.key)
        assert row[1] == weight.layer
        assert f"{weight.numel:,}" in row
        assert f"{weight.kept:,}" in row
        assert f"{weight.fan_in:g}" in row
        assert f"{weight.std:.5g}" == row[-1]
    for other in planned.rest:
        line = next(line for line in text.splitlines() if line.split()[:1] == [other.key])
        assert other.treatment.why in line
    found = [*(weight.key for weight in planned.masked), *(other.key for other in planned.rest)]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert planned.totals() in text
    assert f"{len(planned.masked)} layers masked, {planned.weights:,} weights, {planned.kept:,} kept (50.0%)" in text


def test_plan_of_a_long_name_loses_nothing() -> None:
    model = nn.Module()
    inner = model
    for _ in range(12):
        inner.a_rather_long_module_name = nn.Module()
        inner = inner.a_rather_long_module_name
    inner.layer = nn.Linear(3, 4)
    planned = plan(model)
    assert planned.masked[0].key in str(planned).replace("\n", "")


@pytest.mark.parametrize(
    ("name", "kwargs", "layers", "weights"),
    [
        ("popup_surgery/conv2", {}, 5, 4_300_992),
        ("popup_surgery/conv4", {}, 7, 2_425_024),
        ("popup_surgery/conv6", {}, 9, 2_261_184),
        ("popup_surgery/conv8", {}, 11, 5_275_840),
        ("popup_surgery/fc", {}, 3, 266_200),
        ("timm/resnet50", {}, 54, 25_502_912),
        ("timm/resnet101", {}, 105, 44_442_816),
        ("timm/wide_resnet50_2", {}, 54, 68_814_016),
        ("torchvision/resnet50", {}, 54, 25_502_912),
    ],
)
def test_totals_of_the_papers_networks_on_meta(name: str, kwargs: dict[str, Any], layers: int, weights: int) -> None:
    with torch.device("meta"):
        model = build(name, **kwargs)
    planned = plan(model, 0.3)
    assert len(planned.masked) == layers
    assert planned.weights == weights
    assert planned.kept == sum(n - int((1 - 0.3) * n) for n in (math.prod(w.shape) for w in planned.masked))
    assert f"{layers} layers masked, {weights:,} weights" in planned.totals()
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())


def test_plan_and_convert_agree() -> None:
    model = small()
    planned = plan(model, 0.4)
    convert(model, 0.4)
    assert {weight.key: weight.kept for weight in planned.masked} == {k: int(m.sum()) for k, m in masks(model).items()}
    assert [weight.shape for weight in planned.masked] == [tuple(mask.shape) for mask in masks(model).values()]


def test_global_plan_keeps_the_share_of_the_whole() -> None:
    model = small()
    total = plan(model, 0.4, scope="global").weights
    convert(model, 0.4, scope="global")
    assert sum(int(mask.sum()) for mask in masks(model).values()) == total - int((1 - 0.4) * total)


# what convert does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scaled", [True, False])
def test_weights_and_scores_are_their_streams(scheme: str, scaled: bool) -> None:
    model = small()
    planned = plan(model, 0.25, scheme=scheme, scaled=scaled, seed=5)
    convert(model, 0.25, scheme=scheme, scaled=scaled, seed=5)
    distribution = {"constant": "constant", "normal": "normal", "uniform": "uniform"}[scheme.split("_")[-1]]
    if distribution == "constant":
        distribution = f"{scheme.split('_')[0]}_constant"
    state = model.state_dict()
    assert [f"{name}.weight" for name in LAYERS] == [weight.key for weight in planned.masked]
    for weight in planned.masked:
        expected = values(draw(distribution, weight.numel, weight.std, 5, "weight", weight.key))
        assert torch.equal(state[weight.key].reshape(-1), expected)
        scores = values(draw_scores(weight.numel, weight.fan_in, 5, weight.key))
        assert torch.equal(state[f"{weight.key}_score"].reshape(-1), scores)
        assert scores.abs().max() <= 1 / math.sqrt(weight.fan_in)


FANS = {  # fan_in, fan_out
    "linear": (nn.Linear(6, 5), 6, 5),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), 2 * 3, 3 * 6),
    "conv2d": (nn.Conv2d(4, 6, (3, 5)), 4 * 15, 6 * 15),
    "conv3d": (nn.Conv3d(2, 3, 2), 2 * 8, 3 * 8),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), 9, 9),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_standard_deviation_by_scheme(scheme: str, kind: str) -> None:
    layer, fan_in, _ = FANS[kind]
    groups = getattr(layer, "groups", 1)
    area = math.prod(getattr(layer, "kernel_size", (1,)))
    outputs: Any = getattr(layer, "out_channels", None) or layer.out_features
    fan_out = outputs * area  # as torch.nn.init counts it, which knows nothing of groups
    expected = math.sqrt((1 if "lecun" in scheme else 2) / (fan_in + fan_out if "xavier" in scheme else fan_in))
    assert plan(layer, 0.16, scheme=scheme, scaled=False).masked[0].std == pytest.approx(expected, rel=1e-14)
    assert plan(layer, 0.16, scheme=scheme).masked[0].std == pytest.approx(expected * 2.5, rel=1e-14)
    assert plan(layer, 0.16).masked[0].fan_in == fan_in, groups


def test_fan_in_of_a_depthwise_and_of_a_transposed_convolution() -> None:
    assert plan(FANS["depthwise"][0]).masked[0].fan_in == 9
    transposed = nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2)  # each output sums 3 channels × 16 / 4 taps
    assert plan(transposed).masked[0].fan_in == 12


def test_kaiming_normal_has_its_spread_and_constants_have_both_signs() -> None:
    layer = convert(nn.Linear(400, 300), 0.25, scheme="kaiming_normal", scaled=False)
    weight = layer.state_dict()["weight"]
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert abs(float(weight.mean())) < 1e-3
    constant = convert(nn.Linear(400, 300), 0.25).state_dict()["weight"]
    assert set(constant.abs().unique().tolist()) == {np.float32(2 * math.sqrt(2 / 400)).item()}
    assert 0.49 < float((constant > 0).float().mean()) < 0.51
    unsigned = convert(nn.Linear(4, 3), 0.5, scheme="unsigned_kaiming_constant", scaled=False).state_dict()["weight"]
    assert set(unsigned.unique().tolist()) == {np.float32(math.sqrt(0.5)).item()}


def test_biases_norms_and_statistics_start_anew_and_all_is_frozen() -> None:
    model: Any = small()
    model(images())  # fills the running statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert model[1].num_batches_tracked == 1
    convert(model)
    assert not any(model.get_submodule(name).bias.any() for name in LAYERS)
    for norm in (model[1], model[3][2]):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()
    assert not model[1].running_mean.any()
    assert torch.equal(model[1].running_var, torch.ones(8))
    assert model[1].num_batches_tracked == 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{name}.weight_score" for name in LAYERS]


def test_dead_branches_come_alive() -> None:
    resnet = convert(timm.create_model("resnet10t", num_classes=5, in_chans=1))
    norms = [module.weight for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in norms)
    convnext = convert(timm.create_model("convnext_atto", num_classes=5))
    scales = [p for name, p in convnext.named_parameters() if name.endswith("gamma")]
    assert scales
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)


def test_positions_and_tokens_come_from_the_seed() -> None:
    def vit(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5, img_size=32)

    first, second, other = convert(vit(1), seed=3), convert(vit(2), seed=3), convert(vit(1), seed=4)
    for key in ("pos_embed", "cls_token"):
        tensor = first.state_dict()[key]
        expected = values(draw("normal", tensor.numel(), 0.02, 3, "other", key))
        assert torch.equal(tensor.reshape(-1), expected)
        assert torch.equal(tensor, second.state_dict()[key])
        assert not torch.equal(tensor, other.state_dict()[key])


def test_converted_in_place_and_returned() -> None:
    model, layer = small(), nn.Linear(3, 4)
    assert convert(model) is model
    assert convert(layer) is layer
    assert masked_names(model) == LAYERS
    assert is_masked(layer)
    assert list(masks(layer)) == ["weight"]


def test_the_global_random_state_changes_nothing_and_is_left_alone() -> None:
    def converted(seed: int) -> dict[str, str]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        model = small()
        states = torch.get_rng_state(), numpy_state(), random.getstate()
        convert(model, seed=11)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert numpy_state() == states[1]
        assert random.getstate() == states[2]
        return digest(model)

    threads = torch.get_num_threads()
    first = converted(1)
    torch.set_num_threads(2)
    try:
        assert converted(2) == first
    finally:
        torch.set_num_threads(threads)
    assert digest(convert(small(), seed=12)) != first


def test_seeds_of_every_size_and_kind() -> None:
    of = lambda seed: digest(convert(nn.Linear(4, 4), seed=seed))  # noqa: E731
    assert of(2**64 - 1) != of(0)
    assert of(np.int64(3)) == of(3)


def test_a_submodule_alone() -> None:
    model = small()
    before = digest(model)
    part = model[3]
    assert convert(part) is part
    assert masked_names(model) == ["3.0", "3.1"]
    after = digest(model)
    assert {key: after[key] for key in before if not key.startswith("3.")} == {
        key: value for key, value in before.items() if not key.startswith("3.")
    }
    assert model[0].weight.requires_grad
    twin = convert(small()[3])  # streams are named from the root of the conversion
    assert digest(part) == digest(twin)
    assert model(images()).shape == (2, 5)


def test_wrappers_are_looked_through() -> None:
    plain = convert(small())
    wrapped = nn.DataParallel(small())
    assert convert(wrapped) is wrapped
    assert unwrap(wrapped) is wrapped.module
    assert digest(wrapped.module) == digest(plain)
    compiled: Any = torch.compile(small(), backend="eager")
    assert convert(compiled) is compiled
    assert digest(unwrap(compiled)) == digest(plain)
    assert list(masks(wrapped)) == list(masks(compiled)) == [f"{name}.weight" for name in LAYERS]
    inner: Any = torch.compile(small(), backend="eager")
    both = nn.DataParallel(inner)
    convert(both)
    assert digest(inner._orig_mod) == digest(plain)
    assert type(bake(both)) is nn.Sequential
    assert plan(nn.DataParallel(small())).masked[0].key == "0.weight"


def test_low_precision_networks_get_the_rounded_weights_and_float32_scores() -> None:
    exact, half = convert(small(), scheme="kaiming_normal"), convert(small().bfloat16(), scheme="kaiming_normal")
    for name in LAYERS:
        assert torch.equal(half.state_dict()[f"{name}.weight"], exact.state_dict()[f"{name}.weight"].bfloat16())
        assert torch.equal(half.state_dict()[f"{name}.weight_score"], exact.state_dict()[f"{name}.weight_score"])


# k, include, exclude ---------------------------------------------------------------------------------------------


def shares(**options: Any) -> dict[str, float | None]:
    return {weight.key.removesuffix(".weight"): weight.k for weight in plan(small(), **options).masked}


def test_k_by_pattern_the_last_match_wins_and_the_default_stays() -> None:
    assert shares(k={"3": 0.5}) == {"0": 0.3, "3.0": 0.5, "3.1": 0.5, "4.1": 0.3}
    assert shares(k={"3": 0.5, "3.1": 0.9}) == {"0": 0.3, "3.0": 0.5, "3.1": 0.9, "4.1": 0.3}
    assert shares(k={"3.1": 0.9, "3": 0.5}) == {"0": 0.3, "3.0": 0.5, "3.1": 0.5, "4.1": 0.3}
    assert shares(k={"*": 0.6, "0": 1}) == {"0": 1, "3.0": 0.6, "3.1": 0.6, "4.1": 0.6}
    assert shares(k={"?.1": 0.2}) == {"0": 0.3, "3.0": 0.3, "3.1": 0.2, "4.1": 0.2}
    assert shares() == shares(k={}) == dict.fromkeys(LAYERS, 0.3)


def test_a_star_that_comes_last_wins_too() -> None:
    assert shares(k={"0": 1.0, "*": 0.6}) == dict.fromkeys(LAYERS, 0.6)


def test_k_by_pattern_reaches_masks_and_widths() -> None:
    model = convert(small(), {"0": 1.0, "4.*": 0.5})
    assert masks(model)["0.weight"].all()
    assert masks(model)["4.1.weight"].sum() == 6 * 8 * 8 * 5 // 2
    assert float(model.state_dict()["4.1.weight"].abs().max()) == pytest.approx(math.sqrt(2 / 384) * math.sqrt(2))


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, LAYERS),
        ("3", None, ["3.0", "3.1"]),
        ("3.*", None, ["3.0", "3.1"]),
        (["0", "4"], None, ["0", "4.1"]),
        (None, "3", ["0", "4.1"]),
        (None, ["0", "3.1"], ["3.0", "4.1"]),
        ("*.1", None, ["3.1", "4.1"]),
        ("3", "3.0", ["3.1"]),
        ("[03]*", ["?.1"], ["0", "3.0"]),
    ],
)
def test_include_and_exclude(include: list[Any] | str | None, exclude: list[Any] | str | None, left: list[Any]) -> None:
    model = convert(small(), include=include, exclude=exclude)
    assert masked_names(model) == left
    assert list(masks(model)) == [f"{name}.weight" for name in left]


def test_what_is_excluded_stays_as_it_was_but_frozen() -> None:
    model: Any = small()
    before = copy.deepcopy(model[4][1])
    convert(model, exclude="4")
    assert type(model[4][1]) is nn.Linear
    assert torch.equal(model[4][1].weight, before.weight)
    assert torch.equal(model[4][1].bias, before.bias)
    assert not model[4][1].weight.requires_grad


# bake, masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_bake_is_a_plain_copy(scope: Scope) -> None:
    fresh = small()
    model = convert(small(), 0.4, scope=scope)
    model(images())
    before = everything(model)
    plain: Any = bake(model)
    assert everything(model) == before
    assert list(plain.state_dict()) == list(fresh.state_dict())
    for (name, module), (twin_name, twin) in zip(plain.named_modules(), fresh.named_modules(), strict=True):
        assert name == twin_name
        assert type(module) is type(twin)
        assert sorted(vars(module)) == sorted(vars(twin)), name
    for name, parameter in plain.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.is_leaf
    for key, mask in masks(model).items():
        assert torch.equal(plain.get_parameter(key) != 0, mask)
    model.eval()
    assert torch.equal(plain.eval()(images()), model(images()))
    assert plain[1].num_batches_tracked == 1


def test_bake_shares_no_memory() -> None:
    model = convert(small())
    plain = bake(model)

    def pointers(net: nn.Module) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}

    assert not pointers(model) & pointers(plain)
    before = digest(model)
    torch.optim.SGD(plain.parameters(), lr=1.0).zero_grad()
    plain(images()).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    assert digest(model) == before


def test_bake_with_every_weight_kept_shares_no_memory_either() -> None:
    model: Any = convert(nn.Linear(3, 4), 1.0)
    plain: Any = bake(model)
    plain.weight.data.zero_()
    assert model.weight.all()


def test_bake_of_networks_with_generated_tensors_leaves_nothing_behind() -> None:
    def vit() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5, img_size=32)

    fresh, plain = vit(), bake(convert(vit()))
    for (name, module), twin in zip(plain.named_modules(), fresh.modules(), strict=True):
        assert sorted(vars(module)) == sorted(vars(twin)), name
    assert "popup_surgery" not in str({type(module).__mro__ for module in plain.modules()})


def test_a_baked_network_can_be_converted_again() -> None:
    plain = bake(convert(small()))
    assert digest(convert(plain, seed=4)) == digest(convert(small(), seed=4))


def test_bake_of_a_plain_network_is_a_copy() -> None:
    model = small()
    plain = bake(model)
    assert plain is not model
    assert digest(plain) == digest(model)


def test_masks_are_copies_by_key() -> None:
    model = convert(small(), 0.4)
    found = masks(model)
    assert list(found) == [f"{name}.weight" for name in LAYERS]
    for key, mask in found.items():
        assert mask.dtype == torch.bool
        assert mask.shape == model.state_dict()[key].shape
        assert mask.sum() == mask.numel() - int(0.6 * mask.numel())
        mask.fill_(False)
    assert all(mask.any() for mask in masks(model).values())
    with pytest.raises(ConversionError, match=r"the Linear has no masked weight, .*; expected the network that"):
        masks(nn.Linear(2, 2))


# what it says ----------------------------------------------------------------------------------------------------


def test_a_foreign_network_is_warned_of_its_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "popup_surgery"):
        convert(small(), seed=42)
    (record,) = [record for record in caplog.records if "with random ones" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "4 layers" in record.getMessage()
    assert "seed 42" in record.getMessage()


def test_a_built_network_is_told_quietly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "popup_surgery"):
        convert(build("conv2", width=0.1))
    (record,) = [record for record in caplog.records if "with random ones" in record.getMessage()]
    assert record.levelno == logging.INFO


def test_plan_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "popup_surgery"):
        plan(small())
    assert not caplog.records


# bad input -------------------------------------------------------------------------------------------------------


REFUSED = [
    ({"k": 0}, ConversionError, r"k is 0; expected a number above 0 and up to 1"),
    ({"k": 1.2}, ConversionError, r"k is 1\.2; expected a number above 0 and up to 1"),
    ({"k": -0.3}, ConversionError, r"k is -0\.3; expected"),
    ({"k": math.nan}, ConversionError, r"k is nan; expected a number above 0 and up to 1"),
    ({"k": math.inf}, ConversionError, r"k is inf; expected"),
    ({"k": True}, ConversionError, r"k is True; expected a number"),
    ({"k": "0.3"}, ConversionError, r"k is '0\.3'; expected a number"),
    ({"k": {"0": 1.2}}, ConversionError, r"k for '0' is 1\.2; expected a number above 0 and up to 1"),
    ({"k": {"0": math.nan}}, ConversionError, r"k for '0' is nan; expected"),
    ({"k": {"0": True}}, ConversionError, r"k for '0' is True; expected"),
    ({"k": {"4.2": 0.5}}, ConversionError, r"k has '4\.2', which matches no layer; nearest: 4\.1"),
    ({"k": 1e-17}, ConversionError, r"k=1e-17 keeps none of the 216 weights of 0\.weight"),
    ({"k": {"3.1": 1e-17}}, ConversionError, r"k=1e-17 keeps none of the 96 weights of 3\.1\.weight"),
    ({"k": 1e-17, "scope": "global"}, ConversionError, r"k=1e-17 keeps none of the network's 2,376 weights"),
    ({"k": {"0": 0.5}, "scope": "global"}, ConversionError, r"scope='global' .* takes one k"),
    ({"include": "layer1.*"}, ConversionError, r"include has 'layer1\.\*', which matches no layer; nearest: "),
    ({"exclude": ["0", "3.9"]}, ConversionError, r"exclude has '3\.9', which matches no layer; nearest: 3\.[01]"),
    ({"include": "3", "exclude": "3"}, NothingToConvert, r"include='3' and exclude='3' leave none of the 4 layers"),
    ({"exclude": "*"}, NothingToConvert, r"leave none of the 4 layers"),
    ({"include": []}, NothingToConvert, r"include=\[\] .* leave none of the 4 layers"),
    ({"scheme": "kaiming_norm"}, UnknownName, r"unknown scheme 'kaiming_norm'; the nearest known: kaiming_normal"),
    ({"learner": "edgepopup"}, UnknownName, r"unknown learner 'edgepopup'; the nearest known: edge_popup"),
    ({"seed": -1}, ConversionError, r"seed is -1; expected an integer from 0 to 2\*\*64 - 1"),
    ({"seed": 2**64}, ConversionError, r"seed is 18446744073709551616; expected an integer"),
    ({"seed": 1.0}, ConversionError, r"seed is 1\.0; expected an integer"),
    ({"seed": True}, ConversionError, r"seed is True; expected an integer"),
    ({"scope": "network"}, ConversionError, r"scope is 'network'; expected 'layer' or 'global'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[str(options) for options, _, _ in REFUSED])
@pytest.mark.parametrize("verb", [plan, convert])
def test_bad_options_are_refused_and_nothing_is_lost(
    verb: Callable[..., Any], options: dict[str, Any], error: type, message: str
) -> None:
    model = small()
    before = everything(model)
    with pytest.raises(error, match=message) as caught:
        verb(model, **options)
    assert "\n" not in str(caught.value)
    assert everything(model) == before


def test_the_nearest_schemes_are_at_most_three() -> None:
    with pytest.raises(UnknownName) as caught:
        plan(small(), scheme="kaiming")
    assert 1 <= len(str(caught.value).rpartition(": ")[2].split(", ")) <= 3


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("timm/resnet5O", r"unknown architecture 'resnet5O'.*resnet50"),
        ("tim/resnet50", r"unknown library 'tim'.*timm"),
    ],
)
def test_an_unknown_architecture_is_refused_before_anything_changes(architecture: str, message: str) -> None:
    model = small()
    before = everything(model)
    with pytest.raises(UnknownName, match=message):
        convert(model, architecture=architecture)
    assert everything(model) == before


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.BatchNorm2d(3), nn.Embedding(3, 4), nn.Module()])
def test_nothing_to_swap(model: nn.Module) -> None:
    with pytest.raises(NothingToConvert, match=rf"{type(model).__name__} has no layer whose weight could be masked"):
        convert(model)


def test_converting_twice() -> None:
    model = convert(small(), k=0.5, seed=3)
    before = digest(model)
    assert convert(model) is model  # nothing came into it since
    assert convert(model, k=0.5, seed=3) is model
    with pytest.raises(ConversionError, match=r"converted with seed=3, which 4 cannot change; bake it"):
        convert(model, seed=4)
    with pytest.raises(ConversionError, match=r"converted with k=0\.5, which 0\.3 cannot change"):
        plan(model, k=0.3)
    assert digest(model) == before
    assert plan(model).masked == ()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_have_no_shape_yet() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    with pytest.raises(ConversionError, match=r"1 is lazy and has no shape yet; pass one batch"):
        convert(model)
    assert type(model[0]) is nn.Linear
    model(torch.zeros(1, 3))
    assert masked_names(convert(model)) == ["0", "1"]


def test_a_scheme_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'kaiming_normal' is registered already"):
        register_scheme("kaiming_normal", SCHEMES["kaiming_normal"])
