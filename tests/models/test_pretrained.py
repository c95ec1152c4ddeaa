"""Masks on pretrained weights: the weights stay, the file refers to them, and a reader with others refuses."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from popup_surgery import (
    ArtifactError,
    ConversionError,
    RecipeError,
    UnknownName,
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
from popup_surgery.masking.state import slots_of
from popup_surgery.weights.fill import values_digest
from popup_surgery.weights.streams import draw
from support import Outcome, equal_states

pytestmark = pytest.mark.usefixtures("no_warnings")

NAME = "timm/test_resnet"
FILE = "subnetwork.popup.safetensors"


def trained(seed: int = 0, **kwargs: Any) -> nn.Module:
    """A network with weights, norms and running statistics of its own."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(trained().state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def raw(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.endswith("_score")}


def test_everything_but_the_mask_stays(weights: Path) -> None:
    plain = build(NAME, pretrained=weights)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = convert(plain, 0.5, scheme="pretrained")
    assert all(torch.equal(value, before[key]) for key, value in raw(model).items())
    for key, mask in masks(model).items():
        assert torch.equal(bake(model).state_dict()[key], torch.where(mask, before[key], 0.0))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{key}_score" for key in masks(model)}


def test_a_head_of_another_size_is_drawn_and_masked(weights: Path, tmp_path: Path) -> None:
    model: Any = build(NAME, pretrained=weights, num_classes=7)
    planned = {weight.key: weight for weight in plan(model, 0.5, scheme="pretrained", seed=5).masked}
    assert {key for key, weight in planned.items() if weight.distribution != "base"} == {"fc.weight"}
    convert(model, 0.5, scheme="pretrained", seed=5)
    slot = slots_of(model.fc)["weight"]
    drawn = next(draw("signed_constant", 7 * int(slot.fan_in), slot.std, 5, "weight", "fc.weight"))
    assert torch.equal(model.fc._parameters["weight"].reshape(-1), torch.from_numpy(drawn))
    assert model.fc.bias.eq(0).all()
    manifest = save(model, tmp_path / FILE)
    assert {entry.distribution for entry in manifest.masked if entry.name == "fc.weight"} == {"signed_constant"}
    assert equal_states(load(tmp_path / FILE, base=weights), bake(model))


def test_schemes_by_pattern(weights: Path) -> None:
    model: Any = build(NAME, pretrained=weights)
    convert(model, scheme={"*": "pretrained", "fc": "kaiming_normal"})
    assert slots_of(model.fc)["weight"].distribution == "normal"
    assert slots_of(model.layer1[0].conv1)["weight"].distribution == "base"


