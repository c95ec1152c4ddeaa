"""What `train` names, and new heads under piggyback: not masked, trained, and stored in full."""

import copy
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popup_surgery import (
    ConversionError,
    NothingToConvert,
    Recipe,
    RecipeError,
    bake,
    build,
    convert,
    evaluate,
    inspect,
    load,
    masks,
    plan,
    save,
    train,
    verify,
)
from popup_surgery.errors import Stopped
from popup_surgery.masking.plan import Plan
from popup_surgery.masking.unmasked import FRESH, FROZEN, NAMED
from support import equal_states

NAME = "timm/test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(model.state_dict(), file)
    return file


def with_head(weights: Path) -> Any:
    torch.manual_seed(7)
    return build(NAME, pretrained=weights, num_classes=3)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def learning(model: nn.Module) -> set[str]:
    """What is trained besides the scores."""
    return {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("_score")}


def step(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Train all that requires a gradient for one step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(shape, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()


# patterns


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("4", {"4.weight", "4.bias"}),
        ("4.*", {"4.weight", "4.bias"}),
        (["4.bias"], {"4.bias"}),
        ("4.weight", {"4.weight"}),
        ("*.bias", {"0.bias", "1.bias", "4.bias"}),
        (["1", "4.bias"], {"1.weight", "1.bias", "4.bias"}),
        ([], set()),
        (None, set()),
    ],
)
@pytest.mark.parametrize("learner", ["edge_popup", "piggyback", "dnw"])
def test_what_is_named_is_trained(patterns: Any, expected: set[str], learner: str, tmp_path: Path) -> None:
    model, before = net(), net().state_dict()
    planned = plan(model, learner=learner, train=patterns)
    convert(model, learner=learner, train=patterns)
    assert learning(model) == expected == {other.key for other in planned.rest if other.train}
    masked = {"0.weight", "4.weight"} - expected
    assert masks(model).keys() == masked
    for key in expected & {"4.weight"}:
        assert torch.equal(model.state_dict()[key], before[key]), "its values stay"
    assert model[0].bias.eq(0).all(), "others start as they always do"
    assert ("4.weight" in expected and "4.bias" in expected) == (patterns in ("4", "4.*"))
    assert Plan.from_json(planned.to_json()) == planned
    if learner == "dnw":
        return
    step(model, (2, 3, 6, 6))
    changed = {key for key in expected if not torch.equal(model.state_dict()[key], before[key])}
    assert changed == expected
    save(model, tmp_path / "file", probe=(1, 3, 6, 6))
    assert equal_states(load(tmp_path / "file", net()), bake(model))
    assert verify(tmp_path / "file", net())


def test_a_layer_that_train_names_is_not_refilled_and_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "popup_surgery")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400))
    planned = plan(model, train="1")
    convert(model, train="1")
    assert "not masked" not in caplog.text
    assert "0.weight" in caplog.text
    assert planned.coverage.missed == {}
    assert planned.coverage.of_weights == 1
    assert planned.coverage.total == 20 + 2000
    assert "of which 2,000 are trained" in planned.totals()
    assert NAMED.why in str(planned)
    convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400)), exclude="1")
    assert "99 % of the weights are not masked: 1.weight" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": "fd"}, r"train has 'fd', which matches no parameter; nearest: "),
        ({"train": ["4", "4.wight"]}, r"train has '4\.wight', which matches no parameter; nearest: 4\.weight"),
        ({"train": 4}, r"train is 4; expected glob patterns on module and parameter names"),
        ({"train": [4]}, r"train is \[4\]; expected glob patterns on module and parameter names"),
        ({"train": "*_score"}, r"train has '\*_score', which matches no parameter"),
        ({"train": "1.running_mean"}, r"train has '1\.running_mean', which matches no parameter"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    model = net()
    with pytest.raises(ConversionError, match=says):
        convert(model, **settings)
    assert type(model[0]) is nn.Conv2d


def test_nothing_left_to_mask_is_refused() -> None:
    for train_, include in (("*", None), (["0", "4"], None), ("4", "4")):
        with pytest.raises(NothingToConvert, match="all that could be masked is trained, because train names it"):
            convert(net(), train=train_, include=include)


def test_what_is_masked_already_is_refused() -> None:
    model = net()
    convert(model[4])
    with pytest.raises(ConversionError, match=r"train has '4', and 4\.weight is masked already; bake its layer first"):
        convert(model, train="4")
    convert(model, train="4.bias")
    assert learning(model) == {"4.bias"}


def test_what_a_part_trains_stays_trained_in_the_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 3), net())
    convert(model[1], train="4")
    convert(model)
    assert learning(model) == {"1.4.weight", "1.4.bias"}
    assert masks(model).keys() == {"0.weight", "1.0.weight"}


