"""The learner `biprop`: signs and one factor for each layer, in training, in files, and in every reader."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from artifact.hostile import Net, apply, attempt, masked, take_apart, top
from masking.layers import check_ten_steps, images, layers_of, raw, reverse, sequential
from popup_surgery import (
    Artifact,
    ArtifactError,
    ConversionError,
    MaskBank,
    Recipe,
    RecipeError,
    bake,
    combine,
    convert,
    export,
    inspect,
    load,
    masks,
    overlap,
    plan,
    repack,
    save,
    set_k,
    start_from,
    train,
    verify,
)
from popup_surgery.selection import kept_count
from popup_surgery.weights.streams import SIGNS, draw
from support import GOLDEN, equal_states, golden_manifest

NORMAL = "kaiming_normal"
GOLDEN_FILE = GOLDEN / "binary.popup.safetensors"


def chosen(score: Tensor, k: float) -> Tensor:
    """The right mask, by a stable sort."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.detach().abs().flatten().argsort(descending=True, stable=True)[: kept_count(score.numel(), k)]] = True
    return mask.view(score.shape)


def binary(weight: Tensor, mask: Tensor) -> Tensor:
    """α · sign(w) · m, by NumPy: α in float64, rounded to float32, and the product to the weight's dtype."""
    kept = weight.detach().float().numpy()[mask.numpy()]
    factor = np.float32(np.abs(kept.astype(np.float64)).sum() / len(kept))
    return torch.where(mask, (weight.detach().sign().float() * torch.tensor(factor)).to(weight.dtype), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [NORMAL, "xavier_uniform", "signed_kaiming_constant", "unsigned_kaiming_constant"])
def test_what_a_layer_computes_with_is_what_a_file_gives(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = sequential().to(dtype)
    net: Any = convert(copy.deepcopy(plain), 0.3, learner="biprop", scheme=scheme)
    for layer in layers_of(net):
        layer.weight_score.data.copy_(reverse(layer.weight_score))
        mask = chosen(layer.weight_score, 0.3)
        assert torch.equal(layer.weight, binary(raw(layer), mask))
        assert not layer.weight.signbit()[~mask].any()
    manifest = save(net, tmp_path / "net", probe=(1, *images().shape[1:]))
    expected = [SIGNS[e] for e in {"kaiming_normal": ["normal"], "xavier_uniform": ["uniform"]}.get(scheme, [])]
    assert manifest.requires == expected
    restored = load(tmp_path / "net", copy.deepcopy(plain))
    assert equal_states(restored, bake(net))
    assert verify(tmp_path / "net", copy.deepcopy(plain))
    packed = load(tmp_path / "net", copy.deepcopy(plain), packed=True)
    with torch.no_grad():
        assert torch.equal(packed(images().to(dtype)), restored(images().to(dtype)))
    again = convert(copy.deepcopy(plain), 0.3, learner="biprop", scheme=scheme)
    start_from(again, tmp_path / "net")
    assert all(torch.equal(mask, masks(net)[key]) for key, mask in masks(again).items())


def test_of_constants_it_is_edge_popup(tmp_path: Path) -> None:
    nets: list[Any] = [convert(sequential(), 0.3, learner=learner) for learner in ("biprop", "edge_popup")]
    for net in nets:
        net(images()).square().sum().backward()
        save(net, tmp_path / type(net[0]).__name__)
    for one, other in zip(*map(layers_of, nets), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.weight_score.grad, other.weight_score.grad)
    files = [save(net, tmp_path / str(i)) for i, net in enumerate(nets)]
    assert files[0].masked == files[1].masked


def test_ten_steps_are_those_of_the_equations() -> None:
    """m is that of edge-popup, and the values are α · sign(w)."""
    check_ten_steps(
        convert(sequential(), 0.3, learner="biprop", scheme=NORMAL),
        lambda scores: [chosen(score, 0.3) for score in scores],
        lambda w, mask: (w.abs() * mask).sum() / mask.sum() * w.sign(),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"scope": "global", "floor": 0.1},
        {"pattern": "2:4", "k": None},
        {"fixed": {"dropped": 0.5, "kept": 0.1}},
        {"k": {"rule": "erk", "k": 0.3}},
    ],
)
def test_what_goes_with_it(settings: dict[str, Any], tmp_path: Path) -> None:
    given: Any = {"k": 0.3, "learner": "biprop", "scheme": NORMAL, **settings}
    net: Any = convert(sequential(), **given)
    for layer, mask in zip(layers_of(net), masks(net).values(), strict=True):
        assert torch.equal(layer.weight, binary(raw(layer), mask))
    manifest = save(net, tmp_path / "net")
    assert manifest.requires == ["fixed"] * ("fixed" in settings) + ["normal_sign"]
    assert equal_states(load(tmp_path / "net", sequential()), bake(net))