def test_norms_may_learn_for_each_task(weights: Path, tmp_path: Path) -> None:
    model: Any = convert(build(NAME, pretrained=weights), scheme="pretrained", norm="train")
    learn = {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("_score")}
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert learn == {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
    with torch.no_grad():
        model.bn1.weight.add_(1)
    save(model, tmp_path / FILE)
    assert equal_states(load(tmp_path / FILE, base=weights), bake(model))


def test_the_file_names_its_base_and_is_small(weights: Path, tmp_path: Path) -> None:
    model = convert(build(NAME, pretrained=weights), scheme="pretrained")
    save(model, tmp_path / FILE)
    manifest = inspect(tmp_path / FILE)
    base: Any = manifest.base
    assert (base.library, base.name, base.tag, base.version) == ("timm", "test_resnet", "", timm.__version__)
    plain = trained().state_dict()
    assert base.sha256 == values_digest(plain[entry.name] for entry in manifest.masked)
    entry = manifest.text()["masked"][0]
    assert entry["distribution"] == "base"
    assert "std" not in entry
    assert (tmp_path / FILE).stat().st_size < weights.stat().st_size / 8


@pytest.mark.parametrize("how", ["file", "network", "own"])
def test_a_reader_with_the_base_rebuilds_and_one_with_another_refuses(how: str, weights: Path, tmp_path: Path) -> None:
    model = convert(build(NAME, pretrained=weights), 0.4, scheme="pretrained")
    save(model, tmp_path / FILE, probe=(1, 3, 32, 32))
    other = tmp_path / "other.safetensors"
    save_file(trained(1).state_dict(), other)

    def call(verb: Callable[..., Any], seed: int) -> Any:
        if how == "own":
            return verb(tmp_path / FILE, trained(seed))
        return verb(tmp_path / FILE, base=trained(seed) if how == "network" else [weights, other][seed])

    assert equal_states(call(load, 0), bake(model))
    assert call(verify, 0)
    with pytest.raises(ArtifactError, match=r"the masks are for other weights: those of timm/test_resnet with the SHA"):
        call(load, 1)
    assert not call(verify, 1)


def test_what_a_reader_lacks_is_said(weights: Path, tmp_path: Path) -> None:
    save(convert(build(NAME, pretrained=weights), scheme="pretrained"), tmp_path / FILE)
    with pytest.raises(ArtifactError, match=r"weights of timm/test_resnet that no library provides; pass .* as `base`"):
        load(tmp_path / FILE)
    with pytest.raises(ArtifactError, match=r"the base has nothing for 'conv1\.0\.weight'|the base has nothing for"):
        load(tmp_path / FILE, base=nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match=r"the file of weights .* does not exist"):
        load(tmp_path / FILE, base=tmp_path / "none.safetensors")
    convert(random := build(NAME))
    save(random, tmp_path / "random.popup.safetensors")
    with pytest.raises(
        ArtifactError, match="`base` was given, but the file's weights come from its seed; leave out `base`"
    ):
        load(tmp_path / "random.popup.safetensors", base=weights)


def test_a_refused_base_leaves_the_network_as_it_was(weights: Path, tmp_path: Path) -> None:
    save(convert(build(NAME, pretrained=weights), scheme="pretrained"), tmp_path / FILE)
    model = trained(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="other weights"):
        load(tmp_path / FILE, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), r"lacks 'fc\.bias' and 0 more"),
        (lambda state: state.update(more=torch.ones(1)), r"has 'more' and 0 more tensors that the network does not"),
        (
            lambda state: state.update({"bn1.weight": torch.ones(3)}),
            r"'bn1\.weight' of .* and only a layer that can be",
        ),
    ],
)
def test_files_for_another_network_are_refused(change: Callable[..., Any], message: str, tmp_path: Path) -> None:
    state = dict(trained().state_dict())
    change(state)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ConversionError, match=message):
        build(NAME, pretrained=tmp_path / "bad.safetensors")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConversionError, match="has no weights that can be read safely"):
        build(NAME, pretrained=tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown weights of timm/resnet18 'a1_in1m'; the nearest known: a1_in1k"):
        build("timm/resnet18", pretrained="a1_in1m")
    with pytest.raises(ConversionError, match="popup_surgery/conv4 has no pretrained weights"):
        build("conv4", pretrained=True)


# the libraries' own weights, from their own caches


HUB = """
import sys, torch
from popup_surgery import build, convert, load, save, bake, inspect, verify, ArtifactError
out = sys.argv[1]
model = convert(build("timm/test_resnet", pretrained=True, num_classes=3), 0.5, scheme="pretrained")
save(model, out)
base = inspect(out).base
assert base.tag == "r160_in1k", base
loaded = load(out)
expected = bake(model).state_dict()
assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
assert verify(out)
by_name = convert("timm/test_resnet", 0.5, scheme="pretrained")
assert by_name.fc.weight.shape[0] == 1000
print("same")
"""


def cached(home: Path, weights: dict[str, Tensor]) -> None:
    repo = home / "hub" / "models--timm--test_resnet.r160_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    save_file(weights, repo / "snapshots" / "abc" / "model.safetensors")


@pytest.mark.slow
def test_timm_weights_come_from_the_hub_cache(tmp_path: Path) -> None:
    cached(tmp_path / "a", trained(0).state_dict())
    cached(tmp_path / "b", trained(1).state_dict())

    def run(home: str, script: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_HOME": str(tmp_path / home), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", script, str(tmp_path / FILE)]
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)

    first = run("a", HUB)
    assert first.stdout == "same\n", first.stderr
    # the hub's weights under that tag have changed since
    second = run("b", "import sys; from popup_surgery import load; load(sys.argv[1])")
    assert "the masks are for other weights: those of timm/test_resnet r160_in1k" in second.stderr
    third = run("none", "import sys; from popup_surgery import load; load(sys.argv[1])")
    assert "cannot be built with num_classes=3 and the weights r160_in1k" in third.stderr


