"""Planes beside masks: every reader gives the weights that they make, or refuses them by name."""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import popup_surgery as ps
from artifact.hostile import File, Net, apply, attempt, both, drop, masked, same, take_apart, tensor, top
from docs.test_docs import reader
from native.decoder import COMPILER, Unpack
from native.decoder import build as build_decoder
from popup_surgery import Artifact, ArtifactError
from popup_surgery.analysis import sanity as sanity_module
from popup_surgery.artifact.planes import PLANES, Bits
from popup_surgery.codecs import CODECS
from popup_surgery.codecs.bitpack import pack, unpack_mask
from popup_surgery.codecs.generations import Reader, encode
from popup_surgery.sharing.summary import Summary
from support import GOLDEN, Outcome, golden_manifest, slow_except, state_digest, write_digit
from support import top as top_of

FILE = GOLDEN / "signed.popup.safetensors"
CONV2: dict[str, Any] = {"width": 0.25, "in_chans": 1, "img_size": 8}


# --- the vectors and the file of the format's page --------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_golden_files(index: int) -> None:
    golden = json.loads((GOLDEN / "planes.json").read_text(encoding="utf-8"))["artifacts"][index]
    assert golden_manifest(golden).requires == golden["requires"]
    read = reader()["read"](GOLDEN / golden["file"])
    page = {name: torch.from_numpy(np.asarray(array)) for name, array in read.items()}
    assert state_digest(page) == golden["state_dict_sha256"], "the page's reader"


