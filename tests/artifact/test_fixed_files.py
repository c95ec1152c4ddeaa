"""Files of networks with fixed weights: in both encodings, for every reader, and from strangers."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from artifact.hostile import File, Net, apply, attempt, masked, take_apart, top
from masking.layers import with_scores
from popup_surgery import (
    Artifact,
    MaskBank,
    bake,
    build,
    combine,
    convert,
    evaluate,
    export,
    inspect,
    load,
    masks,
    model_card,
    overlap,
    repack,
    sanity,
    save,
    start_from,
    verify,
)
from popup_surgery.artifact import stored_masks
from popup_surgery.artifact.manifest import TensorSpec
from popup_surgery.artifact.mask_bytes import decode_mask, encode_mask, mask_sizes, obeys_fixed
from popup_surgery.codecs.bitpack import pack
from popup_surgery.errors import ArtifactError
from popup_surgery.weights.fixed import FREE, KEPT, Fixed
from support import GOLDEN, equal_states, golden_manifest, state_digest

VECTORS = json.loads((GOLDEN / "fixed.json").read_text(encoding="utf-8"))["vectors"]
SHARES = {"dropped": 0.5, "kept": 0.1}
ENCODINGS = ["bitpack", "range_coded"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, groups=24), nn.Flatten(), nn.Linear(24, 1)
    return nn.Sequential(*layers)


def converted(scores: int = 0, fixed: Any = SHARES, **more: Any) -> Any:
    """The same weights under masks of these scores."""
    return with_scores(convert(network(), 0.3, fixed=fixed, seed=5, **more), scores)


@pytest.fixture(params=ENCODINGS)
def file_of(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.popup.safetensors"
    save(converted(), path, encoding=request.param)
    return path


def test_golden_file() -> None:
    golden = json.loads((GOLDEN / "fixed.json").read_text(encoding="utf-8"))["artifact"]
    manifest = golden_manifest(golden)
    assert manifest.requires == ["range_coded", "fixed"]
    assert [entry.fixed for entry in manifest.masked][:2] == [Fixed(13, 3), Fixed(40, 9)]


def spec(n: int, fixed: Fixed, kept: int, stream: str = "weight", encoding: str = "bitpack") -> TensorSpec:
    return TensorSpec("w", stream, (n,), "F32", "signed_constant", 1.0, kept, encoding=encoding, fixed=fixed)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['n']}-{vector['fixed']}")
def test_vectors(vector: Any) -> None:
    """Of large ones the vectors have digests: of the mask under its first free weights."""
    n, fixed, seed = vector["n"], Fixed(**vector["fixed"]), int(vector["seed"])
    entry = spec(n, fixed, vector["kept"], vector["stream"])
    fates = np.concatenate([*fixed.fates(n, seed, vector["stream"])])
    mask, chosen = fates == KEPT, np.zeros(fixed.free(n), bool)
    chosen[np.random.default_rng(n).permutation(fixed.free(n))[: vector["kept"] - fixed.kept]] = True
    mask[fates == FREE] = chosen
    data = encode_mask(entry, seed, pack(mask))
    for name, packed in (("mask", pack(mask)), ("bitpack", data)):
        assert vector.get(name, packed.tobytes().hex()) == packed.tobytes().hex()
        digest = hashlib.sha256(packed.tobytes()).hexdigest()
        assert vector.get(f"{name}_sha256", digest) == digest
    assert np.array_equal(decode_mask(entry, seed, data), pack(mask))


@given(st.data(), st.integers(1, 700), st.integers(0, 99), st.sampled_from(ENCODINGS))
@settings(max_examples=60)
def test_what_is_encoded_is_decoded(data: st.DataObject, n: int, seed: int, encoding: str) -> None:
    dropped = data.draw(st.integers(0, n))
    fixed = Fixed(dropped, data.draw(st.integers(0, n - dropped)))
    kept = data.draw(st.integers(fixed.kept, n - dropped))
    entry, fates = spec(n, fixed, kept, encoding=encoding), np.concatenate([*fixed.fates(n, seed, "weight")])
    order = np.random.default_rng(seed).permutation(n)
    mask = fates == KEPT
    mask[[i for i in order if fates[i] == FREE][: kept - fixed.kept]] = True
    written = encode_mask(entry, seed, pack(mask))
    assert len(written) in mask_sizes(entry)
    free = fixed.free(n)
    limit = math.log2(math.comb(free, kept - fixed.kept))
    assert 8 * len(written) <= (1.001 * limit + 64 * 8 if encoding == "range_coded" else free + 7)
    assert np.array_equal(decode_mask(entry, seed, written), pack(mask))
    assert obeys_fixed(entry, seed, pack(mask))
    mask[order[0]] ^= True
    assert obeys_fixed(entry, seed, pack(mask)) == (fates[order[0]] == FREE)


def test_every_reader_takes_it(file_of: Path, tmp_path: Path) -> None:
    net = converted()
    plain = bake(net).eval()
    manifest, encoding = inspect(file_of), file_of.name.split(".")[0]
    assert manifest.requires == ["range_coded"] * (encoding == "range_coded") + ["fixed"]
    assert [entry.fixed for entry in manifest.masked] == [Fixed(324, 65), Fixed(108, 22), Fixed(12, 3)]
    assert verify(file_of, network())
    assert verify(file_of)
    assert equal_states(load(file_of, network()), plain)
    assert all(torch.equal(stored_masks(file_of)[name], mask) for name, mask in masks(net).items())
    assert all(each.kept_both == each.kept_a == each.kept_b for each in overlap(file_of, file_of).layers)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(load(file_of, network(), packed=True)(x), load(file_of, network())(x))
    again = convert(network(), 0.3, fixed=SHARES, seed=5)
    start_from(again, file_of)
    save(again, tmp_path / "again", encoding=encoding)
    assert (tmp_path / "again").read_bytes() == file_of.read_bytes()
    free = convert(network(), 0.3, seed=5)
    start_from(free, file_of)
    assert all(torch.equal(mask, masks(net)[name]) for name, mask in masks(free).items())
    bank = MaskBank(file_of, model=network())
    bank.add("task", file_of)
    assert equal_states(bank.use("task"), plain)


def test_digests_are_those_of_the_whole_masks(tmp_path: Path) -> None:
    net = converted()
    fixed = save(net, tmp_path / "fixed")
    other = convert(network(), 0.3, seed=5)
    start_from(other, tmp_path / "fixed")
    whole = save(other, tmp_path / "whole")
    assert (fixed.masks_sha256, fixed.weights_sha256) == (whole.masks_sha256, whole.weights_sha256)
    assert [entry.kept for entry in fixed.masked] == [entry.kept for entry in whole.masked]
    sizes = [Artifact.open(tmp_path / name).mask_bits or 0 for name in ("fixed", "whole")]
    assert sizes == [8 * (33 + 11 + 2), 8 * (81 + 27 + 3)], "of 648, 216 and 24 weights four in ten are free"


def test_repacking_changes_no_bit_of_the_network(tmp_path: Path) -> None:
    first = tmp_path / "bitpack"
    save(converted(), first, provenance={"of": "a test"})
    repack(first, tmp_path / "range_coded", encoding="range_coded")
    repack(tmp_path / "range_coded", tmp_path / "back", encoding="bitpack")
    assert (tmp_path / "back").read_bytes() == first.read_bytes()
    with pytest.raises(ArtifactError, match=r"the encoding pattern_coded is for masks of a pattern such as 2:4, and"):
        repack(first, tmp_path / "there", encoding="pattern_coded")


def test_a_combination_keeps_what_both_have_fixed(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(3)]
    for i, file in enumerate(files):
        save(converted(i, SHARES if i < 2 else None), file)
    for how in ("union", "intersection"):
        made = combine(files[:2], how).write(tmp_path / how)
        assert [entry.fixed for entry in made.masked] == [entry.fixed for entry in inspect(files[0]).masked]
    loose = combine([files[0], files[2]], "union").write(tmp_path / "loose")
    assert loose.requires == [], "one of the masks keeps weights that the other has fixed as dropped"
    both = [stored_masks(file) for file in (files[0], files[2])]
    expected = {key: both[0][key] | both[1][key] for key in both[0]}
    assert all(torch.equal(mask, expected[key]) for key, mask in stored_masks(tmp_path / "loose").items())


def test_a_layer_too_small_for_a_share_has_no_fixed_weights(tmp_path: Path) -> None:
    net = convert(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 8)), 0.9, fixed={"dropped": 0.1}, exclude=[])
    manifest = save(net, tmp_path / "net")
    assert [entry.fixed for entry in manifest.masked] == [None, None]
    assert manifest.requires == []


def test_learnt_signs_beside_it(tmp_path: Path) -> None:
    net = converted(learner="signed")
    manifest = save(net, tmp_path / "net", encoding="range_coded")
    assert manifest.requires == ["range_coded", "fixed", "sign"]
    assert equal_states(load(tmp_path / "net", network()), bake(net))
    assert verify(tmp_path / "net", network())


@pytest.mark.slow
def test_the_golden_file_in_other_formats(tmp_path: Path) -> None:
    path = GOLDEN / "fixed.popup.safetensors"
    export(path, tmp_path / "dense.safetensors")
    kwargs = inspect(path).architecture.kwargs
    dense = build("popup_surgery/conv2", pretrained=tmp_path / "dense.safetensors", **kwargs)
    assert equal_states(dense, load(path))
    done = export(path, tmp_path / "net.onnx", packed=True)
    assert not any("ternary" in layer.how for layer in done.layers), "they are, and only too small to gain from it"


def test_what_people_read_says_what_is_fixed(file_of: Path) -> None:
    assert "| fixed before training | 50.0 % of the weights dropped, 10.1 % kept |" in model_card(file_of)


# --- files that somebody else made -----------------------------------------------------------------------------------


@pytest.fixture(params=ENCODINGS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    path = tmp_path / "original"
    save(convert(Net(), 0.3, exclude="kept", seed=3, fixed=SHARES), path, encoding=request.param)
    return take_apart(path.read_bytes())


def fixed(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["masked"][0]["fixed"].update(change)


WRONG: dict[str, Callable[[File], object]] = {
    "more dropped than not kept": fixed(dropped=15),
    "more kept than all that are": fixed(kept=7),
    "more than there are": fixed(dropped=21),
    "a negative number": fixed(dropped=-1),
    "another negative number": fixed(kept=-1),
    "a huge number": fixed(dropped=10**30),
    "a float": fixed(dropped=10.0),
    "true": fixed(kept=True),
    "text": fixed(kept="2"),
    "nothing": fixed(kept=None),
    "none": fixed(dropped=0, kept=0),
    "a list": masked(0, fixed=[10, 2]),
    "a word": masked(0, fixed="half"),
    "null": masked(0, fixed=None),
    "empty": masked(0, fixed={}),
    "fewer kept than fixed": masked(0, kept=1),
    "beside a pattern": masked(0, pattern={"keep": 1, "of": 4, "channels": 4, "stride": 1}, kept=5),
    "an encoding of patterns": masked(0, encoding="pattern_coded"),
    "requires nothing": top(requires=[]),
    "requires more": top(requires=["fixed", "more"]),
    "bytes that are too many": lambda file: file.tensors.update({"first.weight.mask": ("U8", [4000], b"\1" * 4000)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", apply(file, WRONG[name], digest=False)).refused_at_once


@pytest.mark.parametrize("change", [fixed(dropped=9), fixed(dropped=11), fixed(kept=1), masked(0, stream="other")])
def test_other_fixed_weights_are_refused_by_the_digest(change: Any, file: File, tmp_path: Path) -> None:
    assert attempt(tmp_path / "f", apply(file, change, digest=False)).refused_with_data


def test_damaged_masks_are_refused(file: File, tmp_path: Path) -> None:
    for name in ("first.weight.mask", "last.weight.mask"):
        for place in range(len(file.tensors[name][2])):
            damaged = file.copy()
            kind, shape, data = damaged.tensors[name]
            changed = bytearray(data)
            changed[place] ^= 1
            damaged.tensors[name] = kind, shape, bytes(changed)
            assert attempt(tmp_path / "f", damaged.bytes()).refused_with_data


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**50, 2**50]])
def test_masks_of_no_bytes_for_huge_shapes_take_no_memory(
    shape: list[int], file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask whose weights are all fixed has no bytes."""

    def fates(*_: Any) -> Any:
        raise AssertionError("a mask was decoded")

    monkeypatch.setattr(Fixed, "fates", fates)
    n = math.prod(shape)
    data = apply(file, masked(1, shape=shape, kept=7, fixed={"dropped": n - 7, "kept": 7}), digest=False)
    taken = take_apart(data)
    taken.tensors["last.weight.mask"] = "U8", [0], b""
    tried = attempt(tmp_path / "f", taken.bytes())
    assert not isinstance(tried.inspected, ArtifactError), "the header is right"
    assert tried.refused_by_network
    assert "the masks and planes have more than 8,589,934,592 bits" in str(tried.verified)