def test_train_with_the_other_arguments() -> None:
    everything = set(dict(net().named_parameters()))
    assert learning(convert(net(), others="train", train="4")) == everything - {"0.weight"}
    assert learning(convert(net(), norm="train", train="4.bias")) == {"1.weight", "1.bias", "4.bias"}
    # what is left out of the conversion can be trained all the same
    model = convert(net(), exclude="4", train="4")
    assert learning(model) == {"4.weight", "4.bias"}
    assert masks(model).keys() == {"0.weight"}
    model = convert(net(), include="0", train="4.weight")
    assert (learning(model), masks(model).keys()) == ({"4.weight"}, {"0.weight"})
    # and it is not masked, whatever else is said of it
    model = convert(net(), include="*", k={"4": 0.7}, scheme={"4": "kaiming_normal"}, train="4")
    assert masks(model).keys() == {"0.weight"}
    model = convert(net(), 0.5, scope="global", train="4")
    assert sum(int(mask.sum()) for mask in masks(model).values()) == 54


def test_what_came_frozen_is_trained_if_train_names_it() -> None:
    model = net()
    model.append(nn.Linear(5, 5))
    for index in (1, 4):
        model[index].requires_grad_(False)
    planned = plan(model, train=["4"])
    assert [other.key for other in planned.rest if other.treatment == FROZEN] == ["1.weight", "1.bias"]
    convert(model, train="4")
    assert learning(model) == {"4.weight", "4.bias"}
    convert(model)
    assert learning(model) == {"4.weight", "4.bias"}
    with pytest.raises(ConversionError, match="train='4', which '5' cannot change"):
        convert(model, train="5")


def test_a_frozen_backbone_with_a_head_that_learns_is_masked() -> None:
    model = net()
    model[0].requires_grad_(False)
    convert(model, train="4")
    assert (learning(model), masks(model).keys()) == ({"4.weight", "4.bias"}, {"0.weight"})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mid, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, images: Tensor) -> Any:
        return self.decoder(self.mid(self.encoder(images)))


@pytest.mark.parametrize("name", ["encoder", "decoder.weight"])
def test_a_shared_weight_is_trained_if_one_of_its_names_is_named(name: str, tmp_path: Path) -> None:
    model = convert(Tied(), train=name)
    assert "encoder.weight" in learning(model)
    assert masks(model).keys() == {"mid.weight"}
    step(model, (2, 4))
    convert(model)
    assert masks(model).keys() == {"mid.weight"}
    save(model, tmp_path / "file")
    assert equal_states(load(tmp_path / "file", Tied()), bake(model))


def test_a_frozen_shared_weight_stays_when_the_network_is_completed(tmp_path: Path) -> None:
    model = Tied()
    model.encoder.weight.requires_grad_(False)
    convert(model)
    save(model, tmp_path / "file")
    convert(model)
    assert masks(model).keys() == {"mid.weight"}


def test_parts_of_attention_and_recurrent_layers() -> None:
    model: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "lstm": nn.LSTM(3, 4)})
    convert(model, train=["attn.in_proj_weight", "lstm.weight_hh_l0"])
    assert learning(model) == {"attn.in_proj_weight", "lstm.weight_hh_l0"}
    assert masks(model).keys() == {"attn.out_proj.weight", "lstm.weight_ih_l0"}
    model["lstm"](torch.randn(2, 1, 3))[0].sum().backward()
    assert model["lstm"].weight_hh_l0.grad is not None


def test_a_named_network_is_initialised_where_train_names_it(tmp_path: Path) -> None:
    both = [convert("conv2", train="classifier.5", seed=3) for _ in range(2)]
    assert equal_states(*both)
    weight = both[0].get_parameter("classifier.5.weight")
    assert weight.std() > 0
    save(both[0], tmp_path / "file")
    assert equal_states(load(tmp_path / "file"), bake(both[0]))


# layers without pretrained weights