def test_vectors() -> None:
    for vector in json.loads((GOLDEN / "planes.json").read_text(encoding="utf-8"))["vectors"]:
        values, expected = (np.frombuffer(bytes.fromhex(vector[key]), "<f4") for key in ("values", "effective"))
        mask = np.frombuffer(bytes.fromhex(vector["mask"]), np.uint8)
        planes = {kind: np.frombuffer(bytes.fromhex(data), np.uint8) for kind, data in vector["planes"].items()}
        for size in (8, 64, 4096):
            pieces = (values[start : start + size] for start in range(0, len(values), size))
            found = np.concatenate([*Bits(mask, planes).effective(pieces)])
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("scheme", ["pretrained", "signed_kaiming_constant", "kaiming_normal"])
def test_the_pages_reader_reads_signs(scheme: str, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
    with torch.no_grad():
        next(plain.parameters()).view(-1)[:20] = 0  # which have a sign too
    base = {name: value.clone().numpy() for name, value in plain.state_dict().items()}
    model = ps.convert(plain, {"*": 0.3, "2": 1.0}, scheme=scheme, learner="signed")
    ps.save(model, tmp_path / "net")
    state = reader()["read"](tmp_path / "net", base)
    for name, value in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == value.numpy().tobytes()


# --- every reader with every kind -------------------------------------------------------------------------------------

SHARES = [0.25, 0.08, 0.03]
KINDS: dict[str, dict[str, Any]] = {
    "sign": {"learner": "signed"}, "coats": {"learner_options": {"coats": SHARES}}, "generation": {},
    "source": {},
}  # fmt: skip
PLANES_OF = {"sign": ("sign",), "coats": ("coat2", "coat3"), "generation": ("generation",), "source": ("source",)}
CODED = ("generation", "source")  # what weights have that were drawn again, or copied


def planes_of(kind: str, scheme: str) -> tuple[str, ...]:
    """What a file has. A constant that was drawn again or copied has another sign at most."""
    return ("sign",) if kind in CODED and "constant" in scheme else PLANES_OF[kind]


def sign(weight: Tensor, score: Tensor, k: float) -> Tensor:
    mask = top_of([score], round(k * score.numel()))[0]
    return torch.where(mask, weight * score.sign(), torch.zeros(()))


def coats_of(score: Tensor, shares: list[float]) -> Tensor:
    """How many coats each weight has."""
    n = score.numel()
    return sum(top_of([score], n - int((1 - share) * n))[0].float() for share in shares)  # type: ignore[return-value]


def coats(weight: Tensor, score: Tensor, k: float) -> Tensor:
    return weight * coats_of(score, [k, *SHARES[1:]]) + 0


def rescored(net: nn.Module, kind: str, seed: int = 6) -> nn.Module:
    """The network with other scores, and with weights that were drawn again or copied under those before."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, 4 if kind in CODED else 2):
        if step > 1:
            {"generation": ps.redraw, "source": ps.recycle}[kind](net, step, every=1, share=0.3)
        for name, parameter in net.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def agreeing(net: nn.Module) -> None:
    """Make nine of ten learnt signs positive, so that it saves bytes to code them."""
    raw, generator = net.state_dict(), torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if name.endswith("_score"):
            signs = torch.where(torch.rand(parameter.shape, generator=generator) < 0.9, 1.0, -1.0)
            parameter.data.copy_(parameter.abs() * raw[name.removesuffix("_score")].sign() * signs)


def plain(weight: Tensor, score: Tensor, k: float) -> Tensor:
    return torch.where(top_of([score], round(k * score.numel()))[0], weight, torch.zeros(()))


def converted(kind: str, scheme: str, seed: int = 6) -> nn.Module:
    """A network whose scores are not those of its seed, with running statistics of its own."""
    net = ps.convert(ps.build("popup_surgery/conv2", **CONV2), 0.25, scheme=scheme, **KINDS[kind])
    return rescored(net, kind, seed)


def independent(net: nn.Module, kind: str) -> dict[str, Tensor]:
    """What a file must give, from the network's tensors alone."""
    entries = {name: value.detach() for name, value in net.state_dict().items()}
    rule = {"sign": sign, "coats": coats, "generation": plain, "source": plain}[kind]
    return {
        name: rule(value, entries[f"{name}_score"], 0.25) if f"{name}_score" in entries else value
        for name, value in entries.items()
        if not name.endswith(("_score", "_generation", "_source"))
    }


class Case:
    """One file of a kind, and what readers must give for it."""

    def __init__(self, kind: str, scheme: str, folder: Path, encoding: str = "bitpack") -> None:
        self.kind, self.scheme, self.folder, self.planes = kind, scheme, folder, planes_of(kind, scheme)
        self.encoding = encoding
        self.net = converted(kind, scheme)
        if kind == "sign" and encoding != "bitpack":
            agreeing(self.net)
        self.path = self.save("net", encoding)
        self.coded = any(entry.plane_ones for entry in ps.inspect(self.path).masked)
        assert self.coded == (encoding != "bitpack")
        self.state = independent(self.net, kind)
        self.plain = ps.build("popup_surgery/conv2", **CONV2).eval()
        self.plain.load_state_dict(self.state)
        self.image = folder / "digit.png"
        write_digit(self.image, 4)

    def save(self, name: str, encoding: str) -> Path:
        path = self.folder / f"{name}.popup.safetensors"
        about = dict(ps.inspect(FILE).provenance)
        ps.save(self.net, path, probe=(1, 1, 8, 8), provenance=about, encoding=encoding)
        return path

    def check(self, net: nn.Module) -> None:
        found = net.state_dict()
        assert found.keys() == self.state.keys()
        for name, value in self.state.items():
            assert torch.equal(found[name], value), name
            assert torch.equal(found[name].signbit(), value.signbit()), name

    @property
    def outputs(self) -> Tensor:
        with torch.no_grad():
            return self.plain(self.images)

    @property
    def images(self) -> Tensor:
        return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def of_load(case: Case) -> None:
    case.check(ps.load(case.path))
    case.check(ps.load(case.path, ps.build("popup_surgery/conv2", **CONV2)))
    case.check(ps.bake(case.net))


def of_verify(case: Case) -> None:
    assert ps.verify(case.path)
    file = take_apart(case.path.read_bytes())
    masks = file.manifest["masks_sha256"]
    entry = next(e for e in file.manifest["masked"] if e["kept"] > 8 and ("plane_ones" in e or not case.coded))
    name = f"{entry['name']}.{entry['planes'][0]}"
    dtype, _, data = file.tensors[name]
    other = bytes([data[0] ^ 1]) + data[1:]
    if case.planes == ("generation",):
        of_each = Reader(np.frombuffer(data, np.uint8), entry["kept"]).take(entry["kept"])
        other = encode(np.roll(of_each, 1)).tobytes()
    elif case.planes == ("source",):  # the lowest bit of the first index, after how many there are
        front = (entry["kept"].bit_length() + 7) // 8
        other = data[:front] + bytes([data[front] ^ 1]) + data[front + 1 :]
    if case.coded:
        about = (entry["kept"],), entry["plane_ones"][0]
        bits = unpack_mask(CODECS["range_coded"].to_bits(np.frombuffer(data, np.uint8), *about), about[0])
        other = CODECS["range_coded"].to_bytes(pack(np.roll(bits, 1)), *about).tobytes()
    file.tensors[name] = dtype, [len(other)], other
    file.digest()
    file.manifest["masks_sha256"] = masks  # over packed bits, however they are coded
    (case.folder / "other").write_bytes(file.bytes())
    verified = ps.verify(case.folder / "other")
    assert not verified, "weights_sha256 is over the weights that planes make"
    assert "do not match weights_sha256" in str(verified)


def of_whole(case: Case) -> None:
    """Without masks, planes say nothing either."""
    whole = Artifact.open(case.path).network(masked=False).state_dict()
    raw = ps.convert(ps.build("popup_surgery/conv2", **CONV2), 0.25, scheme=case.scheme).state_dict()
    assert all(torch.equal(value, raw[name]) for name, value in whole.items())


def of_masks(case: Case) -> None:
    expected = {name: case.state[name] != 0 for name in ps.masks(case.net)}
    for found in (ps.masks(case.path), ps.masks(case.net)):
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    entries = {entry.name: entry for entry in ps.inspect(case.path).masked}
    assert all(entries[name].kept == int(mask.sum()) for name, mask in expected.items())
    digest = hashlib.sha256(b"".join(pack(mask.numpy()).tobytes() for mask in expected.values()))
    assert ps.inspect(case.path).masks_sha256 == digest.hexdigest()


def of_packed(case: Case) -> None:
    net = ps.load(case.path, packed=True)
    with torch.no_grad():
        assert torch.equal(net(case.images), case.outputs)
    case.check(net)


def of_bank(case: Case) -> None:
    """Beside a plain task on the same weights, on a base that is one of the two files."""
    other = case.folder / "plain.popup.safetensors"
    net = ps.convert(ps.build("popup_surgery/conv2", **CONV2), 0.25, scheme=case.scheme)
    ps.save(net, other, encoding=case.encoding)
    for base in (case.path, other):
        bank = ps.MaskBank(base)
        bank.add("planes", case.path)
        bank.add("plain", other)
        assert bank.memory().masks["planes"] > bank.memory().masks["plain"]
        for _ in range(2):
            case.check(bank.use("planes"))
            assert state_digest(bank.use("plain").state_dict()) == state_digest(ps.load(other).state_dict())
        outputs = bank.predict(case.images, "planes")
        assert isinstance(outputs, Tensor)
        assert torch.equal(outputs, case.outputs)


def of_infer(case: Case) -> None:
    """The mean of the tasks' weights, and its gradient, as an average of plain networks has them."""
    paths = [case.path]
    for seed in (1, 2):
        net = converted(case.kind, case.scheme, seed)
        paths.append(case.folder / f"{seed}.popup.safetensors")
        ps.save(net, paths[-1])
    bank = ps.MaskBank(case.path)
    for path in paths:
        bank.add(path.name, path)
    found = bank.infer(case.images, how="one_step").scores
    states = [ps.load(path).state_dict() for path in paths]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0).requires_grad_() for name in ps.masks(case.net)
    }
    logs = torch.func.functional_call(case.plain, {**case.state, **mean}, (case.images,)).log_softmax(1)
    (-(logs.exp() * logs).sum(1).mean()).backward()
    for path, state in zip(paths, states, strict=True):
        fall = -sum(float((value.grad * state[name]).sum()) for name, value in mean.items())
        assert found[path.name] == pytest.approx(fall, rel=1e-3, abs=1e-7)