def test_the_factor_follows_the_mask_and_k() -> None:
    net: Any = convert(sequential(), 0.3, learner="biprop", scheme=NORMAL)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    found = set()
    for share in (None, 0.1):
        set_k(net, share)
        assert torch.equal(compiled(images()), net(images()))
        found.add(float(net[0].weight.detach().abs().max()))
        assert torch.equal(net[0].weight, binary(raw(net[0]), masks(net)["0.weight"]))
    assert len(found) == 2
    torch._dynamo.reset()


def test_a_layer_that_loses_all_of_its_weights_has_no_factor(tmp_path: Path) -> None:
    net: Any = convert(sequential(), 0.3, learner="biprop", scheme=NORMAL, scope="global")
    net[0].weight_score.data.zero_()
    assert not net[0].weight.any()
    manifest = save(net, tmp_path / "net")
    assert [entry.distribution for entry in manifest.masked] == ["normal", "normal_sign"]
    assert equal_states(load(tmp_path / "net", sequential()), bake(net))


def test_pretrained_weights_are_refused() -> None:
    for verb in (convert, plan):
        with pytest.raises(
            ConversionError, match=r"biprop keeps the signs of normal, uniform or constant weights, and "
        ):
            verb(nn.Linear(4, 4), 0.5, learner="biprop", scheme="pretrained")


def test_its_weights_are_not_drawn_again() -> None:
    with pytest.raises(RecipeError, match=r"surgery\.redraw is .*biprop gives the weights of a layer one magnitude"):
        Recipe.load(GOLDEN / "tiny.yaml", ["surgery.learner=biprop", "surgery.redraw={every: 3}"])


def test_a_run_rebuilds_its_network(tmp_path: Path) -> None:
    ramp = "surgery.k_schedule={kind: cubic, start: 0.9, epochs: 1}"
    overrides = ["surgery.learner=biprop", f"surgery.scheme={NORMAL}", "surgery.scope=global", ramp]
    overrides += ["training.epochs=2", "data.max_train=96"]
    result = train(GOLDEN / "tiny.yaml", overrides=overrides, output=tmp_path / "run")
    assert equal_states(result.model, load(result.file))
    assert verify(result.file)
    assert all(len(np.unique(np.abs(weight[weight != 0]))) == 1 for weight in
               (load(result.file).state_dict()[name].numpy() for name in masks(result.file)))  # fmt: skip


# files


def test_vectors() -> None:
    for vector in json.loads((GOLDEN / "binary.json").read_text(encoding="utf-8"))["vectors"]:
        found = np.concatenate([*draw(vector["distribution"], vector["n"], vector["std"], int(vector["seed"]), "weight",
                                      vector["stream"])])  # fmt: skip
        assert set(np.abs(found).tolist()) == {vector["std"]}
        positive = np.packbits(found > 0, bitorder="little").tobytes()
        assert vector.get("positive", positive.hex()) == positive.hex()
        assert hashlib.sha256(positive).hexdigest() == vector["positive_sha256"]


