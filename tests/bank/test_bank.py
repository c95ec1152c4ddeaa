"""Many masks on one network: what a task computes is what `load` of its file does, and a switch is in place."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bank.conftest import NAME, Make, trained
from popup_surgery import (
    Artifact,
    ArtifactError,
    ConversionError,
    MaskBank,
    PopupError,
    UnknownName,
    build,
    convert,
    load,
    save,
)  # fmt: skip
from popup_surgery.bank import parts
from popup_surgery.bank.parts import Held, Kept, Signs, Whole
from popup_surgery.codecs.bitpack import unpack_mask
from support import PATIENCE, equal_states, slow_except

SCHEMES = ["signed_kaiming_constant", "unsigned_kaiming_constant", "kaiming_normal", "xavier_uniform"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(net: nn.Module, expected: nn.Module) -> None:
    """Two networks agree in every bit, the signs of zeros included, and in what they compute."""
    assert equal_states(net, expected)
    for one, other in zip(net.state_dict().values(), expected.state_dict().values(), strict=True):
        if one.is_floating_point():
            assert torch.equal(one.signbit(), other.signbit())
    assert not any(module.training for module in net.modules())
    x = X.to(next(net.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(
            net(x).nan_to_num(), expected(x).nan_to_num()
        )  # float16 overflows where weights have one sign


def filled(bank: MaskBank, files: dict[str, Path]) -> MaskBank:
    for name, file in files.items():
        bank.add(name, file)
    return bank


def state(bank: MaskBank) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bank.network.state_dict().items()}


def unchanged(bank: MaskBank, before: dict[str, Tensor]) -> bool:
    now = bank.network.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)


@pytest.fixture
def bank(make: Make) -> MaskBank:
    """A bank on a seed with two heads of 10 and one of 7."""
    files = {"ants": make("ants"), "bees": make("bees"), "cats": make("cats", classes=7)}
    return filled(MaskBank(files["ants"]), files)


# What a task computes


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    slow_except(
        [(scheme, dtype) for scheme in SCHEMES for dtype in DTYPES],
        [(SCHEMES[0], torch.float32), (SCHEMES[0], torch.bfloat16), (SCHEMES[2], torch.bfloat16)],
    ),
)
def test_a_task_is_what_load_gives(scheme: str, dtype: torch.dtype, make: Make) -> None:
    settings: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "others": "train"}
    files = {
        "ants": make("ants", **settings), "bees": make("bees", **settings), "cats": make("cats", 7, **settings),
        "dogs": make("dogs", 7, **settings),
    }  # fmt: skip
    bank = filled(MaskBank(files["bees"]), files)
    base = Artifact.open(files["bees"]).network(masked=False)
    expected = {name: load(file) for name, file in files.items()} | {None: base}
    same(bank.network, base)
    for name in ("ants", "bees", "cats", "bees", "dogs", "cats", None, "dogs", None, "ants"):
        assert bank.use(name) is bank.network
        assert bank.in_use == name
        same(bank.network, expected[name])
        assert bank.network.num_classes == (7 if name in ("cats", "dogs") else 10)
        assert bank.network.get_submodule("fc").out_features == bank.network.num_classes


@pytest.mark.slow
def test_pretrained_weights_with_heads_of_their_own(make: Make, weights: Path) -> None:
    files = {
        "drawn": make("drawn", 7, seed=4, pretrained=True),
        "other seed": make("other", 7, seed=5, pretrained=True),
        "piggyback": make("piggyback", 12, k=None, pretrained=True),
        "part": make("part", 1000, pretrained=True, exclude=["*conv1", "fc"]),
    }
    network = build(NAME, pretrained=weights)
    for base in (network, NAME):
        bank = filled(MaskBank(base, weights=None if base is network else weights), files)
        assert (bank.network is network) == (base is network)
        for name in (*files, "drawn", None):
            bank.use(name)
            expected = build(NAME, pretrained=weights).eval() if name is None else load(files[name], base=weights)
            same(bank.network, expected)


def test_an_artifact_on_pretrained_weights_gives_the_network(make: Make, weights: Path) -> None:
    file = make("drawn", 7, seed=4, pretrained=True)
    bank = filled(MaskBank(Artifact.open(file), weights=weights), {"a": file})
    same(bank.use("a"), load(file, base=weights))
    with pytest.raises(ArtifactError, match="no library provides; pass the network or the file that holds them"):
        MaskBank(file)


class Tied(nn.Module):
    """A network of no library, with one weight under two keys, a view of another and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.third.weight = self.second.weight
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).mean((2, 3))
        return self.head(self.third(self.second(x)))