def of_sanity(case: Case) -> None:
    states: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, *rest: Any) -> tuple[float, int]:
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return 0.0, 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity_module, "accuracy_of", spy)
        found = ps.sanity(case.path, repeats=1, values=(-2.0,))
    as_it_is, seeds, shuffled, inverted, shared = states
    assert [one.change for one in found.variations] == [
        "as it is", "other seeds", "mask shuffled", "mask inverted", "all weights"
    ]  # fmt: skip
    raw, first = case.net.state_dict(), Artifact.open(case.path).network(masked=False).state_dict()
    for place, name in enumerate(ps.masks(case.net)):
        mask, m = case.state[name] != 0, case.state[name].sign()
        raw[name] = torch.where(mask, raw[name], first[name])  # as far as the file says
        base = raw[name].abs()
        if case.planes[0] in CODED:
            m, base = mask.float(), raw[name]
        if case.kind == "coats":
            m, base = coats_of(case.net.state_dict()[f"{name}_score"], SHARES), raw[name]
        assert torch.equal(as_it_is[name], case.state[name])
        assert torch.equal(seeds[name] != 0, mask)
        assert not torch.equal(seeds[name], as_it_is[name]) or (case.planes == ("sign",) and "constant" in case.scheme)
        if case.planes == ("sign",):
            assert torch.equal(seeds[name].sign(), m), "learnt signs stay"
        elif "constant" in case.scheme:
            assert torch.equal(seeds[name].abs(), as_it_is[name].abs()), "coats stay"
        assert torch.equal(inverted[name], torch.where(mask, torch.zeros(()), raw[name]))
        assert torch.equal(shared[name], -2 * m)
        order = torch.from_numpy(np.random.default_rng([0, place]).permutation(mask.numel()))
        moved = m.view(-1)[order].view(m.shape)
        assert torch.equal(shuffled[name], base * moved + 0)


