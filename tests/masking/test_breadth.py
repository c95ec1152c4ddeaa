"""What is out there in architectures, a test for each kind of thing: it fails when its handling is taken out."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import CondConv2d, ScaledStdConv2d, StdConv2d
from timm.utils import reparameterize_model
from torch import Tensor, nn

from popup_surgery import (
    ArtifactError,
    ConversionError,
    MaskedWeightError,
    bake,
    build,
    convert,
    load,
    masks,
    plan,
    save,
)
from popup_surgery.masking.layer import is_masked
from popup_surgery.masking.ranking import score_name
from popup_surgery.masking.state import slots_of
from popup_surgery.selection import kept_count
from popup_surgery.weights.streams import draw
from support import Scope, slow_except

pytestmark = pytest.mark.usefixtures("no_warnings")

TINY_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
TINY_SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}


def vit(**kwargs: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY_VIT, **kwargs})


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def right(module: Any, name: str) -> Tensor:
    """The weight that the network should compute with, by a stable sort of its scores."""
    slot: Any = slots_of(module)[name]
    weight = module._parameters[name].detach()
    score = module._parameters[score_name(name)].detach().reshape(-1)
    kept = score.abs().argsort(descending=True, stable=True)[: kept_count(score.numel(), slot.k)]
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(weight.shape), weight, 0.0)


def values(distribution: str, tensor: Tensor, std: float, seed: int, purpose: str, stream: str) -> Tensor:
    pieces = [torch.from_numpy(piece) for piece in draw(distribution, tensor.numel(), std, seed, purpose, stream)]
    return torch.cat(pieces).view(tensor.shape)


# subclasses with a forward of their own


@pytest.mark.parametrize("cls", [StdConv2d, ScaledStdConv2d])
def test_weight_standardisation_acts_on_the_masked_weight(cls: type[StdConv2d] | type[ScaledStdConv2d]) -> None:
    layer: Any = convert(cls(4, 6, 3, padding=1), 0.5)
    x = noise(2, 4, 5, 5)
    weight = right(layer, "weight")
    assert masks(layer)["weight"].float().mean() == 0.5  # density is the mask's, not the standardised weight's
    flat: Any = weight.reshape(6, -1)
    variance, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
    scale = layer.scale if cls is ScaledStdConv2d else 1.0
    standardised = ((flat - mean) / (variance + layer.eps).sqrt() * scale).view_as(weight)
    torch.testing.assert_close(layer(x), F.conv2d(x, standardised, layer.bias, padding=1))


def test_the_gain_of_a_scaled_convolution_is_a_scale() -> None:
    layer = ScaledStdConv2d(4, 6, 3)
    nn.init.zeros_(layer.gain)
    planned = plan(layer)
    assert [weight.key for weight in planned.masked] == ["weight"]
    assert convert(layer).get_parameter("gain").eq(1).all()
    assert layer(noise(1, 4, 5, 5)).abs().sum() > 0


@pytest.mark.parametrize("name", ["Conv2dSame", "Linear"])
def test_layers_of_timm_keep_their_class(name: str) -> None:
    cls = getattr(timm.layers, name)
    layer = convert(cls(4, 6, 3, stride=2) if name == "Conv2dSame" else cls(4, 6))
    assert isinstance(layer, cls)
    assert is_masked(layer)
    x = noise(2, 4, 7, 7) if name == "Conv2dSame" else noise(2, 4)
    torch.testing.assert_close(layer(x), bake(layer)(x))


# weights that neither conv nor linear owns


def recurrent(cls: type, **kwargs: object) -> nn.Module:
    return cls(6, 5, batch_first=True, **kwargs)


PACKED = {
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), ("in_proj_weight",)),
    "attention of three widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=6, add_bias_kv=True, batch_first=True),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
    "LSTM": (
        lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1_reverse", "weight_hh_l1_reverse"),
    ),
    "LSTM with projection": (lambda: recurrent(nn.LSTM, proj_size=3), ("weight_hr_l0",)),
    "GRU": (lambda: recurrent(nn.GRU), ("weight_ih_l0", "weight_hh_l0")),
    "RNN": (lambda: recurrent(nn.RNN, bias=False), ("weight_ih_l0", "weight_hh_l0")),
    "LSTMCell": (lambda: nn.LSTMCell(6, 5), ("weight_ih", "weight_hh")),
}


def run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x[..., : layer.vdim])[0]
    if isinstance(layer, nn.RNNCellBase):
        return layer(x[:, 0], (noise(3, 5), noise(3, 5)))[0]
    return layer(x)[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", PACKED)
def test_packed_and_recurrent_weights_are_masked(kind: str, tmp_path: Path) -> None:
    make, names = PACKED[kind]
    plain = make()
    layer = convert(copy.deepcopy(plain), 0.5)
    assert set(names) <= slots_of(layer).keys()
    assert all(p.eq(0).all() for n, p in layer.named_parameters() if n.startswith("bias"))
    x = noise(3, 4, 8 if "attention" in kind else 6)
    expected = copy.deepcopy(plain)
    state = {name: value for name, value in layer.state_dict().items() if not name.endswith("_score")}
    for prefix, module in layer.named_modules():
        for name in slots_of(module):
            state[f"{prefix}.{name}" if prefix else name] = right(module, name)
    expected.load_state_dict(state)
    for mode in (torch.enable_grad, torch.no_grad):
        for training in (True, False):
            with mode():
                ours = run(layer.train(training), x)
                torch.testing.assert_close(ours, run(expected.train(training), x))
    torch.testing.assert_close(run(copy.deepcopy(layer), x), ours)
    torch.testing.assert_close(run(bake(layer), x), ours)
    run(layer, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in layer.named_parameters() if n.endswith("_score"))
    save(layer, tmp_path / "layer.popup.safetensors")
    loaded = load(tmp_path / "layer.popup.safetensors", make())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in bake(layer).state_dict().items())


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_a_recurrent_layer_follows_its_scores_and_its_dtype() -> None:
    layer: Any = convert(nn.LSTM(6, 5), 0.5)
    x = noise(3, 4, 6)
    before = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0_score.neg_().add_(1)
    assert not torch.equal(layer(x)[0], before)
    torch.testing.assert_close(layer(x)[0], bake(layer)(x)[0])
    layer.double()
    assert layer.weight_hh_l0_score.dtype == torch.float32
    assert layer(x.double())[0].dtype == torch.float64


def test_the_experts_of_a_conditional_convolution_are_masked() -> None:
    layer = convert(CondConv2d(4, 6, 3, padding=1, num_experts=3), 0.5)
    assert slots_of(layer)["weight"].fan_in == 4 * 9  # one expert's
    x, routing = noise(2, 4, 5, 5), torch.softmax(noise(2, 3), 1)
    weight = (routing @ right(layer, "weight")).view(2, 6, 4, 3, 3)
    expected = torch.stack([F.conv2d(image, w, padding=1) for image, w in zip(x, weight, strict=True)])
    torch.testing.assert_close(layer(x, routing), expected)


# embeddings, tokens, tables, temperatures


@pytest.mark.parametrize(
    ("name", "kwargs", "key", "std"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, "pos_embed", 0.02),
        ("vit_tiny_patch16_224", TINY_VIT, "cls_token", 0.02),
        ("vit_tiny_patch16_224", {**TINY_VIT, "reg_tokens": 2}, "reg_token", 0.02),
        ("deit_tiny_distilled_patch16_224", TINY_VIT, "dist_token", 0.02),
        (
            "swin_tiny_patch4_window7_224",
            TINY_SWIN,
            "layers.0.blocks.0.attn.relative_position_bias_table",
            0.02,
        ),
        ("levit_128s", {}, "stages.0.blocks.0.attn.attention_biases", 0.02),
        ("tnt_s_patch16_224", {}, "patch_pos", 0.02),
        ("visformer_tiny", {}, "pos_embed1", 0.02),
        ("botnet26t_256", {}, "stages.2.1.self_attn.pos_embed.height_rel", 0.02),
        ("coat_lite_tiny", {}, "cls_token1", 0.02),
    ],
)
def test_positions_and_tokens_are_drawn_from_the_seed(name: str, kwargs: dict[str, Any], key: str, std: float) -> None:
    model = convert(timm.create_model(name, **kwargs), seed=4)
    parameter = model.get_parameter(key)
    assert torch.equal(parameter, values("normal", parameter, std, 4, "other", key))
    assert not parameter.requires_grad


def test_an_embedding_is_drawn_from_the_seed() -> None:
    model: Any = convert(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), seed=4)
    assert torch.equal(model[0].weight, values("normal", model[0].weight, 1.0, 4, "other", "0.weight"))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("swinv2_cr_tiny_224", "stages.0.blocks.0.attn.logit_scale"),
        ("xcit_nano_12_p16_224", "blocks.0.attn.temperature"),
        ("vit_base_patch16_rope_mixed_224", "rope.freqs"),
    ],
)
def test_temperatures_and_frequencies_stay(name: str, key: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name)
    before = plain.get_parameter(key).detach().clone()
    assert {other.key: other.treatment.action for other in plan(plain).rest}[key] == "left"
    parameter = convert(plain).get_parameter(key)
    assert torch.equal(parameter, before)
    assert not parameter.requires_grad


def test_others_are_trained_and_stored_if_asked_for(tmp_path: Path) -> None:
    model = convert(build("vit_tiny_patch16_224", img_size=32, num_classes=5), others="train")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("_score")}
    assert trained == {other.key for other in plan(build("vit_tiny_patch16_224", img_size=32, num_classes=5)).rest}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(noise(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    manifest = save(model, tmp_path / "v.popup.safetensors")
    assert not manifest.generated  # they have moved, and are stored
    loaded = load(tmp_path / "v.popup.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in bake(model).state_dict().items())


def test_norms_alone_are_trained_if_asked_for() -> None:
    model = convert(timm.create_model("resnet18"), norm="train")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("_score")}
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    assert trained == norms


# scales that start at 0 or next to it

DEAD = {  # the network, a scale of it, and the score behind that scale
    "resnet18": ("layer1.0.bn2.weight", "layer1.0.conv1.weight_score", 64),
    "regnetx_002": ("s1.b1.conv3.bn.weight", "s1.b1.conv1.conv.weight_score", 64),
    "levit_128s": ("stages.0.blocks.0.mlp.ln2.bn.weight", "stages.0.blocks.0.mlp.ln1.linear.weight_score", 224),
    "convnext_atto": ("stages.0.blocks.0.gamma", "stages.0.blocks.0.mlp.fc1.weight_score", 64),
    "convnextv2_atto": ("stages.0.blocks.0.mlp.grn.weight", "stages.0.blocks.0.mlp.fc1.weight_score", 64),
    "cait_xxs24_224": ("blocks.0.gamma_1", "blocks.0.attn.qkv.weight_score", 224),
    "edgenext_xx_small": ("stages.1.blocks.1.gamma_xca", "stages.1.blocks.1.xca.qkv.weight_score", 64),
    "dm_nfnet_f0": ("stages.0.0.skipinit_gain", "stages.0.0.conv1.weight_score", 64),
    "mixer_s32_224": (None, "blocks.0.mlp_tokens.fc1.weight_score", 224),
}


@pytest.mark.parametrize("name", slow_except(DEAD, list(DEAD)[:1]))
def test_no_branch_is_dead(name: str) -> None:
    scale, score, side = DEAD[name]
    plain = timm.create_model(name, num_classes=5)
    model = convert(plain, 0.5)
    if scale is not None:
        assert model.get_parameter(scale).eq(1).all()
    model(noise(2, 3, side, side)).square().sum().backward()
    gradient: Any = model.get_parameter(score).grad
    assert gradient.isfinite().all()
    assert gradient.any()


# one module or parameter under two names


def test_a_module_under_two_names_is_one_swap_one_mask_one_entry(tmp_path: Path) -> None:
    model = build("coat_lite_tiny", num_classes=5)
    keys = [key for key in model.state_dict() if "cpe" in key and key.endswith("proj.weight")]
    shared = {model.get_parameter(key) for key in keys}
    assert len(shared) < len(keys)
    convert(model)
    assert len({id(model.get_submodule(key.rpartition(".")[0])) for key in keys}) == len(shared)
    manifest = save(model, tmp_path / "coat.popup.safetensors")
    entries = {entry.name for entry in manifest.masked}
    assert len(entries & set(keys)) == len(shared)
    aliases = {key: manifest.aliases[key] for key in keys if key not in entries}
    assert len(aliases) == len(keys) - len(shared)
    assert set(aliases.values()) <= entries


# layers that came after the conversion


def changed_head(model: Any) -> None:
    model.reset_classifier(7)


def changed_size(model: Any) -> None:
    model.set_input_size(img_size=48)


def changed_patches(model: Any) -> None:
    model.set_input_size(img_size=32, patch_size=16)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [(changed_head, ["head.weight"]), (changed_size, []), (changed_patches, ["patch_embed.proj.weight"])],
)
def test_converting_again_completes_the_surgery_and_leaves_the_rest(
    change: Callable[..., Any], expected: list[Any], scope: Scope, tmp_path: Path
) -> None:
    model = convert(vit(), k=0.4, seed=6, scheme="kaiming_normal", scope=scope)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_score"):
                parameter.mul_(3)
    change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if expected:
        with pytest.raises(
            ArtifactError, match=rf"^{expected[0]} came into the network after its conversion and would"
        ):
            save(model, tmp_path / "half.popup.safetensors")
        assert not (tmp_path / "half.popup.safetensors").exists()
    assert [weight.key for weight in plan(model).masked] == expected
    convert(model)
    assert plan(model).masked == ()
    assert plan(model).coverage.share("generated") > 0  # what the first conversion did is known
    new = {"head.weight", "head.bias"} if change is changed_head else set(expected)
    for key, value in model.state_dict().items():
        if not key.startswith(tuple(name.rpartition(".")[0] for name in new)):
            assert torch.equal(value, before[key]), key
    assert not [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("_score")]
    for key in expected:
        layer: Any = model.get_submodule(key.rpartition(".")[0])
        slot = slots_of(layer)["weight"]
        assert (slot.k, slot.seed, slot.scheme) == (0.4, 6, "kaiming_normal")
        std = math.sqrt(2.0 / slot.fan_in) * math.sqrt(1 / 0.4)
        assert torch.equal(layer._parameters["weight"], values("normal", layer.weight, std, 6, "weight", key))
    total = sum(mask.numel() for mask in masks(model).values())
    if scope == "global":
        assert sum(int(mask.sum()) for mask in masks(model).values()) == kept_count(total, 0.4)
    side = 48 if change is changed_size else 32
    model(noise(2, 3, side, side)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save(model, tmp_path / "whole.popup.safetensors")


def test_a_layer_that_was_taken_out_no_longer_counts() -> None:
    model: Any = convert(vit(), k=0.4, scope="global")
    model.reset_classifier(0)
    convert(model)
    found = masks(model)
    assert "head.weight" not in found
    total = sum(mask.numel() for mask in found.values())
    assert sum(int(mask.sum()) for mask in found.values()) == kept_count(total, 0.4)


def test_a_part_that_was_converted_alone_keeps_its_mask_when_the_whole_is(tmp_path: Path) -> None:
    model: Any = vit()
    convert(model.blocks, k=0.2)
    before = masks(model)
    convert(model, k=0.5)
    assert {key: mask.float().mean() for key, mask in masks(model).items() if key == "head.weight"} == {
        "head.weight": 0.5
    }
    assert all(torch.equal(mask, masks(model)[key]) for key, mask in before.items())
    assert {slot.stream for _, slot in slots_of(model.blocks[0].mlp.fc1).items()} == {"0.mlp.fc1.weight"}
    save(model, tmp_path / "whole.popup.safetensors")
    other: Any = vit()
    convert(other.blocks)
    with pytest.raises(ConversionError, match="scope='global' ranks all layers together, and 8 are masked already"):
        convert(other, scope="global")


# methods that fuse and reparametrise

FUSING = [
    "levit_128s", "levit_conv_128s", "tiny_vit_5m_224", "repvit_m0_9", "fastvit_t8", "mobileone_s0", "repvgg_a0",
    "nextvit_small", "efficientvit_m0", "ghostnetv3_050", "repghostnet_050", "shvit_s1", "efficientvim_m1", "iformer_t",
]  # fmt: skip


@pytest.mark.parametrize("name", slow_except(FUSING, ["repvit_m0_9"]))
def test_fusing_is_right_or_refused_never_wrong(name: str, tmp_path: Path) -> None:
    # narrow weights, since wide ones make attention so hard that rounding alone moves the outputs
    model, x = convert(f"timm/{name}", 0.1, scaled=False), noise(2, 3, 224, 224)
    with torch.no_grad():
        model.train()(x)
        expected = model.eval()(x)
        close = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
        torch.testing.assert_close(reparameterize_model(bake(model).eval())(x), expected, **close)
        try:
            fused = reparameterize_model(model)
            torch.testing.assert_close(fused(x), expected, **close)
        except MaskedWeightError:
            refused = True
        else:
            refused = False
            with pytest.raises(ArtifactError, match=r"came into the network after its conversion|has no masked layer"):
                save(fused, tmp_path / "fused.popup.safetensors")
        assert refused == (name in ("nextvit_small", "efficientvim_m1"))
        assert torch.equal(model(x), expected)


# code that sniffs


@pytest.mark.parametrize("name", ["edgenext_xx_small", "convit_tiny", "xcit_nano_12_p16_224"])
def test_sniffing_a_dtype_ranks_nothing_again(name: str, rankings: list[int]) -> None:
    model, x = convert(timm.create_model(name), 0.5).eval(), noise(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
        assert len(rankings) == len(masks(model))
        model(x)
    assert len(rankings) == len(masks(model))


def test_initialising_again_is_refused_not_ignored() -> None:
    model = convert(timm.create_model("vit_tiny_patch16_224", **TINY_VIT))

    def through_data(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()

    def in_place(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight)

    for init in (through_data, in_place):
        broken = copy.deepcopy(model)
        broken.apply(init)
        with pytest.raises(MaskedWeightError, match="was written to in place"):
            broken(noise(1, 3, 32, 32))


# the report


def test_coverage_counts_each_parameter_once() -> None:
    for model in (vit(), timm.create_model("swinv2_cr_tiny_224"), torchvision.models.vit_b_16()):
        coverage = plan(model).coverage
        groups = coverage.masked, coverage.generated, coverage.constant, coverage.left
        counted = {key: count for group in groups for key, count in group.items()}
        assert counted == {key: parameter.numel() for key, parameter in model.named_parameters()}
        assert sum(len(group) for group in groups) == len(counted)
        assert coverage.of_weights == 1
        assert coverage.share("masked") + coverage.share("generated") + coverage.share("constant") + coverage.share(
            "left"
        ) == pytest.approx(1)


def test_coverage_names_a_weight_that_no_kind_claims() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.matrix = nn.Parameter(torch.ones(4, 4))

    coverage = plan(Own()).coverage
    assert coverage.missed == {"matrix": 16}
    assert coverage.of_weights == 0.5
    assert "left 44.44% of 36 parameters" in str(plan(Own()))


def test_a_network_that_keeps_results_of_its_last_pass_is_baked() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = [super().forward(x)]
            return self.last[0]

    model = convert(Keeping(3, 2))
    result = model(noise(4, 3))
    baked: Any = bake(model)
    assert torch.equal(baked.last[0], result)


# what a stricter look found


@pytest.mark.parametrize(
    ("change", "kwargs"),
    [
        (lambda m: m.reset_classifier(5), {"num_classes": 5}),
        (lambda m: m.set_input_size(img_size=64), {"num_classes": 10, "img_size": [64, 64]}),
    ],
)
def test_a_network_that_was_changed_is_not_saved_under_its_old_description(
    change: Callable[..., Any], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model = convert(build("timm/test_vit", num_classes=10), 0.5)
    change(model)
    convert(model)
    manifest = save(model, tmp_path / "v.popup.safetensors")
    assert manifest.architecture.kwargs == kwargs
    loaded = load(tmp_path / "v.popup.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in bake(model).state_dict().items())


def test_a_global_ranking_takes_one_k_by_pattern_too() -> None:
    model = convert(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), {"*": 0.5}, scope="global")
    assert sum(int(mask.sum()) for mask in masks(model).values()) == kept_count(44, 0.5)


def test_a_weight_that_is_masked_is_not_drawn_over_through_another_owner(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    model[1].weight = model[0].weight
    convert(model[1])
    (before,) = masks(model).values()
    convert(model)
    (after,) = masks(model).values()
    assert torch.equal(before, after)
    save(model, tmp_path / "tied.popup.safetensors")  # refused if the weights were not the seed's any more


def test_a_layer_whose_class_cannot_be_subclassed_leaves_the_network_as_it_was() -> None:
    class Strict(nn.Linear):
        def __init_subclass__(cls, *, needed: Any) -> None:
            pass

    model = nn.Sequential(nn.Linear(3, 3), Strict(3, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TypeError, match="needed"):
        convert(model)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_that_cannot_hold_values_of_their_own_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.ones(1, 4).expand(2, 4))
    with pytest.raises(ConversionError, match=r"1\.weight is an expanded tensor"):
        convert(model)
    assert not is_masked(model[0])
    with torch.inference_mode():
        made = nn.Linear(2, 2)
    with pytest.raises(ConversionError, match=r"weight was made under torch\.inference_mode"):
        convert(made)
    with pytest.raises(ConversionError, match=r"model is None; expected a torch\.nn\.Module"):
        convert(None)  # type: ignore[arg-type]


def test_a_matrix_is_no_scale_of_a_norm() -> None:
    class NormedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.fc = nn.Linear(4, 4)

    assert plan(NormedLinear()).coverage.missed == {"weight": 16}


def test_what_is_missed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.fc = nn.Linear(4, 4)

    caplog.set_level(logging.WARNING, "popup_surgery")
    convert(Experts())
    assert "75 % of the weights are not masked: experts" in caplog.text


def test_a_recurrent_layer_keeps_one_copy_of_its_weights() -> None:
    layer = convert(nn.LSTM(6, 5))
    assert "_flat_weights" not in layer.__dict__
    baked: Any = bake(layer)
    assert len(baked._flat_weights) == 4


def test_a_masked_weight_is_copied_and_stored_as_a_plain_tensor(tmp_path: Path) -> None:
    layer: Any = convert(nn.Linear(3, 2))
    torch.save(layer.weight, tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=True), layer.weight)
    with torch.no_grad():
        assert type(copy.deepcopy(layer.weight)) is Tensor


def test_what_was_converted_is_known_and_not_done_again() -> None:
    model: Any = convert(vit())
    first = plan(vit()).coverage
    assert plan(model).coverage == first
    with torch.no_grad():
        model.pos_embed.add_(1)
    moved = model.pos_embed.clone()
    model.reset_classifier(3)
    convert(model)
    assert torch.equal(model.pos_embed, moved)
    assert plan(model).coverage.generated == first.generated
    with pytest.raises(TypeError, match="convert has no argument 'num_classes'; build takes it"):
        convert(vit(), num_classes=3)  # type: ignore[arg-type]