def test_golden_file() -> None:
    golden = json.loads((GOLDEN / "binary.json").read_text(encoding="utf-8"))["artifact"]
    manifest = golden_manifest(golden)
    assert manifest.requires == ["normal_sign"]
    assert {entry.note["scheme"] for entry in manifest.masked} == {NORMAL}


def test_every_reader_takes_it_or_refuses_it(tmp_path: Path) -> None:
    state = load(GOLDEN_FILE).state_dict()
    assert all(torch.equal(load(GOLDEN_FILE, packed=True).state_dict()[name], value) for name, value in state.items())
    repack(GOLDEN_FILE, tmp_path / "coded", encoding="range_coded")
    assert inspect(tmp_path / "coded").requires == ["range_coded", "normal_sign"]
    repack(tmp_path / "coded", tmp_path / "back", encoding="bitpack")
    assert (tmp_path / "back").read_bytes() == GOLDEN_FILE.read_bytes()
    total = overlap(GOLDEN_FILE, tmp_path / "coded").total
    assert total.kept_both == total.kept_a == total.kept_b
    bank = MaskBank(GOLDEN_FILE)
    for name in ("one", "two"):
        bank.add(name, tmp_path / "coded")
    assert equal_states(bank.use("one"), load(GOLDEN_FILE))
    combine([GOLDEN_FILE, tmp_path / "coded"], "union").write(tmp_path / "union")
    assert equal_states(load(tmp_path / "union"), load(GOLDEN_FILE))


def test_files_of_other_factors_are_refused_by_name(tmp_path: Path) -> None:
    files = []
    for i in range(2):
        net = convert(sequential(), 0.3, learner="biprop", scheme=NORMAL)
        for layer in layers_of(net):
            layer.weight_score.data.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(i)))
        files.append(tmp_path / str(i))
        save(net, files[-1])
    with pytest.raises(ArtifactError, match=r"the std of '0\.weight' is"):
        combine(files, "union")
    bank = MaskBank(files[0], model=sequential())
    with pytest.raises(ArtifactError, match=r"the std of '0\.weight' is"):
        bank.add("other", files[1])


@pytest.mark.slow
def test_packed_exports_hold_it_in_two_bits(tmp_path: Path) -> None:
    net = convert("conv2", 0.25, learner="biprop", scheme=NORMAL)
    save(net, tmp_path / "net", probe=(1, 3, 32, 32))
    done = export(tmp_path / "net", tmp_path / "net.onnx", packed=True)
    assert any(layer.how in ("2 bits", "int8") for layer in done.layers)


@pytest.mark.parametrize(
    "change",
    [
        top(requires=[]),
        top(requires=["uniform_sign"]),
        masked(0, distribution="uniform_sign"),
        masked(0, std=0.0),
        masked(0, distribution="sign"),
        lambda file: file.manifest["generated"][0].update(distribution="normal_sign"),
    ],
)
def test_refused_by_every_reader(change: Any, tmp_path: Path) -> None:
    save(convert(Net(), 0.3, exclude="kept", learner="biprop", scheme=NORMAL), tmp_path / "net")
    file = take_apart((tmp_path / "net").read_bytes())
    assert attempt(tmp_path / "f", file.bytes()).verified
    assert attempt(tmp_path / "f", apply(file, change, digest=False)).refused_at_once


def test_a_changed_factor_is_found(tmp_path: Path) -> None:
    file = take_apart(GOLDEN_FILE.read_bytes())
    (tmp_path / "f").write_bytes(apply(file, masked(0, std=0.5)))
    assert not verify(tmp_path / "f"), "weights_sha256 is over the weights"
    assert Artifact.open(tmp_path / "f").manifest.masked[0].std == 0.5


def test_a_recipe_on_pretrained_weights_is_refused_before_they_are_there() -> None:
    given = ["surgery.scheme=pretrained", "surgery.learner=biprop", "model.pretrained=none.safetensors"]
    with pytest.raises(RecipeError, match=r"surgery\.scheme is pretrained; expected a random one, such as"):
        Recipe.load("digits", given)