def of_images(case: Case) -> None:
    result = ps.evaluate(case.path)
    ps.export(case.path, case.folder / "dense.safetensors")
    assert ps.evaluate(case.folder / "dense.safetensors").accuracy == result.accuracy
    (classes,) = ps.predict(case.path, [case.image])
    (expected,) = ps.predict(case.folder / "dense.safetensors", [case.image])
    assert [name for name, _ in classes] == [name for name, _ in expected]
    assert [share for _, share in classes] == pytest.approx([share for _, share in expected], rel=1e-5)


def of_dense(case: Case) -> None:
    ps.export(case.path, case.folder / "dense.safetensors")
    case.check(ps.build("popup_surgery/conv2", pretrained=case.folder / "dense.safetensors", **CONV2))


def of_packed_onnx(case: Case) -> None:
    """Signed constants stay ternary: their products are packed exactly."""
    net = ps.build("popup_surgery/conv2", **{**CONV2, "width": 1.0})  # large enough to gain from it
    wide = case.folder / "wide.popup.safetensors"
    net = ps.convert(net, 0.25, scheme=case.scheme, **KINDS[case.kind])
    ps.save(rescored(net, case.kind) if case.kind in CODED else net, wide, probe=(1, 1, 8, 8))
    done = ps.export(wide, case.folder / "net.onnx", packed=True)
    how = {layer.name: layer.how for layer in done.layers}
    ternary = "constant" in case.scheme and case.kind != "coats"
    assert any(said in ("2 bits", "int8") for said in how.values()) == ternary, how


def of_repack(case: Case) -> None:
    there, back = case.folder / "there", case.folder / "back"
    manifest = ps.repack(case.path, there, encoding="range_coded")
    assert manifest.requires == ["range_coded", *["coded_planes"] * (case.coded or case.kind == "coats"), *case.planes]
    case.check(ps.load(there))
    assert ps.verify(there)
    ps.repack(there, back, encoding="bitpack")
    assert back.read_bytes() == case.save("packed", "bitpack").read_bytes()
    assert there.read_bytes() == case.save("coded", "range_coded").read_bytes()
    Artifact.open(there).write(back)
    assert back.read_bytes() == there.read_bytes(), "as they are"


def of_bank_of_coded_masks(case: Case) -> None:
    there = case.folder / "there"
    ps.repack(case.path, there, encoding="range_coded")
    bank = ps.MaskBank(there)
    bank.add("coded", there)
    sizes = Artifact.open(there).sizes
    assert sizes is not None
    assert bank.memory().masks["coded"] == sizes.masks + sizes.planes
    case.check(bank.use("coded"))


