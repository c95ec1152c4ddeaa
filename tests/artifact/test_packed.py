"""`load(…, packed=True)`: masked weights held as bits, the outputs to the bit those of the plain network."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import popup_surgery as ps
from popup_surgery import ArtifactError, ConversionError, MaskedWeightError, PopupError
from popup_surgery.masking.packed import Packed
from popup_surgery.masking.ternary import unpack
from support import PATIENCE, equal_states

Make = Callable[[], nn.Module]
IMAGES = 3, 32, 32


def saved(model: nn.Module, path: Path, encoding: str = "bitpack", **settings: object) -> Path:
    """A file of a converted network whose masks and statistics are not those that it began with."""
    ps.convert(model, **{"k": 0.3, "seed": 5} | settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("_score", "running_mean")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    ps.save(model, path, encoding=encoding)
    return path


def both(path: Path, make: Make | None = None) -> tuple[nn.Module, nn.Module]:
    """The plain network of a file, and the packed one."""
    plain, packed = (ps.load(path, make and make(), packed=packed) for packed in (False, True))
    assert any(isinstance(module, Packed) for module in packed.modules())
    return plain, packed


def given(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def same(one: nn.Module, other: nn.Module, inputs: Tensor) -> bool:
    """Two networks give the same output, to the bit, in both modes without gradients."""
    with torch.no_grad():
        found = torch.equal(one(inputs), other(inputs))
    with torch.inference_mode():
        return found and torch.equal(one(inputs), other(inputs))


def held(network: nn.Module) -> int:
    """Bytes of all the tensors that a network holds, each memory counted once."""
    tensors = chain(network.parameters(), network.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 13, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.up(self.other(x, x[..., :6], x[..., :6])[0].mT)


class Tied(nn.Module):
    """One weight in three layers, one of which is an embedding, and one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 7)
        self.first, self.out = nn.Linear(7, 7), nn.Linear(7, 9, bias=False)
        self.out.weight = self.words.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.first(self.words(x))))