def custom(path: Path, seed: int, classes: int = 5) -> Path:
    model = Tied()
    model.head = nn.Linear(12, classes, bias=False)
    save(trained(convert(model, 0.5), seed), path)
    return path


def test_a_network_of_your_own(tmp_path: Path) -> None:
    files = {name: custom(tmp_path / name, i) for i, name in enumerate("ab")}
    network = Tied().to(memory_format=torch.channels_last)
    bank = filled(MaskBank(files["a"], model=network), files)
    bank.add("c", custom(tmp_path / "c", 2, classes=9))
    assert bank.network is network
    assert network.third.weight is network.second.weight
    for name in ("a", "b", "c", "b"):
        model = Tied()
        model.head = nn.Linear(12, 9 if name == "c" else 5, bias=False)
        same(bank.use(name), load(tmp_path / name, model).to(memory_format=torch.channels_last))
    with pytest.raises(ArtifactError, match="pass the network to fill"):
        MaskBank(files["a"])
    other = type("Other", (nn.Sequential,), {})(nn.Linear(12, 12))
    save(convert(other, 0.5), tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"custom/Other, which is not the bank's network: the network has 'first"):
        bank.add("d", tmp_path / "other")


def test_a_task_may_come_from_an_open_file_or_from_memory(bank: MaskBank, make: Make) -> None:
    artifact = Artifact.open(make("bees"))
    bank.add("open", artifact)
    masks, stored = artifact.contents.masks, artifact.contents.stored
    bank.add("memory", Artifact.of(artifact.manifest, masks, stored))
    for name in ("open", "memory"):
        same(bank.use(name), load(make("bees")))


def test_coded_masks_stay_coded_until_they_are_used(make: Make) -> None:
    files = {name: make(name, k=0.03, encoding="range_coded", seed=8) for name in "ab"}
    bank = filled(MaskBank(files["a"]), files)
    coded = bank.memory().masks
    assert all(size < files[name].stat().st_size for name, size in coded.items())
    same(bank.use("b"), load(files["b"]))
    packed = bank.memory().masks
    assert packed["b"] > 4 * coded["b"]
    assert packed["a"] == coded["a"]


def test_coded_masks_that_are_damaged(make: Make, tmp_path: Path) -> None:
    file = make("a", k=0.03, encoding="range_coded", seed=8)
    bank = filled(MaskBank(file), {"good": file})
    data = bytearray(file.read_bytes())
    place = Artifact.open(file).container
    assert place is not None
    tensor = place.tensors["fc.weight.mask"]
    data[place.data_start + (tensor.start + tensor.stop) // 2] ^= 255
    (tmp_path / "bad").write_bytes(data)
    bank.add("bad", tmp_path / "bad")
    bank.use("good")
    before = state(bank)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"bad: .*(mask|damaged)"):
            bank.use("bad")
        assert unchanged(bank, before)
    with pytest.raises(ArtifactError), bank.using("bad"):
        pass
    assert bank.in_use == "good"
    bank.remove("bad")


# Switching in place


def test_a_switch_writes_in_place(bank: MaskBank) -> None:
    tensors = {name: (tensor, tensor.data_ptr()) for name, tensor in bank.network.state_dict(keep_vars=True).items()}
    with torch.inference_mode():
        bank.use("bees")
    for name in ("ants", "bees", None):
        bank.use(name)
        for key, tensor in bank.network.state_dict(keep_vars=True).items():
            assert tensor is tensors[key][0]
            assert tensor.data_ptr() == tensors[key][1]
    versions = {name: tensor._version for name, (tensor, _) in tensors.items()}
    bank.use("ants")
    assert all(tensor._version > versions[name] for name, (tensor, _) in tensors.items()), "autograd sees the write"