def of_start(case: Case) -> None:
    net = ps.convert(ps.build("popup_surgery/conv2", **CONV2), 0.25, scheme=case.scheme, **KINDS[case.kind])
    ps.start_from(net, case.path)
    case.check(ps.bake(net))


def of_page(case: Case) -> None:
    found = reader(7)["read"](case.path)
    assert all(found[name].tobytes() == value.numpy().tobytes() for name, value in case.state.items())


def of_decoder(case: Case) -> None:
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    unpack = Unpack(build_decoder(case.folder), case.folder)
    said = unpack.refusal(case.path.read_bytes())
    named = ",".join(f'"{kind}"' for kind in ps.inspect(case.path).requires)
    assert said == f"the file needs a newer reader: version 1, requires [{named}]"


def of_combine(case: Case) -> None:
    for files in ([case.path, case.path], [FILE, case.path]):
        ps.combine(files, "union")


def of_overlap(case: Case) -> None:
    """It compares the bit "takes part" alone."""
    other = case.folder / "opposite"
    net = copy.deepcopy(case.net)
    for name, parameter in net.named_parameters():
        if name.endswith("_score"):
            parameter.data.neg_()
    ps.save(net, other)
    assert ps.load(other).state_dict().keys() == case.state.keys()
    total = ps.overlap(case.path, other).total
    assert (total.kept_both, total.one) == (total.kept_a, 0.0)


def of_other_masks(case: Case) -> None:
    opened = Artifact.open(case.path)
    Artifact.of(opened.manifest, opened.contents.masks, opened.contents.stored)


def of_summary(case: Case) -> None:
    summary = Summary.of(Artifact.open(case.path))
    assert summary.dense == 4 * sum(value.numel() for value in case.state.values())
    assert summary.size == case.path.stat().st_size