@pytest.mark.parametrize("settings", [{}, {"learner": "piggyback"}, {"exclude": "fc"}, {"include": "layer*"}])
def test_a_new_head_is_trained_and_stored(settings: Any, weights: Path, tmp_path: Path) -> None:
    model, before = with_head(weights), with_head(weights).state_dict()
    planned = plan(model, scheme="pretrained", **settings)
    assert {other.key for other in planned.rest if other.treatment == FRESH} == {"fc.weight", "fc.bias"}
    convert(model, scheme="pretrained", **settings)
    assert learning(model) == {"fc.weight", "fc.bias"}
    assert "fc.weight" not in masks(model)
    assert all(mask.all() for mask in masks(model).values())
    assert equal_states(bake(model), with_head(weights)), "the network starts as it came"
    step(model, (2, 3, 32, 32))
    assert not torch.equal(model.fc.weight, before["fc.weight"])
    manifest = save(model, tmp_path / "file")
    assert manifest.base
    assert {entry.distribution for entry in manifest.masked} == {"base"}
    assert equal_states(load(tmp_path / "file", base=weights), bake(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"train": []},
        {"train": "bn1"},
        {"include": "*"},
        {"include": ["layer*", "fc"]},
        {"learner": "piggyback", "scheme": {"*": "pretrained", "fc": "kaiming_normal"}},
        {"k": 0.5},
        {"learner": "supermask"},
        {"k": 0.5, "learner": "edge_popup"},
    ],
)
def test_a_new_head_is_masked_if_something_says_so(
    settings: Any, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "popup_surgery")
    model = convert(with_head(weights), **{"scheme": "pretrained", **settings})
    assert "fc.weight" in masks(model)
    assert learning(model) == ({"bn1.weight", "bn1.bias"} if settings.get("train") else set())
    assert "replaced the weights of 1 layer with random ones (seed 0): fc.weight" in caplog.text


def test_a_new_head_beside_norms_that_learn(weights: Path) -> None:
    model = convert(with_head(weights), scheme="pretrained", norm="train")
    assert {"fc.weight", "fc.bias", "bn1.weight"} < learning(model)
    model = convert(with_head(weights), scheme="pretrained", train=["fc", "bn1"])
    assert learning(model) == {"fc.weight", "fc.bias", "bn1.weight", "bn1.bias"}


def test_a_head_on_a_frozen_backbone_and_a_head_that_came_frozen(weights: Path) -> None:
    probe = with_head(weights)
    for name, parameter in probe.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    convert(probe, scheme="pretrained")
    assert learning(probe) == {"fc.weight", "fc.bias"}
    assert "layer1.0.conv1.weight" in masks(probe)
    model = with_head(weights)
    model.fc.requires_grad_(False)
    planned = plan(model, scheme="pretrained")
    assert {other.key for other in planned.rest if other.treatment == FROZEN} == {"fc.weight", "fc.bias"}
    model = with_head(weights).requires_grad_(False)
    assert learning(convert(model, scheme="pretrained")) == {"fc.weight", "fc.bias"}


def test_a_head_that_comes_later_is_trained_and_stored(weights: Path, tmp_path: Path) -> None:
    model: Any = convert(build(NAME, pretrained=weights), scheme="pretrained")
    assert "fc.weight" in masks(model)
    model.reset_classifier(4)
    convert(model)
    assert learning(model) == {"fc.weight", "fc.bias"}
    assert learning(convert(model)) == {"fc.weight", "fc.bias"}
    step(model, (2, 3, 32, 32))
    save(model, tmp_path / "file")
    assert equal_states(load(tmp_path / "file", base=weights), bake(model))
    masked: Any = convert(build(NAME, pretrained=weights), 0.5, scheme="pretrained")
    masked.reset_classifier(4)
    assert "fc.weight" in masks(convert(masked))
    drawn: Any = convert(build(NAME), learner="piggyback")
    drawn.reset_classifier(4)
    assert "fc.weight" in masks(convert(drawn)), "no layer of this network has pretrained weights"


def test_copies_keep_what_is_trained(weights: Path, tmp_path: Path) -> None:
    model = convert(with_head(weights), scheme="pretrained")
    again = copy.deepcopy(model)
    assert learning(convert(again)) == {"fc.weight", "fc.bias"}
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert learning(convert(loaded)) == {"fc.weight", "fc.bias"}
    save(loaded, tmp_path / "file")


# the command line