class Products(nn.Module):
    """Two weights, and one twice, in use at once, outside of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b, again = self.a.weight, self.b.weight, self.a.weight
        return F.linear(x, torch.cat([a, b, again]) @ (a + b))


def in_words() -> Tensor:
    return torch.arange(9)[None]


LIBRARIES = ["timm/test_resnet", "timm/test_vit", "timm/test_efficientnet", "timm/test_convnext", "popup_surgery/conv2"]
OWN = [(Recurrent, given(2, 4, 5)), (Attention, given(2, 4, 8)), (Tied, in_words()), (Products, given(3, 6))]


@pytest.mark.parametrize("encoding", ["bitpack", "range_coded"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_networks_of_libraries(name: str, encoding: str, tmp_path: Path) -> None:
    plain, packed = both(saved(ps.build(name), tmp_path / "net.safetensors", encoding))
    assert same(plain, packed, given(2, 3, 160, 160) if "vit" in name else given(2, *IMAGES))
    assert equal_states(plain, packed)
    assert not packed.training


@pytest.mark.parametrize(("make", "inputs"), OWN)
def test_own_networks(make: Make, inputs: Tensor, tmp_path: Path) -> None:
    plain, packed = both(saved(make(), tmp_path / "net.safetensors"), make)
    assert same(plain, packed, inputs)
    assert equal_states(plain, packed)
    packed.load_state_dict(plain.state_dict())


def test_the_user_s_own_network_is_returned(tmp_path: Path) -> None:
    path, model = saved(Products(), tmp_path / "net.safetensors"), Products()
    assert ps.load(path, model, packed=True) is model
    assert isinstance(model.a, nn.Linear)
    assert isinstance(model.a.weight, nn.Parameter)
    assert repr(model.a) == "PackedLinear(in_features=6, out_features=6, bias=True, weight packed)"


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    _, packed = both(saved(Tied(), tmp_path / "net.safetensors"), Tied)
    names = [name for name, _ in packed.named_buffers()]
    assert sum("codes" in name for name in names) == 2, names


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, (1 << 17) - 1, (1 << 17) + 5])
@pytest.mark.parametrize("scheme", ["signed_kaiming_constant", "unsigned_kaiming_constant"])
def test_numbers_of_weights(n: int, scheme: str, tmp_path: Path) -> None:
    plain, packed = both(
        saved(nn.Sequential(nn.Linear(n, 1)), tmp_path / "net.safetensors", k=0.5 if n > 1 else 1, scheme=scheme),
        lambda: nn.Sequential(nn.Linear(n, 1)),
    )
    assert torch.equal(packed[0].weight, plain[0].weight)  # type: ignore[index]
    assert not torch.signbit(packed[0].weight[plain[0].weight == 0]).any()  # type: ignore[index]


@pytest.mark.parametrize("casts", [(torch.bfloat16,), (torch.half,), (torch.float64,), (torch.bfloat16, torch.float32)])
def test_casts_round_as_those_of_plain_networks(casts: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    plain, packed = both(saved(ps.build("timm/test_vit"), tmp_path / "net.safetensors"))
    for dtype in casts:
        plain, packed = plain.to(dtype), packed.to(dtype)
    assert equal_states(plain, packed)
    assert same(plain, packed, given(1, 3, 160, 160).to(casts[-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_files_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    assert equal_states(*both(saved(ps.build("timm/test_resnet").to(dtype), tmp_path / "net.safetensors")))


@pytest.mark.parametrize(
    ("make", "inputs", "last"),
    [
        (lambda: nn.Sequential(nn.Conv2d(5, 7, 3), nn.Conv2d(7, 6, 1)), given(2, 5, 8, 8), torch.channels_last),
        (lambda: nn.Sequential(nn.Conv3d(5, 7, 3), nn.Conv3d(7, 6, 1)), given(2, 5, 8, 8, 8), torch.channels_last_3d),
    ],
)
def test_memory_formats(make: Make, inputs: Tensor, last: torch.memory_format, tmp_path: Path) -> None:
    plain, packed = both(saved(make(), tmp_path / "net.safetensors"), make)
    for order in last, torch.preserve_format, torch.contiguous_format:
        if order is not torch.preserve_format:
            plain, packed = plain.to(memory_format=order), packed.to(memory_format=order)
        plain, packed = copy.deepcopy(plain).to("cpu"), copy.deepcopy(packed).to("cpu")
        for a, b in zip(plain.state_dict().values(), packed.state_dict().values(), strict=True):
            assert a.stride() == b.stride()
        assert same(plain, packed, inputs.contiguous(memory_format=last))


def test_functional_calls_replace_weights(tmp_path: Path) -> None:
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    other = {"a.weight": given(6, 6), "b.bias": given(6)}
    assert torch.equal(*(torch.func.functional_call(net, other, given(3, 6)) for net in (plain, packed)))
    assert same(plain, packed, given(3, 6))


def through_torch(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, through_torch, lambda net: pickle.loads(pickle.dumps(net, protocol=2))]
)
def test_copies_and_pickles(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    plain, packed = both(saved(Recurrent(), tmp_path / "net.safetensors"), Recurrent)
    assert same(plain, packed, given(2, 4, 5))
    for other in [copied(packed)]:
        assert same(plain, other, given(2, 4, 5))
        assert held(other) == held(packed)
        with pytest.raises(MaskedWeightError, match="held as bits"):
            other.get_submodule("cell").weight_ih = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_casts_to_rare_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    ours, theirs = packed.to(dtype).state_dict(), plain.to(dtype).state_dict()
    words = {1: torch.uint8, 8: torch.int64, 16: torch.complex128}[dtype.itemsize]
    assert all(torch.equal(ours[key].view(words), theirs[key].view(words)) for key in theirs)


def test_threads_share_a_network(tmp_path: Path) -> None:
    plain, packed = both(saved(Recurrent(), tmp_path / "net.safetensors"), Recurrent)
    inputs = [torch.randn(2, 4, 5) for _ in range(8)]

    def passes(x: Tensor) -> bool:
        with torch.no_grad():
            return all(torch.equal(packed(x), plain(x)) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(passes, inputs))


def test_training_and_checkpointing_leave_the_weights(tmp_path: Path) -> None:
    plain, packed = both(saved(Attention(), tmp_path / "net.safetensors"), Attention)
    optimiser = torch.optim.SGD(packed.train().parameters(), lr=0.1)
    x = given(2, 4, 8).requires_grad_()
    torch.utils.checkpoint.checkpoint(packed, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None
    optimiser.step()
    ours, theirs = packed.state_dict(), plain.state_dict()
    kept = theirs.keys() - dict(packed.named_parameters()).keys()
    assert kept
    assert all(torch.equal(ours[key], theirs[key]) for key in kept)
    assert not torch.equal(ours["up.bias"], theirs["up.bias"])


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.reset_parameters(),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.detach()[0].fill_(1),
    ],
)
def test_writes_in_place_are_reported_once(write: Callable[[nn.Linear], None], tmp_path: Path) -> None:
    """The next read says it; copies have nothing to say."""
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)

    def use() -> None:
        write(packed.a)  # type: ignore[arg-type]
        assert same(plain, copy.deepcopy(packed), given(3, 6))
        packed(given(3, 6))

    with pytest.raises(MaskedWeightError, match=r"weight of PackedLinear was written to, and the write is lost"):
        use()
    assert torch.equal(packed.a.weight, plain.a.weight)  # type: ignore[union-attr, arg-type]


def test_the_meta_device_takes_it(tmp_path: Path) -> None:
    _, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    assert packed.to("meta")(given(3, 6).to("meta")).shape == (3, 18)


def test_other_devices_use_the_same_table() -> None:
    codes, value = torch.arange(256, dtype=torch.uint8), torch.tensor([0.25])
    on_cpu = unpack(codes, value, (1024,))
    assert on_cpu[4 * 0x36 :][:4].tolist() == [-0.25, 0.25, 0, 0]
    assert torch.library.opcheck(torch.ops.popup_surgery.unpack, (codes, value, [31, 33]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_graphs(tmp_path: Path) -> None:
    plain, packed = both(saved(ps.build("timm/test_resnet"), tmp_path / "net.safetensors"))
    images = given(2, *IMAGES)
    with torch.no_grad():
        program = torch.export.export(packed, (images,))
        torch.export.save(program, tmp_path / "net.pt2")
        assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(images), plain(images))
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.jit.trace(packed, images)(images), plain(images))


def test_gradients_reach_the_input_and_what_is_not_packed(tmp_path: Path) -> None:
    plain, packed = both(saved(Attention(), tmp_path / "net.safetensors"), Attention)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in dict(packed.named_parameters()))  # and then all outputs are the same again
    inputs = [given(2, 4, 8).requires_grad_() for _ in range(2)]
    outputs = [network(x) for network, x in zip((plain, packed), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    theirs = dict(plain.named_parameters())
    assert all(torch.equal(each.grad, theirs[name].grad) for name, each in packed.named_parameters())  # type: ignore[arg-type]


def test_what_is_held_and_what_stays_after_a_pass(tmp_path: Path) -> None:
    plain, packed = both(saved(ps.build("timm/test_vit"), tmp_path / "net.safetensors"))
    masked = sum(entry.numel for entry in ps.inspect(tmp_path / "net.safetensors").masked)
    assert held(packed) <= held(plain) - 4 * masked + masked / 4 + 128
    before = held(packed)
    same(plain, packed, given(1, 3, 160, 160))
    assert held(packed) == before
    assert not [m for m in packed.modules() if any(isinstance(v, Tensor) for v in vars(m).values())]


@pytest.mark.slow
def test_a_tenth_of_the_memory(tmp_path: Path) -> None:
    plain, packed = both(saved(ps.build("timm/vit_small_patch16_224"), tmp_path / "net.safetensors"))
    assert held(packed) <= 0.10 * held(plain)


def test_states_of_another_dtype_or_without_values(tmp_path: Path) -> None:
    """As a plain network takes them: rounded to its own dtype; on the meta device there is nothing to compare."""
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    packed.bfloat16().load_state_dict(plain.state_dict())
    assert equal_states(packed, copy.deepcopy(plain).bfloat16())
    packed.to("meta").load_state_dict(plain.to("meta").state_dict())


def test_states_that_differ_are_refused(tmp_path: Path) -> None:
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    state = plain.state_dict() | {"b.weight": torch.ones(6, 6)}
    with pytest.raises(MaskedWeightError, match=r"b.weight is held as bits, and the state_dict has other values"):
        packed.load_state_dict(state)
    with pytest.raises(MaskedWeightError, match=r"a.weight is held as bits, and the state_dict has other values"):
        packed.load_state_dict(plain.state_dict() | {"a.weight": 3})
    with pytest.raises(MaskedWeightError, match=r"a.weight is held as bits, and the state_dict has other values"):
        packed.load_state_dict(plain.state_dict() | {"a.weight": torch.empty(6, 6, device="meta")})
    with pytest.raises(RuntimeError, match=r"Missing key.*a.weight"):
        packed.load_state_dict({key: value for key, value in plain.state_dict().items() if key != "a.weight"})


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 6))),
        lambda layer: delattr(layer, "weight"),
        lambda layer: layer.register_parameter("weight", None),
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_writes_are_refused(write: Callable[[nn.Module], None], tmp_path: Path) -> None:
    plain, packed = both(saved(Products(), tmp_path / "net.safetensors"), Products)
    with pytest.raises(MaskedWeightError, match=r"weight.* is held as bits"):
        write(packed.a)  # type: ignore[arg-type]
    assert torch.equal(packed.a.weight, plain.a.weight)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("use", "error", "what"),
    [
        (lambda net, path: ps.convert(net, k=0.5), ConversionError, "be converted"),
        (lambda net, path: ps.plan(net, k=0.5), ConversionError, "be converted"),
        (lambda net, path: ps.bake(net), ConversionError, "be baked"),
        (lambda net, path: ps.save(net, path.with_name("new.safetensors")), ArtifactError, "be saved"),
        (lambda net, path: ps.export(net, path.with_name("new.safetensors")), ConversionError, "be exported"),
        (lambda net, path: ps.load(path, net), ArtifactError, "be filled"),
        (lambda net, path: ps.load(path, net, packed=True), ArtifactError, "be filled"),
        (lambda net, path: ps.MaskBank(net), ConversionError, "be switched"),
        (lambda net, path: ps.start_from(net, path), ConversionError, "be baked"),
        (lambda net, path: ps.save(torch.compile(net), path.with_name("n")), ArtifactError, "be saved"),  # type: ignore[arg-type]
        (lambda net, path: ps.convert(nn.Sequential(net, nn.Linear(1000, 2)), k=0.5), ConversionError, "be converted"),
    ],
)
def test_uses_that_need_the_plain_network(
    use: Callable[[nn.Module, Path], object], error: type[PopupError], what: str, tmp_path: Path
) -> None:
    path = saved(ps.build("timm/test_resnet"), tmp_path / "net.safetensors")
    with pytest.raises(error, match=rf"holds its weights as bits and cannot {what}.*; load the file without packed"):
        use(ps.load(path, packed=True), path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize(
    "scheme", ["kaiming_normal", "kaiming_uniform", {"*": "signed_kaiming_constant", "fc": "xavier_normal"}]
)
def test_other_distributions_are_refused(scheme: object, tmp_path: Path) -> None:
    path, model = (
        saved(ps.build("timm/test_resnet"), tmp_path / "net.safetensors", scheme=scheme),
        ps.build("timm/test_resnet"),
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtifactError, match=r"net.safetensors: the values of '.*' are (normal|uniform)"):
        ps.load(path, model, packed=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_mask_on_pretrained_weights_is_refused(tmp_path: Path) -> None:
    path = saved(Products(), tmp_path / "net.safetensors", scheme="pretrained")
    with pytest.raises(ArtifactError, match=r"a mask on pretrained weights.*use MaskBank"):
        ps.load(path, Products(), packed=True)


@pytest.mark.slow
def test_a_pass_imports_no_compiler(tmp_path: Path) -> None:
    """It takes more memory than most networks."""
    file = saved(ps.build("popup_surgery/fc", width=0.1, in_chans=3, img_size=8), tmp_path / "net.popup.safetensors")
    code = (
        "import sys, torch, popup_surgery as ps; "
        f"network = ps.load({str(file)!r}, packed=True); network(torch.zeros(1, 3, 8, 8)); network.state_dict(); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
