"""A plan is data, made once, and applied whole or not at all."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popup_surgery import Architecture, ConversionError, Plan, build, convert, masks, plan
from popup_surgery.masking import planning
from popup_surgery.masking.apply import apply
from popup_surgery.models.build import build_meta
from popup_surgery.models.libraries import architecture_of

K = 0.4


def net() -> nn.Module:
    """Layers of several kinds, a weight that two modules hold, and a parameter of every rule."""
    torch.manual_seed(0)
    found = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 6, 3),
            "norm": nn.BatchNorm2d(6),
            "words": nn.Embedding(20, 8),
            "lstm": nn.LSTM(8, 8),
            "out": nn.Linear(8, 20),
        }
    )
    found["out"].weight = found["words"].weight
    found.temperature = nn.Parameter(torch.ones(1))
    return found


ASKED: list[dict[str, Any]] = [
    {}, {"k": {"conv": 0.5, "lstm": 1}, "scheme": {"*": "kaiming_normal", "conv": "pretrained"}, "norm": "train"},
    {"scope": "global", "others": "train", "seed": 2**64 - 1}, {"scheme": "pretrained"},
    {"learner": "supermask", "learner_options": {"rescale": True}, "exclude": ["lstm"]},
]  # fmt: skip
asked = pytest.mark.parametrize("given", ASKED, ids=[str(given) for given in ASKED])


def everything(model: nn.Module) -> tuple[Any, ...]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    marks = [(type(module), sorted(vars(module))) for module in model.modules()]
    return state, marks, [parameter.requires_grad for parameter in model.parameters()]


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    equal = one[0].keys() == other[0].keys() and all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    return equal and one[1:] == other[1:]


@asked
def test_a_plan_compares_pickles_and_goes_to_json_and_back(given: dict[str, Any]) -> None:
    planned = plan(net(), **given)
    assert planned == plan(net(), **given)
    assert planned != plan(net(), **{**given, "seed": 6})
    for other in (pickle.loads(pickle.dumps(planned)), Plan.from_json(planned.to_json())):
        assert other == planned
        assert str(other) == str(planned)
    json.loads(planned.to_json(), parse_constant=pytest.fail)
    tied = next(weight for weight in planned.masked if len(weight.owners) > 1)
    assert tied.owners == ("words.weight", "out.weight")


def test_a_plan_is_the_same_on_the_meta_device() -> None:
    name = "timm/vit_tiny_patch16_224"
    assert plan(build_meta(architecture_of(name)), K, seed=3) == plan(build(name), K, seed=3)


@asked
def test_a_plan_from_json_is_applied_to_an_equal_network(given: dict[str, Any]) -> None:
    sent = plan(net(), **given).to_json()
    applied, converted = net(), convert(net(), **given)
    apply(applied, Plan.from_json(sent))
    assert same(everything(applied), everything(converted))
    assert all(torch.equal(mask, masks(converted)[key]) for key, mask in masks(applied).items())
    assert plan(applied) == plan(converted)


def test_what_is_no_plan_is_refused() -> None:
    text = plan(net()).to_json()
    bad = json.loads(text)
    bad["settings"]["k"] = 3
    no_key = json.loads(text)
    del no_key["masked"][0]["key"]
    for wrong in ("", "3", "[]", "{}", json.dumps(no_key), json.dumps(json.loads(text) | {"rest": [1]})):
        with pytest.raises(ConversionError, match=r"^this is not a plan that Plan\.to_json wrote: "):
            Plan.from_json(wrong)
    with pytest.raises(ConversionError, match="k is 3; expected a number above 0"):
        Plan.from_json(json.dumps(bad))


# one planning


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is made, by the one function that walks over a network."""
    made: list[Plan] = []
    real = planning._plan

    def counted(*arguments: Any, **more: Any) -> Plan:
        made.append(real(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(planning, "_plan", counted)
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has pretrained weights for conv2."""
    module = import_module("popup_surgery.masking.convert")
    state = build("conv2", width=0.1).state_dict()

    def with_weights(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        assert pretrained
        model = build(name, **kwargs)
        model.load_state_dict(state)
        return model

    monkeypatch.setattr(module, "build", with_weights)


@pytest.mark.parametrize(
    "model",
    [net, lambda: "conv4", lambda: architecture_of("conv2", width=0.1), lambda: "timm/test_vit"],
    ids=["module", "name", "description", "vit"],
)
def test_a_conversion_plans_once(model: Callable[[], Any], planned: list[Plan]) -> None:
    convert(model(), K)
    assert len(planned) == 1


def test_a_network_that_is_built_again_is_not_planned_again(
    planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is left needs its random values: the network is built in full, and the plan is for that one, too."""
    module = import_module("popup_surgery.masking.convert")
    built, real = [], module.build_architecture

    def counted(described: Architecture) -> nn.Module:
        built.append(described)
        return real(described)

    monkeypatch.setattr(module, "build_architecture", counted)
    model = convert(architecture_of("conv2", width=0.1), K, exclude="features.0", seed=5)
    assert (len(planned), len(built)) == (1, 1)
    torch.manual_seed(5)
    whole = build("conv2", width=0.1)
    assert torch.equal(model.get_parameter("features.0.weight"), whole.get_parameter("features.0.weight"))
    assert masks(model).keys() == masks(convert(whole, K, exclude="features.0", seed=5)).keys()


def test_a_conversion_of_pretrained_weights_plans_once(planned: list[Plan], trained: None) -> None:
    convert(architecture_of("conv2", width=0.1), K, scheme="pretrained")
    assert len(planned) == 1
    assert planned[0].masked[0].distribution == "base"


@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--dry-run", "--json")])
def test_the_command_plans_once(
    extra: tuple[str, ...], planned: list[Plan], cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("convert", "conv2", "--k", K, "-o", tmp_path / "net", *extra)
    assert (done.status, done.err) == (0, "")
    assert len(planned) == 1
    assert (tmp_path / "net").exists() == (not extra)
    if "--json" in extra:
        assert Plan.from_json(done.out) == planned[0] == plan(build("conv2"), K)
    elif extra:
        assert done.out.rstrip("\n") == str(planned[0])
    else:
        assert done.out.startswith(planned[0].totals())


def test_json_is_for_a_plan(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("convert", "conv2", "-o", tmp_path / "net", "--json")
    assert (done.status, done.err) == (2, "error: --json prints the plan; add --dry-run\n")
    assert not list(tmp_path.iterdir())


# applied whole or not at all


def with_a_part_of_inference_mode(part: str) -> nn.Module:
    model = net()
    with torch.inference_mode():
        if part == "bias":
            model["conv"].bias = nn.Parameter(torch.ones(6), requires_grad=False)  # type: ignore[index]
        else:
            model["norm"].running_mean = torch.ones(6)  # type: ignore[index]
    return model


def with_an_expanded_bias() -> nn.Module:
    model = net()
    model["out"].bias = nn.Parameter(torch.ones(1).expand(20))  # type: ignore[index]
    return model


def with_a_score() -> nn.Module:
    model = net()
    model["out"].weight_score = 3  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_a_part_of_inference_mode("bias"), r"conv\.bias was made under torch\.inference_mode"),
        (lambda: with_a_part_of_inference_mode("buffer"), r"running_mean of BatchNorm2d was made under torch\.inf"),
        (with_an_expanded_bias, r"out\.bias is an expanded tensor"),
        (with_a_score, r"out\.weight_score exists already; the score of out\.weight needs that name"),
    ],
    ids=["bias", "buffer", "expanded", "score"],
)
def test_what_cannot_be_changed_is_found_before_the_first_change(model: Callable[[], nn.Module], message: str) -> None:
    found = model()
    before = everything(found)
    with pytest.raises(ConversionError, match=message):
        convert(found)
    assert same(before, everything(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {"masked": (replace(p.masked[0], shape=(6, 1, 3, 4), owners=("conv.weight",)), *p.masked[1:])},
            None,
        ),
        (lambda p: {"masked": (*p.masked, replace(p.masked[0], owners=("conv.kernel",)))}, "the network has nothing"),
        (lambda p: {"rest": (*p.rest[:-1], replace(p.rest[-1], key="gone"))}, "gone: the plan is for .* has nothing"),
        (lambda p: {"rest": (replace(p.rest[0], shape=(7,)), *p.rest[1:])}, r"the plan is for \(7,\), .* has \(6,\)"),
        (lambda p: {"settings": replace(p.settings, learner="nobody")}, "unknown learner 'nobody'"),
    ],
    ids=["shape", "weight", "other", "other's shape", "learner"],
)
def test_a_plan_for_another_network_changes_nothing(
    change: Callable[[Plan], dict[str, Any]], message: str | None
) -> None:
    model = net()
    planned = plan(model)
    before = everything(model)
    if planned.rest[0].shape == (1,):  # the root's own come first
        planned = replace(planned, rest=planned.rest[1:])
    with pytest.raises(
        Exception, match=message or r"conv\.weight: the plan is for \(6, 1, 3, 4\), the network has \(6"
    ):
        apply(model, replace(planned, **change(planned)))
    assert same(before, everything(model))


def test_a_plan_is_not_applied_twice() -> None:
    model = net()
    planned = plan(model)
    apply(model, planned)
    before = everything(model)
    with pytest.raises(ConversionError, match=r"conv\.weight is masked already; the plan was made before"):
        apply(model, planned)
    assert same(before, everything(model))