def of_inspect(case: Case) -> None:
    sizes = Artifact.open(case.path).sizes
    assert sizes is not None
    assert sizes.total == case.path.stat().st_size
    entries = ps.inspect(case.path).masked
    tensors = take_apart(case.path.read_bytes()).tensors
    assert sizes.masks == sum(len(tensors[f"{entry.name}.mask"][2]) for entry in entries)
    assert sizes.planes == sum(len(tensors[f"{entry.name}.{kind}"][2]) for entry in entries for kind in entry.planes)
    if case.planes == ("generation",):
        assert 0 < 8 * sizes.planes < 2 * sum(entry.kept or 0 for entry in entries)
    elif case.planes == ("source",):
        assert 0 < 8 * sizes.planes < 16 * sum(entry.kept or 0 for entry in entries)
    elif case.planes == ("sign",):
        bits = sum(-(-(entry.kept or 0) // 8) for entry in entries)
        assert sizes.planes < bits if case.coded else sizes.planes == bits
    else:
        inner = [entry.numel - int((1 - SHARES[1]) * entry.numel) for entry in entries]
        bits = sum(-(-(entry.kept or 0) // 8) for entry in entries) + sum(-(-n // 8) for n in inner)
        assert sizes.planes < bits if case.coded else sizes.planes == bits


CONSUMERS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("of_"): value for name, value in globals().items() if name.startswith("of_")
}
NO_COMBINE = r"'features\.0\.weight' has the plane '{kind}', so its weights are not those of the seed or base alone"
REFUSED: dict[tuple[str, ...], str] = {
    **dict.fromkeys([("combine", kind) for kind in KINDS], NO_COMBINE),
    **dict.fromkeys(
        [("other_masks", kind) for kind in KINDS],
        r"'features\.0\.weight' has the plane '{kind}', which is for another mask",
    ),
    **dict.fromkeys(
        [("bank", "coats"), ("infer", "coats"), ("bank_of_coded_masks", "coats")],
        r"'features\.0\.weight' has the plane 'coat2', so its weights are not those of the base; a bank takes",
    ),
    ("packed", "coats"): r"'features\.0\.weight' has the planes coat2, coat3, and its values are more than −c, 0 and c",
    **dict.fromkeys(
        [(name, kind, "kaiming_normal") for name in ("bank", "infer", "bank_of_coded_masks") for kind in CODED],
        r"'features\.0\.weight' has the plane '{kind}', so its weights are not those of the base; a bank takes",
    ),
    ("packed", "kaiming_normal"): "the values of 'features.0.weight' are normal, not one constant; packed=True takes",
}


def test_inspect_says_where_the_bytes_go(cli: Callable[..., Outcome]) -> None:
    told = cli("inspect", FILE)
    assert told.status == 0
    assert "masks: bitpack, 1.024 bits a weight\nplanes: sign, 1.077 bits a kept weight\n" in told.out
    size = FILE.stat().st_size
    said = re.search(
        r"^bytes: masks (\S+), planes (\S+), stored tensors (\S+), manifest and header (\S+);", told.out, re.M
    )
    assert said is not None
    parts = [int(number.replace(",", "")) for number in said.groups()]
    assert sum(parts) == size
    assert parts[:3] == [132, 42, 0]
    assert f"; {size:,} in all\n" in told.out
    assert '"planes": [' in cli("inspect", FILE, "--json").out


def test_all_kinds_are_tried() -> None:
    assert {kind for kinds in PLANES_OF.values() for kind in kinds} == set(PLANES[:5])
    assert ("source", "generation", "sign", *(f"coat{i}" for i in range(2, 9))) == PLANES


@pytest.mark.parametrize(
    ("consumer", "scheme"),
    slow_except(
        product(CONSUMERS, ("signed_kaiming_constant", "kaiming_normal")),
        [
            *((consumer, "signed_kaiming_constant") for consumer in set(CONSUMERS) - {"packed_onnx"}),
            *((consumer, "kaiming_normal") for consumer in ("bank", "packed")),
        ],
    ),
)
@pytest.mark.parametrize(
    ("kind", "encoding"),
    [
        *((kind, "bitpack") for kind in KINDS),
        *(pytest.param(kind, "range_coded", marks=pytest.mark.slow) for kind in ("sign", "coats")),
    ],
)
def test_every_reader_takes_it_or_refuses_it(
    kind: str, encoding: str, consumer: str, scheme: str, tmp_path: Path
) -> None:
    case = Case(kind, scheme, tmp_path, encoding)
    known = ((consumer, scheme), (consumer, kind), (consumer, kind, scheme))
    says = next((REFUSED[case] for case in known if case in REFUSED), None)
    if says is None:
        CONSUMERS[consumer](case)
        return
    with pytest.raises(ArtifactError, match=says.format(kind=planes_of(kind, scheme)[0])) as caught:
        CONSUMERS[consumer](case)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 5)).to(dtype)

    net = rescored(ps.convert(plain(), 0.25, scheme="kaiming_normal", **KINDS[kind]), kind)
    manifest = ps.save(net, tmp_path / "net", probe=(1, 70))
    found, expected = ps.load(tmp_path / "net", plain()).state_dict(), ps.bake(net).state_dict()
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in expected.items())
    assert ps.verify(tmp_path / "net", plain())
    assert manifest.requires == [*PLANES_OF[kind]]
    if kind != "sign":
        return
    bank = ps.MaskBank(Artifact.open(tmp_path / "net"), model=plain())
    bank.add("net", tmp_path / "net")
    assert all(torch.equal(value, expected[name]) for name, value in bank.use("net").state_dict().items())


@pytest.mark.parametrize("encoding", ["bitpack", "range_coded", "pattern_coded"])
def test_signs_beside_a_pattern(encoding: str, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8, 3))

    net = ps.convert(plain(), pattern="2:4", learner="signed")
    manifest = ps.save(net, tmp_path / "net", encoding=encoding)
    assert manifest.requires == [*([] if encoding == "bitpack" else [encoding]), "sign"]
    found, expected = ps.load(tmp_path / "net", plain()).state_dict(), ps.bake(net).state_dict()
    page = reader(decoders=2)["read"](tmp_path / "net")
    assert found.keys() == expected.keys() == page.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert page[name].tobytes() == value.numpy().tobytes()