def test_an_older_reader_refuses_it_in_a_sentence(file_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from popup_surgery.artifact import manifest

    monkeypatch.setattr(manifest, "FEATURES", tuple(name for name in manifest.FEATURES if name != "fixed"))
    with pytest.raises(ArtifactError, match="the file requires 'fixed', which this reader does not know"):
        inspect(file_of)


# --- the same network without fixed weights --------------------------------------------------------------------------


def images_of(path: Path) -> list[float]:
    return [evaluate(path).accuracy, *(one.accuracy for one in sanity(path, repeats=1, values=(1.0,)).variations)]


def infers(path: Path) -> dict[str, float]:
    bank = MaskBank(path)
    for name in ("a", "b"):
        bank.add(name, path)
    return {**bank.infer(torch.ones(2, 1, 8, 8), how="one_step").scores}


def exported(path: Path) -> list[bytes]:
    export(path, path.with_name(f"{path.name}.dense.safetensors"))
    state = load_file(path.with_name(f"{path.name}.dense.safetensors"))
    return [state[name].numpy().tobytes() for name in sorted(state)]


CONSUMERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: state_digest(load(path).state_dict()),
    "packed": lambda path: state_digest(load(path, packed=True).state_dict()),
    "verify": lambda path: [(name, holds) for name, holds, _ in verify(path).checks],
    "masks": lambda path: state_digest(masks(path)),
    "whole": lambda path: state_digest(Artifact.open(path).network(masked=False).state_dict()),
    "images": images_of,
    "infer": infers,
    "combine": lambda path: combine([path, path], "union").manifest.masks_sha256,
    "overlap": lambda path: overlap(path, GOLDEN / "artifacts" / "edge_popup.popup.safetensors").total,
    "export": exported,
    "density": lambda path: [entry.kept for entry in inspect(path).masked],
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_consumer_takes_it_as_the_whole_masks(consumer: str, tmp_path: Path) -> None:
    opened = Artifact.open(GOLDEN / "fixed.popup.safetensors")
    entries = tuple(replace(entry, fixed=None) for entry in opened.manifest.masked)
    whole = replace(opened.manifest, masked=entries)
    Artifact.of(whole, opened.contents.masks, opened.contents.stored).write(tmp_path / "whole")
    opened.write(tmp_path / "fixed")
    assert inspect(tmp_path / "whole").requires == ["range_coded"]
    assert CONSUMERS[consumer](tmp_path / "fixed") == CONSUMERS[consumer](tmp_path / "whole")