@pytest.mark.slow
@pytest.mark.parametrize("how", slow_except(["wrapped", "in place", "given"], ["wrapped"]))
def test_nothing_is_compiled_again(how: str, make: Make) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    files = {"ants": make("ants"), "bees": make("bees"), "cats": make("cats", classes=7)}
    if how == "given":
        wrapped: Any = torch.compile(Artifact.open(files["ants"]).network(), backend=backend)
        bank = filled(MaskBank(files["ants"], model=wrapped), files)
        net: Any = bank.network
        assert net is wrapped
    else:
        bank = filled(MaskBank(files["ants"]), files)
        net = bank.network
        if how == "wrapped":
            net = torch.compile(net, backend=backend)
        else:
            net.compile(backend=backend)
    with torch.no_grad():
        for name in ("ants", "bees", None, "ants", "bees"):
            bank.use(name)
            output = net(X)
            if name is not None:
                assert torch.equal(output, load(files[name])(X))
        graphs = len(compiled)
        assert graphs == 1
        for name in ("cats", "ants", "cats", "bees"):
            bank.use(name)
            assert torch.equal(net(X), load(files[name])(X))
        assert len(compiled) <= graphs + 2, "a head of another size is compiled for itself, once"
        bank.use("ants")
        net(X)
        bank.use("cats")
        net(X)
        assert len(compiled) <= graphs + 2