@pytest.mark.parametrize("classes", [1000, 7])
def test_torchvision_weights_come_from_its_cache(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    plain = torchvision.models.squeezenet1_1()
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    model: Any = build("torchvision/squeezenet1_1", pretrained="IMAGENET1K_V1", num_classes=classes)
    convert(model, 0.5, scheme="pretrained")
    assert torch.equal(model.features[0]._parameters["weight"], plain.features[0].weight)
    assert (slots_of(model.classifier[1])["weight"].distribution == "base") == (classes == 1000)
    save(model, tmp_path / FILE)
    base = inspect(tmp_path / FILE).base
    assert base
    assert base.tag == "IMAGENET1K_V1"
    assert equal_states(load(tmp_path / FILE), bake(model))


def test_a_manifest_whose_base_is_not_in_order_is_refused(weights: Path, tmp_path: Path) -> None:
    from popup_surgery.artifact.manifest import read_manifest
    from popup_surgery.artifact.strict_json import canonical

    save(convert(build(NAME, pretrained=weights), scheme="pretrained"), tmp_path / FILE)
    good = inspect(tmp_path / FILE).text()

    def resealed(change: Callable[[dict[str, Any]], object]) -> str:
        import copy
        import hashlib

        text = copy.deepcopy({key: value for key, value in good.items() if key != "manifest_sha256"})
        change(text)
        digest = hashlib.sha256(canonical(text).encode()).hexdigest()
        return canonical({**text, "manifest_sha256": digest})

    for change, message in [
        (lambda m: m.pop("base"), "has the distribution 'base', and the manifest has no base"),
        (lambda m: m["base"].pop("sha256"), r"no base\.sha256"),
        (lambda m: m["base"].update(tag=3), r"base\.tag is 3; expected a string"),
        (lambda m: m.update(base=[]), r"base is \[\]; expected an object"),
        (lambda m: m["masked"][0].update(std=1.0), r"masked\[0\]\.std is 1\.0; expected none"),
        (lambda m: m["generated"].append({**m["masked"][0], "name": "x"}), r"generated\[0\]\.distribution is 'base'"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            read_manifest(resealed(change))


# recipes


def recipe(weights: Path | None, **surgery: object) -> dict[str, object]:
    return {
        "model": {
            "name": "popup_surgery/conv2",
            "pretrained": str(weights) if weights else False,
            "kwargs": {"img_size": 8, "in_chans": 1, "width": 0.25},
        },
        "surgery": {"k": 0.5, "scaled": False, **surgery} if surgery else "none",
        "data": {"name": "digits"},
        "training": {"epochs": 1, "lr": 0.1},
    }


def test_a_mask_on_ones_own_dense_run(tmp_path: Path) -> None:
    dense = train(recipe(None), output=tmp_path / "dense")
    learnt = train(recipe(dense.file, scheme="pretrained"), output=tmp_path / "mask")
    assert evaluate(learnt.file, base=dense.file).accuracy == learnt.accuracy
    provenance = inspect(learnt.file).provenance
    assert provenance["recipe"]["model"]["pretrained"] == dense.file.name  # its name, and no path
    for key, mask in masks_of(learnt.model, dense.model.state_dict()).items():
        assert mask.float().mean() == pytest.approx(0.5, abs=0.01), key


def masks_of(model: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    state = model.state_dict()
    assert all(torch.equal(state[key], torch.where(state[key] != 0, base[key], 0.0)) for key in state)
    return {key: value != 0 for key, value in state.items()}


def test_recipes_that_contradict_themselves(weights: Path) -> None:
    from popup_surgery import Recipe

    with pytest.raises(
        RecipeError, match=r"surgery\.scheme pretrained needs pretrained weights; set model\.pretrained"
    ):
        Recipe.parse(recipe(None, scheme="pretrained"))
    with pytest.raises(RecipeError, match=r"surgery\.scheme kaiming_normal would overwrite the weights"):
        Recipe.parse(recipe(weights, scheme="kaiming_normal"))


def test_a_head_that_was_trained_stays_if_it_is_named(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "popup_surgery")
    model: Any = build(NAME, pretrained=weights, num_classes=4)
    before = model.fc.weight.detach().clone()
    kept: Any = convert(model, 0.5, scheme={"*": "pretrained", "fc": "pretrained"})
    assert torch.equal(kept.fc._parameters["weight"], before)
    assert not caplog.text
    convert(build(NAME, pretrained=weights, num_classes=4), 0.5, scheme="pretrained")
    assert "replaced the weights of 1 layer with random ones (seed 0)" in caplog.text


def test_a_custom_network_is_verified_on_the_base_that_is_given(weights: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    save(convert(model, scheme="pretrained"), tmp_path / FILE)
    assert "not checked; pass the base with --base" in str(verify(tmp_path / FILE))
    assert verify(tmp_path / FILE, base=tmp_path / "base.safetensors")
    with pytest.raises(ArtifactError, match="the base has nothing for"):
        verify(tmp_path / FILE, base=weights)
    with pytest.raises(ArtifactError, match=r"the file of weights .* does not exist"):
        verify(tmp_path / FILE, base=tmp_path / "none.safetensors")


def test_weights_of_double_precision_are_refused(tmp_path: Path) -> None:
    model = convert(nn.Linear(4, 3).double(), scheme="pretrained")
    with pytest.raises(ArtifactError, match="'weight' is a pretrained weight of float64; cast the network to float32"):
        save(model, tmp_path / FILE)


def test_checkpoints_from_before_batch_norms_counted(tmp_path: Path) -> None:
    state = {key: value for key, value in trained().state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    assert torch.equal(
        build(NAME, pretrained=tmp_path / "old.safetensors").get_parameter("fc.weight"), state["fc.weight"]
    )


def test_torchvision_networks_that_transform_their_input_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.GoogLeNet_Weights.DEFAULT
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    plain = torchvision.models.googlenet(init_weights=False)
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    with pytest.raises(ConversionError, match="torchvision/googlenet transforms its input for IMAGENET1K_V1"):
        build("torchvision/googlenet", pretrained=True)


def test_the_command_line_plans_what_it_writes(
    cli: Callable[..., Outcome], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ("convert", "test_resnet", "--k", 0.3, "--scheme", "pretrained", "--weights", weights, "--num-classes", 10)
    planned = cli(*call, "--dry-run")
    assert planned.status == 0, planned.err
    assert next(line for line in planned.out.splitlines() if line.strip().startswith("fc.weight")).split()[-1] != (
        "pretrained"
    )
    assert "pretrained, scaled" in planned.out
    assert cli(*call, "-o", FILE).status == 0
    assert "signed_constant" in cli("inspect", FILE).out
    assert cli("verify", FILE, "--base", weights).status == 0
    assert "not checked; pass the base with --base" in cli("verify", FILE).out
    missing = cli("verify", FILE, "--base", "nothing.safetensors")
    assert (missing.status, missing.err) == (2, "error: --base is nothing.safetensors, which does not exist\n")
    with pytest.raises(ArtifactError, match=r"model is 3; expected a plain torch\.nn\.Module"):
        load(FILE, 3)  # type: ignore[arg-type]


def test_weights_of_which_none_has_its_size_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "narrow.safetensors"
    save_file(build("popup_surgery/conv2", width=0.25).state_dict(), file)
    with pytest.raises(
        ConversionError, match=r"^no tensor of .*narrow\.safetensors has its size .* build the network with"
    ):
        build("popup_surgery/conv2", pretrained=file)
    assert build("popup_surgery/conv2", pretrained=file, width=0.25) is not None


# names with a tag, and keys with a prefix


TAGGED = [
    "timm/test_resnet.r160_in1k", "test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k",
    "hf_hub:timm/test_resnet.r160_in1k", "https://huggingface.co/timm/test_resnet.r160_in1k",
]  # fmt: skip
BY_TAG = """
import sys
from popup_surgery import build, convert, inspect, save
from popup_surgery.commands import main
from popup_surgery.models.architecture import origin_of
for name, given in zip(sys.argv[2:], [{}, {}, {}, {"pretrained": True}, {"pretrained": "r160_in1k"}]):
    origin = origin_of(build(name, **given))
    assert (origin.architecture.name, origin.base.tag) == ("test_resnet", "r160_in1k"), name
save(convert(name, 0.5, scheme="pretrained"), sys.argv[1])
assert inspect(sys.argv[1]).base.tag == "r160_in1k"
sys.argv = ["popup-surgery", "convert", name, "--scheme", "pretrained"]
print("status", main())
"""


@pytest.mark.slow
def test_a_name_with_a_tag_has_these_weights(tmp_path: Path) -> None:
    cached(tmp_path, trained(0).state_dict())
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BY_TAG, str(tmp_path / FILE), *TAGGED],
        env=env, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.endswith("status 0\n"), done.stderr
    assert "wrote test_resnet.r160_in1k.popup.safetensors, " in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18.a9_in1k", r"unknown weights of timm/resnet18 'a9_in1k'; the nearest known: .*\ba1_in1k"),
        ("timm/rsenet18.a1_in1k", r"unknown architecture 'rsenet18'; the nearest known: .*resnet18"),
        ("torchvision/resnet18.IMAGENET1K_V3", r"unknown weights of torchvision/resnet18 'IMAGENET1K_V3'"),
        ("ResNet18_Weights.IMAGENET1K_V3", r"unknown weights of torchvision/resnet18 'IMAGENET1K_V3'"),
        ("popup_surgery/conv4.best", r"popup_surgery/conv4 has no pretrained weights"),
        ("hf-hub:someone/resnet18", r"is a repository on the Hugging Face Hub; expected one of timm's own"),
    ],
)
def test_a_name_with_a_tag_that_is_none(name: str, message: str) -> None:
    with pytest.raises((UnknownName, ConversionError), match=message):
        build(name)


def test_a_name_with_a_tag_where_its_weights_would_be_lost(cli: Callable[..., Outcome]) -> None:
    with pytest.raises(ConversionError, match=r"pretrained is 'w\.pt'; expected one of them"):
        build("timm/resnet18.a1_in1k", pretrained="w.pt")
    with pytest.raises(ConversionError, match=r"which the scheme \w+ would replace; expected timm/resnet18, or scheme"):
        convert("hf-hub:timm/resnet18.a1_in1k", 0.5)
    with pytest.raises(ConversionError, match=r"weights a1_in1k too; expected the network alone, timm/resnet18"):
        convert(nn.Linear(2, 2), 0.5, architecture="timm/resnet18.a1_in1k")
    told = cli("convert", "resnet18.a1_in1k", "--dry-run")
    assert told.err.endswith("would replace; expected timm/resnet18, or --scheme pretrained\n")


def test_a_recipe_with_a_tag_in_its_networks_name() -> None:
    from popup_surgery import Recipe

    values: Any = recipe(None, scheme="pretrained")
    values["model"] = {"name": "hf-hub:timm/resnet18.a1_in1k"}
    model = Recipe.parse(values).model
    assert (model.name, model.pretrained) == ("timm/resnet18", "a1_in1k")
    values["surgery"]["scheme"] = "kaiming_normal"
    with pytest.raises(RecipeError, match=r"kaiming_normal would overwrite the weights of model\.pretrained"):
        Recipe.parse(values)
    values["model"]["pretrained"] = "other.pt"
    with pytest.raises(RecipeError, match=r"names the pretrained weights a1_in1k, and pretrained is 'other\.pt'"):
        Recipe.parse(values)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "model.backbone.", "net._orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_prefix_that_all_keys_share(prefix: str, suffix: str, weights: Path, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in trained().state_dict().items()}
    file = tmp_path / f"prefixed{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        save_file(state, file)
    model = build(NAME, pretrained=file)
    assert equal_states(model, trained())
    save(convert(model, scheme="pretrained"), tmp_path / FILE)
    assert equal_states(load(tmp_path / FILE, base=file), load(tmp_path / FILE, base=weights))


def test_prefixes_that_only_some_keys_have_are_named(tmp_path: Path) -> None:
    plain = trained().state_dict()
    state = {f"model.{key}": value for key, value in plain.items()} | {"loss.weight": torch.ones(3)}
    save_file(state, tmp_path / "mixed.safetensors")
    with pytest.raises(ConversionError, match=rf"keys there begin with 'model\.' \({len(plain)} of {len(state)}\)"):
        build(NAME, pretrained=tmp_path / "mixed.safetensors")