def test_a_key_where_a_plane_must_stand_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight.sign"] = torch.ones(3)

    net = ps.convert(nn.Sequential(Odd(4, 3)), learner="signed")
    says = r"0\.weight\.sign is a state_dict entry of its own, where the sign of 0\.weight must stand"
    with pytest.raises(ArtifactError, match=says):
        ps.save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())
    ps.save(ps.convert(nn.Sequential(Odd(4, 3))), tmp_path / "net")  # where none must


# --- files that somebody else made ------------------------------------------------------------------------------------


@pytest.fixture(params=["bitpack", "range_coded"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    path = tmp_path / "original"
    model = ps.convert(Net(), exclude="kept", seed=3, k={"*": 0.5, "last": 1.0}, learner="signed")
    ps.save(model, path, encoding=request.param)
    return take_apart(path.read_bytes())


def resized(by: int) -> Callable[[File], object]:
    def change(file: File) -> None:
        _, (size,), data = file.tensors["first.weight.sign"]
        file.tensors["first.weight.sign"] = "U8", [size + by], (data + b"\0")[: size + by]

    return change


@pytest.fixture(params=["bitpack", "range_coded"])
def coated(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    path = tmp_path / "original"
    ps.save(ps.convert(Net(), 0.6, exclude="kept", seed=3, learner_options={"coats": [0.6, 0.5, 0.2]}), path)
    ps.repack(path, path, encoding=request.param)
    return take_apart(path.read_bytes())


OF_COATS: dict[str, tuple[Callable[[File], object], str]] = {
    "a byte more for the first": (
        tensor("first.weight.coat2", "U8", [3], b"\0\0\0"),
        r"'first\.weight\.coat2' is U8 \[3\]; expected U8 \[2\] for 12 kept weights",
    ),
    "a byte more for the second": (
        tensor("first.weight.coat3", "U8", [3], b"\0\0\0"),
        r"'first\.weight\.coat3' is U8 \[3\]; expected U8 \[0 to 2\] for 12 kept weights",
    ),
    "a byte less for the second": (
        tensor("first.weight.coat3", "U8", [1], b"\0"),
        r"'first\.weight\.coat3' has 1 bytes; expected 2 for 10 weights",
    ),
    "fewer weights in the coat before": (
        tensor("first.weight.coat2", "U8", [2], b"\0\1"),
        r"'first\.weight\.coat3' has 2 bytes; expected 1 for 1 weights",
    ),
    "trailing bits": (
        tensor("first.weight.coat3", "U8", [2], b"\0\x80"),
        r"'first\.weight\.coat3' has padding bits that are not 0",
    ),
    "a gap": (
        both(masked(0, planes=["coat3"]), masked(1, planes=["coat3"]), drop("first.weight.coat2")),
        r"masked\[0\]\.planes is \['coat3'\]; expected a list of some of sign, .*, without gaps between coats",
    ),
    "another order": (masked(0, planes=["coat3", "coat2"]), r"masked\[0\]\.planes is \['coat3', 'coat2'\]; expected"),
    "a ninth coat": (masked(0, planes=["coat2", "coat9"]), r"masked\[0\]\.planes is \['coat2', 'coat9'\]; expected"),
}


@pytest.mark.parametrize("name", OF_COATS)
def test_coats_that_are_refused(name: str, coated: File, tmp_path: Path) -> None:
    change, says = OF_COATS[name]
    tried = attempt(tmp_path / "f", apply(coated, change))
    assert tried.refused_with_data
    assert re.search(says, str(tried.loaded)), tried.loaded
    assert attempt(tmp_path / "f", coated.bytes()).verified


def padded(file: File) -> None:
    """The first mask keeps 10 weights."""
    dtype, shape, data = file.tensors["first.weight.sign"]
    file.tensors["first.weight.sign"] = dtype, shape, data[:-1] + bytes([data[-1] | 0x80])


WRONG: dict[str, tuple[Callable[[File], object], str]] = {
    "a byte less": (resized(-1), r"'first\.weight\.sign' is U8 \[1\]; expected U8 \[2\] for 10 kept weights"),
    "a byte more": (resized(1), r"'first\.weight\.sign' is U8 \[3\]; expected U8 \[2\] for 10 kept weights"),
    "another dtype": (tensor("first.weight.sign", "I8", [2], b"\0\0"), r"'first\.weight\.sign' is I8 \[2\]; expected"),
    "two axes": (tensor("first.weight.sign", "U8", [2, 1], b"\0\0"), r"is U8 \[2, 1\]; expected U8 \[2\]"),
    "none": (drop("first.weight.sign"), r"'first\.weight' has no plane 'sign'; expected the tensor 'first\.weight\.s"),
    "an unknown kind": (
        masked(0, planes=["size"]),
        r"masked\[0\]\.planes is \['size'\]; expected a list of some of sign, coat2",
    ),
    "an unknown kind that requires names": (
        both(masked(0, planes=["size"]), top(requires=["size"])),
        r"the file requires 'size', which this reader does not know",
    ),
    "a kind twice": (masked(0, planes=["sign", "sign"]), r"masked\[0\]\.planes is \['sign', 'sign'\]; expected a list"),
    "no kind": (
        masked(0, planes=[]),
        r"masked\[0\]\.planes is \[\]; expected a list of some of sign, coat2",
    ),
    "no list": (
        masked(0, planes="sign"),
        r"masked\[0\]\.planes is 'sign'; expected a list of some of sign, coat2",
    ),
    "null": (
        masked(0, planes=None),
        r"masked\[0\]\.planes is None; expected a list of some of sign, coat2",
    ),
    "lists in the list": (masked(0, planes=[["sign"]]), r"masked\[0\]\.planes is \[\['sign'\]\]; expected a list"),
    "requires nothing": (top(requires=[]), r"requires is \[\]; expected \[.*'sign'\], as the encodings and planes say"),
    "requires it twice": (
        lambda file: file.manifest["requires"].append("sign"),
        r"requires is \[.*'sign', 'sign'\]; expected \[.*'sign'\], as",
    ),
    "the name of a constant": (
        lambda file: file.manifest["constants"].update(
            {"first.weight.sign": {"shape": [1], "dtype": "F32", "value": 1.0}}
        ),
        r"'first\.weight\.sign' is among the stored tensors, and in the manifest's lists too",
    ),
    "the target of an alias": (
        lambda file: file.manifest["aliases"].update({"tied.weight": "first.weight.sign"}),
        r"aliases\['tied\.weight'\] is 'first\.weight\.sign', which the file does not hold",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    change, says = WRONG[name]
    tried = attempt(tmp_path / "f", apply(file, change, digest=False))
    assert tried.refused_at_once
    assert re.search(says, str(tried.loaded)), tried.loaded


def test_trailing_bits_are_refused(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", apply(file, padded))
    assert tried.refused_with_data
    assert str(tried.loaded).endswith("'first.weight.sign' has padding bits that are not 0")
    with pytest.raises(ArtifactError, match="padding bits"):
        ps.masks(tmp_path / "f")


def test_a_plane_that_was_changed_is_refused(file: File, tmp_path: Path) -> None:
    flipped = file.copy()
    dtype, shape, data = flipped.tensors["last.weight.sign"]
    flipped.tensors["last.weight.sign"] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
    tried = attempt(tmp_path / "f", flipped.bytes())
    assert tried.refused_with_data
    assert "tensors_sha256 does not match" in str(tried.loaded)


@pytest.mark.parametrize("name", ["kept.weight", "table.weight", "first.bias", "nothing"])
def test_a_plane_for_what_is_not_masked_is_refused(name: str, file: File, tmp_path: Path) -> None:
    added = apply(file, tensor(f"{name}.sign", "U8", [1], b"\1"))
    assert attempt(tmp_path / "f", added).refused_by_network
    whole = file.copy()
    for entry in whole.manifest["masked"]:
        del entry["planes"]
    whole.manifest["requires"] = [each for each in whole.manifest["requires"] if each != "sign"]
    tried = attempt(tmp_path / "f", whole.bytes())
    assert tried.refused_by_network, "planes that no entry names"
    assert "'first.weight.sign'" in str(tried.loaded)


def test_the_file_itself_is_read(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", file.bytes())
    assert tried.verified
    assert same(tried.loaded, tried.loaded.state_dict())
    assert {entry.planes for entry in tried.inspected.masked} == {("sign",)}
    nothing = replace(tried.inspected.masked[0], planes=())
    assert "planes" not in nothing.text()