def test_threads_of_pytorch_write_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads write at once, in pieces; small pieces here, so that each tensor has several."""
    monkeypatch.setattr(parts, "_PARALLEL", 1000)
    monkeypatch.setattr(parts, "_PIECE", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for scheme in SCHEMES[0], SCHEMES[2]:
        files = {name: make(name, scheme=scheme) for name in ("ants", "bees")}
        bank = filled(MaskBank(files["ants"]), files)
        for name in ("ants", "bees", None, "ants"):
            bank.use(name)
            if name is not None:
                same(bank.network, load(files[name]))
    versions = [tensor._version for tensor in bank.network.parameters()]
    bank.use("bees")
    assert all(a < b._version for a, b in zip(versions, bank.network.parameters(), strict=True))


def test_what_a_device_computes_is_what_the_processor_does() -> None:
    """The words of a GPU are computed with PyTorch alone; here on the CPU, for each dtype and kind of weight."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 64, 1003):
        mask, signs = torch.randint(0, 256, (2, -(-n // 8)), generator=generator, dtype=torch.uint8).numpy()
        for dtype in DTYPES:
            values = torch.randn(n, generator=generator).to(dtype)
            for source in Held(values), Signs(n, 0.3, 1, "a", dtype):
                target = torch.empty(n, dtype=dtype)
                Kept(source, mask).write(target)
                assert torch.equal(source.masked_on(mask, 0, n, torch.device("cpu")), target)
                signed = Kept(source, mask, mask & signs)
                signed.write(target)
                assert torch.equal(signed._piece_on(0, n, torch.device("cpu")), target)
                assert torch.equal(target.signbit(), torch.from_numpy(unpack_mask(mask & signs, (n,))))


# What is refused


def test_masks_of_another_base_are_refused(bank: MaskBank, make: Make, weights: Path, tmp_path: Path) -> None:
    before, names = state(bank), bank.names
    refused = {
        make("seed", seed=4): "its weights are drawn from seed 4, the bank's from seed 3",
        make("scheme", scheme="kaiming_normal"): (
            "the distribution of 'conv1.0.weight' is normal, the bank's is signed_constant"
        ),
        make("std", k=0.3): (
            r"the std of 'conv1.0.weight' is \S+ \(signed_kaiming_constant, k = 0.3, scaled\), the bank's is \S+ "
            r"\(signed_kaiming_constant, k = 0.5, scaled\)"
        ),
        make("dtype", dtype=torch.bfloat16): "the dtype of 'conv1.0.weight' is BF16, the bank's is F32",
        make("network", network="timm/test_efficientnet"): (
            "it is for timm/test_efficientnet, which is not the bank's network"
        ),
        make("kind", pretrained=True): r"its masks are for the weights of timm/test_resnet, and the bank's are drawn",
        make("none", include="conv1.0", seed=3, exclude=None): "",
    }
    for file, says in refused.items():
        if says:
            with pytest.raises(ArtifactError, match=f"{file.name}: .*{says}"):
                bank.add("new", file)
        else:
            bank.add("part", file)
            same(bank.use("part"), load(file))
            bank.use(None)
            bank.remove("part")
    assert unchanged(bank, before)
    assert bank.names == names


def test_a_stream_of_another_name_is_refused(make: Make, tmp_path: Path) -> None:
    model = build(NAME, num_classes=10)
    convert(model.get_submodule("layer1"), 0.5, seed=3)  # a part by itself: its streams have other names
    convert(model, 0.5, seed=3, architecture=NAME)
    save(model, tmp_path / "part")
    with pytest.raises(ArtifactError, match=r"the stream of 'layer1.0.conv1.weight' is 0.conv1.weight, the bank's"):
        MaskBank(make("ants")).add("part", tmp_path / "part")


def test_masks_for_other_pretrained_weights_are_refused(make: Make, weights: Path) -> None:
    other: Any = build(NAME, pretrained=weights)
    with torch.no_grad():
        other.conv1[0].weight[0, 0, 0, 0] += 1
    for base, says in (other, "the masks are for other weights: those of "), (build(NAME), "the masks are for other"):
        with pytest.raises(ArtifactError, match=says):
            MaskBank(base).add("a", make("a", pretrained=True))
    with pytest.raises(
        ArtifactError, match="its weights are drawn from seed 3, and the bank's base has the weights of"
    ):
        MaskBank(other).add("a", make("ants"))


def test_a_network_that_computes_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    """The names and shapes are the same, and the pooling differs."""
    model = build(NAME, num_classes=10, global_pool="max")
    save(convert(model, 0.5, seed=3), tmp_path / "max")
    bank = MaskBank(make("ants"))
    with pytest.raises(
        ArtifactError, match=r"it is for timm/test_resnet, which .*: in the bank's, global_pool.pool is an AdaptiveAvg"
    ):
        bank.add("max", tmp_path / "max")


def test_damaged_files_leave_the_bank_as_it_was(bank: MaskBank, make: Make, tmp_path: Path) -> None:
    bank.use("bees")
    before, good = state(bank), make("ants").read_bytes()
    for cut in (0, 10, len(good) // 2, len(good) - 1):
        (tmp_path / "bad").write_bytes(good[:cut])
        with pytest.raises(ArtifactError, match="bad: "):
            bank.add("bad", tmp_path / "bad")
    with pytest.raises(ArtifactError, match="does not exist"):
        bank.add("bad", tmp_path / "none")
    assert "bad" not in bank
    assert len(bank) == 3
    assert unchanged(bank, before)


def test_bases_that_are_none(make: Make, weights: Path) -> None:
    converted = convert(build(NAME), 0.5)
    refused: Any = (
        (NAME, {}, "names a network and no weights, .* a tag as in timm/test_resnet.TAG"),
        (converted, {}, "the network is converted"),
        (build(NAME), {"weights": weights}, "weights was given beside a network"),
        (NAME, {"model": build(NAME)}, "model was given beside a network's name"),
        (7, {}, "base is 7; expected a network"),
    )
    for base, arguments, says in refused:
        with pytest.raises(ConversionError, match=says):
            MaskBank(base, **arguments)
    with pytest.raises(UnknownName, match="the nearest known: test_resnet"):
        MaskBank("timm/test_resnett.a1")
    with pytest.raises(ArtifactError, match=r"weights.safetensors: this is not a popup artifact: dense weights"):
        MaskBank(weights)
    shared: Any = build(NAME)
    shared.bn = nn.BatchNorm1d(2)
    shared.other = nn.Parameter(shared.conv1[0].weight.detach()[:1])
    with pytest.raises(ArtifactError, match="share memory"):
        MaskBank(shared)


def test_names(bank: MaskBank, make: Make) -> None:
    with pytest.raises(ConversionError, match="the bank has a task 'ants' already"):
        bank.add("ants", make("ants"))
    for name in ("", None, 3):
        with pytest.raises(ConversionError, match="the name of a task is"):
            bank.add(name, make("ants"))  # type: ignore[arg-type]
    for call in bank.use, bank.remove, bank.manifest:
        with pytest.raises(UnknownName, match="unknown task 'antz'; the nearest known: ants"):
            call("antz")
    assert list(bank) == ["ants", "bees", "cats"] == list(bank.names)
    assert "bees" in bank
    assert bank.manifest("cats").architecture.kwargs == {"num_classes": 7}
    bank.use("ants")
    with pytest.raises(PopupError, match="'ants' is in use"):
        bank.remove("ants")
    bank.remove("bees")
    assert bank.names == ("ants", "cats")
    with pytest.raises(UnknownName, match="the bank has none"):
        MaskBank(make("ants")).use("ants")


def test_a_network_that_was_changed_is_not_written(bank: MaskBank) -> None:
    bank.network.half()
    before = state(bank)
    with pytest.raises(
        PopupError, match=r"'conv1.0.weight' of the bank's network is torch.float16 .* expected torch.flo"
    ):
        bank.use("ants")
    assert unchanged(bank, before)
    bank.network.float()
    bank.network.get_submodule("conv1.0").weight = None  # type: ignore[assignment]
    with pytest.raises(PopupError, match=r"'conv1.0.weight' of the bank's network is gone"):
        bank.use("ants")


# Interruptions and threads


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Ctrl-C arrives once, at a write of a tensor."""
    count = iter(range(10**9))
    with monkeypatch.context() as patch:
        for cls in Kept, Whole:

            def write(self: Any, target: Tensor, real: Any = cls.write) -> None:
                if next(count) == after:
                    target.detach().fill_(7)
                    raise KeyboardInterrupt
                real(self, target)

            patch.setattr(cls, "write", write)
        yield


@pytest.mark.parametrize("after", [0, 3, 20])
def test_an_interrupted_switch_is_undone(after: int, bank: MaskBank, monkeypatch: pytest.MonkeyPatch) -> None:
    for before, name in ("bees", "cats"), ("cats", "bees"), (None, "ants"):
        bank.use(before)
        was = state(bank)
        with interrupted(monkeypatch, after), pytest.raises(KeyboardInterrupt):
            bank.use(name)
        assert bank.in_use == before
        assert unchanged(bank, was)
        with interrupted(monkeypatch, after), pytest.raises(KeyboardInterrupt), bank.using(name):
            pass
        assert unchanged(bank, was)


def test_using_goes_back(bank: MaskBank, make: Make) -> None:
    bank.use("bees")
    with bank.using("cats") as net:
        assert net is bank.network
        assert bank.in_use == "cats"
        same(net, load(make("cats", classes=7)))
    assert bank.in_use == "bees"
    same(bank.network, load(make("bees")))
    with pytest.raises(ZeroDivisionError), bank.using("ants"):
        raise ZeroDivisionError
    same(bank.network, load(make("bees")))


def test_a_thread_cannot_nest_two(bank: MaskBank) -> None:
    says = r"this thread is in a block of using\('ants'\)"
    with bank.using("ants"):
        for call in (
            lambda: bank.use("bees"), lambda: bank.using("bees").__enter__(), lambda: bank.predict(X, "bees"),
            lambda: bank.infer(X), lambda: bank.remove("bees"),
        ):  # fmt: skip
            with pytest.raises(PopupError, match=says):
                call()
        assert bank.in_use == "ants"
    bank.use("bees")


def test_threads_do_not_meet(bank: MaskBank, make: Make) -> None:
    expected = {name: load(make(name, classes=7 if name == "cats" else 10))(X).detach() for name in bank}
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait(PATIENCE)
        for i in range(6):
            with torch.no_grad():
                if i % 2:
                    output = bank.predict(X, name)
                else:
                    with bank.using(name) as net:
                        output = net(X)
            if not (isinstance(output, Tensor) and torch.equal(output, expected[name])):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ants", "bees", "cats", "ants")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not wrong
    assert bank.in_use is None


# Mixed batches


def test_a_mixed_batch(bank: MaskBank, make: Make) -> None:
    bank.use("bees")
    names = ["bees", "ants", "ants", "bees", "ants", "bees"]
    output = bank.predict(X, names)
    assert isinstance(output, Tensor)
    assert output.shape == (6, 10)
    assert not output.requires_grad
    for name in ("ants", "bees"):
        rows = torch.tensor([other == name for other in names])
        with torch.no_grad():
            assert torch.equal(output[rows], load(make(name))(X[rows]))
    assert bank.in_use == "bees"
    same(bank.network, load(make("bees")))
    several = bank.predict(X, ["cats", *names[1:]])
    assert isinstance(several, list)
    assert [len(row) for row in several] == [7, 10, 10, 10, 10, 10]
    assert bank.predict(X[:0], []) == []


def test_batches_that_are_refused(bank: MaskBank) -> None:
    with pytest.raises(ConversionError, match="there are 2 tasks for 6 images"):
        bank.predict(X, ["ants", "bees"])
    with pytest.raises(UnknownName, match="'antz'"):
        bank.predict(X, ["ants"] * 5 + ["antz"])
    with pytest.raises(ConversionError, match="images is a list"):
        bank.predict([X], ["ants"])  # type: ignore[arg-type]
    handle = bank.network.register_forward_hook(lambda module, inputs, output: {"logits": output})
    with pytest.raises(ConversionError, match="the network returned a dict for 6 images"):
        bank.predict(X, "ants")
    handle.remove()


# Memory


def test_memory_is_what_it_says(make: Make) -> None:
    files = {name: make(name) for name in ("ants", "bees")}
    bank = filled(MaskBank(files["ants"]), files)
    memory, manifest = bank.memory(), bank.manifest("ants")
    packed = sum(-(-entry.numel // 8) for entry in manifest.masked)
    assert memory.masks == {"ants": packed, "bees": packed}
    dense = sum(tensor.nbytes for tensor in bank.network.state_dict().values())
    assert memory.network == dense
    assert memory.base < dense / 8, "signs alone, and the norms"
    stored = {
        name: sum(len(data) for _, data in Artifact.open(file).contents.stored.values()) for name, file in files.items()
    }
    assert memory.own == stored
    assert memory.total == memory.network + memory.base + 2 * packed + sum(stored.values())
    held = MaskBank(make("normal", scheme="kaiming_normal")).memory()
    assert held.base == dense


def resident() -> int:
    """Memory of this process in bytes, and what is free in it given back."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_twenty_tasks_of_a_vit(tmp_path: Path) -> None:
    """At most twice the base, of each task a bit a weight and its own tensors, and 5 %."""
    name = "timm/vit_base_patch16_224"
    model = convert(build(name, num_classes=100), 0.5, scheme="kaiming_normal")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(torch.randn(module.weight.shape), alpha=0.01)
    manifest = save(model, tmp_path / "first")
    dense = sum(p.nbytes for key, p in model.state_dict().items() if not key.endswith("_score"))
    del model
    first, generator = Artifact.open(tmp_path / "first"), np.random.default_rng(0)
    stored = first.contents.stored
    for i in range(20):
        masks = {entry.name: generator.integers(0, 256, entry.numel // 8, np.uint8) for entry in manifest.masked}
        Artifact.of(manifest, masks, stored).write(tmp_path / f"{i}")
    own = sum(len(data) for _, data in stored.values()) + sum(entry.numel * 4 for entry in manifest.generated)
    weights = manifest.weights
    del first, stored, masks
    before = resident()
    bank = MaskBank(tmp_path / "0")
    for i in range(20):
        bank.add(str(i), tmp_path / f"{i}")
        bank.use(str(i))
    limit = 1.05 * (2 * dense + 20 * (weights / 8 + own))
    assert bank.memory().total <= limit
    assert resident() - before <= limit
    assert equal_states(bank.use("3"), load(tmp_path / "3"))