def test_the_command_line(cli: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ("convert", "test_resnet", "--scheme", "pretrained", "--weights", weights, "--num-classes", 3)
    planned = cli(*call, "--dry-run")
    assert "stays, trained" in next(line for line in planned.out.splitlines() if line.startswith(" fc.weight"))
    assert "piggyback" in planned.out
    for file in ("a", "b"):
        assert cli(*call, "-o", file).status == 0
    assert Path("a").read_bytes() == Path("b").read_bytes(), "the new head follows from the seed"
    assert "fc.weight" not in {entry.name for entry in inspect("a").masked}
    masked = cli(*call, "--train", "bn1", "--train", "*.bias", "-o", "c")
    assert masked.status == 0, masked.err
    assert "fc.weight" in {entry.name for entry in inspect("c").masked}
    assert "edge_popup" in cli(*call, "--k", 0.5, "--dry-run").out
    assert "edge_popup" in cli(*call, "--learner", "edge_popup", "--dry-run").out
    wrong = cli(*call, "--train", "fcc")
    assert (wrong.status, wrong.out) == (2, "")
    assert wrong.err.startswith("error: train has 'fcc', which matches no parameter; nearest: fc")


# recipes

CONV2 = {"name": "popup_surgery/conv2", "kwargs": {"img_size": 8, "in_chans": 1, "width": 0.25}}


def recipe(base: Path, **surgery: Any) -> dict[str, Any]:
    return {
        "model": {**CONV2, "pretrained": str(base)},
        "surgery": {"scheme": "pretrained", "scaled": False, **surgery},
        "data": {"name": "digits", "batch_size": 32, "max_train": 960, "max_validation": 200},
        "training": {"epochs": 2, "optimizer": "adam", "lr": 0.003},
    }


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conv2 that was trained on the digits, whose head has another size."""
    folder = tmp_path_factory.mktemp("features")
    dense = {**recipe(folder), "model": CONV2, "surgery": "none", "training": {"epochs": 5, "lr": 0.05}}
    state = {**train(dense, output=folder / "dense").model.state_dict()}
    head = list(state)[-1]
    state[head] = state[head][:4].clone()
    save_file(state, folder / "features.safetensors")
    return folder / "features.safetensors"


def test_a_run_on_pretrained_weights_trains_the_mask_and_a_new_head(features: Path, tmp_path: Path) -> None:
    through = train(recipe(features), output=tmp_path / "through")
    assert through.accuracy > 0.8
    manifest = inspect(through.file)
    head = str(list(through.model.state_dict())[-1])
    assert head in load_file(through.file)
    assert len(manifest.masked) == 4
    assert head not in {entry.name for entry in manifest.masked}
    assert 0 < manifest.kept < manifest.weights
    assert manifest.provenance["recipe"]["surgery"]["learner"] == "piggyback"
    assert evaluate(through.file, base=features).accuracy == through.accuracy
    assert equal_states(load(through.file, base=features), through.model)

    def after(epoch: Any) -> None:
        if epoch.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(recipe(features), output=tmp_path / "run", after_epoch=after)
    again = train(recipe(features), output=tmp_path / "run", resume=True)
    assert again.file.read_bytes() == through.file.read_bytes()
    explicit = recipe(features, learner="piggyback", k=None, train=None)
    assert train(explicit, output=tmp_path / "run", resume=True).file == again.file, "the same run"


def test_a_run_trains_what_the_recipe_names(features: Path, tmp_path: Path) -> None:
    named = recipe(features, k=0.5, train=["*.weight"])
    with pytest.raises(NothingToConvert, match="train names it"):
        train(named, output=tmp_path / "none")
    with pytest.raises(ConversionError, match="train has 'hed', which matches no parameter"):
        train(recipe(features, k=0.5, train="hed"), output=tmp_path / "hed")
    head = list(load_file(features))[-1]
    result = train(recipe(features, k=0.5, train=head), output=tmp_path / "run")
    manifest = inspect(result.file)
    assert head not in {entry.name for entry in manifest.masked}
    assert manifest.kept / manifest.weights == pytest.approx(0.5, abs=0.01)
    assert evaluate(result.file, base=features).accuracy == result.accuracy


def test_a_recipe_takes_its_learner_from_its_scheme() -> None:
    found = Recipe.parse(recipe(Path("x.safetensors")))
    assert found.surgery.learner == "piggyback"  # type: ignore[union-attr]
    assert found.dump()["surgery"] | {"k": None, "learner": "piggyback", "train": None} == found.dump()["surgery"]
    assert Recipe.parse(found.dump()) == found
    plain = found.model_dump(exclude_unset=True)
    assert "learner" not in plain["surgery"], "so a k that is set afterwards gives edge_popup"
    with_k = Recipe.parse(recipe(Path("x.safetensors"), k=0.5))
    assert with_k.surgery.learner == "edge_popup"  # type: ignore[union-attr]
    assert Recipe.parse(with_k.dump()) == with_k
    for surgery, says in (
        ({"scaled": True}, r"surgery\.scaled is true; expected false; piggyback takes no k"),
        ({"scope": "global"}, r"surgery\.scope is 'global'; expected \"layer\"; piggyback takes no k"),
        ({"learner": "edge_popup"}, r"surgery\.k is missing"),
        ({"scheme": {"*": "pretrained"}}, r"surgery\.k is missing"),
        ({"train": 3}, r"surgery\.train is 3; expected a string, a list of strings, or null"),
        ({"trian": "fc"}, r"surgery\.trian is not a key of a recipe; nearest: train"),
    ):
        with pytest.raises(RecipeError, match=says):
            Recipe.parse(recipe(Path("x.safetensors"), **surgery))
