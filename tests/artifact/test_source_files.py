"""Files of weights that were copied: the golden one, and those that somebody else made."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import popup_surgery as ps
from artifact.hostile import File, Net, attempt, both, drop, masked, take_apart, tensor, top
from docs.test_docs import reader
from popup_surgery.codecs.sources import encode
from support import GOLDEN, golden_manifest, state_digest

FILE = GOLDEN / "source.popup.safetensors"
NAME = "first.weight.source"


def test_the_golden_file() -> None:
    golden = json.loads((GOLDEN / "source.json").read_text(encoding="utf-8"))["artifact"]
    assert golden_manifest(golden).requires == golden["requires"] == ["range_coded", "source"]
    page = {name: torch.from_numpy(np.asarray(array)) for name, array in reader(7)["read"](FILE).items()}
    assert state_digest(page) == golden["state_dict_sha256"], "the page's reader"
    with pytest.raises(ValueError, match="needs a newer reader"):
        reader(6)["read"](FILE)


def rewritten(model: nn.Module, redraws: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3, 4):
        for name, parameter in model.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
        if redraws and step < 4:
            ps.redraw(model, step, every=1, share=0.4)
        if step < 4:
            ps.recycle(model, step, every=1, share=0.3)
    return model


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform"])
def test_the_page_reads_what_was_drawn_again_and_copied(scheme: str, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(37, 101), nn.Linear(101, 3))
    model = rewritten(ps.convert(plain, 0.6, scheme=scheme), redraws=True)
    assert ps.save(model, tmp_path / "net").requires == ["source", "generation"]
    state = reader(7)["read"](tmp_path / "net")
    for name, value in ps.bake(model).state_dict().items():
        assert state[name].tobytes() == value.numpy().tobytes()


@pytest.fixture(params=["bitpack", "range_coded"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    model = rewritten(ps.convert(Net(), 0.5, exclude="kept", seed=3, scheme="kaiming_normal"))
    ps.save(model, tmp_path / "original", encoding=request.param)
    return take_apart((tmp_path / "original").read_bytes())


def raw(data: bytes) -> Callable[[File], object]:
    return tensor(NAME, "U8", [len(data)], data)


def bytes_of(own: list[int], sources: list[int], n: int) -> Callable[[File], object]:
    return raw(encode(np.array(own), np.array(sources), n).tobytes())


def changed(file: File, change: Callable[[File], object]) -> bytes:
    """The file after a change of its planes alone, which its digests allow."""
    other = file.copy()
    change(other)
    masks = other.manifest["masks_sha256"]
    other.digest()
    other.manifest["masks_sha256"] = masks  # over packed bits, however they are coded
    return other.bytes()


TEN = [*range(10)]
ONE = encode(np.arange(10), np.array([1, *range(1, 10)]), 20).tobytes()  # 5 bits of its second byte are the index
AT_ONCE: dict[str, tuple[Callable[[File], object], str]] = {
    "nothing": (raw(b""), r"'first\.weight\.source' is U8 \[0\]; expected U8 \[2 to \d\d\] for 10 kept weights"),
    "more than it can have": (raw(bytes(200)), r"is U8 \[200\]; expected U8 \[2 to \d\d\] for 10 kept weights"),
    "another dtype": (tensor(NAME, "I8", [8], bytes(8)), r"'first\.weight\.source' is I8 \[8\]; expected U8"),
    "no plane": (drop(NAME), r"'first\.weight' has no plane 'source'; expected the tensor 'first\.weight\.source"),
    "no name": (top(requires=[]), r"requires is \[\]; expected \[.*'source'\], as the encodings and planes say"),
    "another order": (
        both(masked(0, planes=["generation", "source"]), tensor("first.weight.generation", "U8", [2], b"\0\0")),
        r"masked\[0\]\.planes is \['generation', 'source'\]; expected a list of some of source, generation, sign",
    ),
    "on constants": (
        lambda file: file.manifest["masked"][0].update(distribution="signed_constant"),
        r"masked\[0\]\.planes is \['source'\]; expected a list of some of sign, coat2",
    ),
    "on pretrained weights": (
        lambda file: file.manifest["masked"][0].update(distribution="base") or file.manifest["masked"][0].pop("std"),
        r"masked\[0\]\.planes is \['source'\]; expected a list of some of sign, coat2",
    ),
}
WITH_DATA: dict[str, tuple[Callable[[File], object], str]] = {
    "none was copied": (raw(bytes(8)), r"'first\.weight\.source' has 0 copied weights; expected from 1 to 10"),
    "too many": (raw(bytes([11] + [0] * 10)), r"'first\.weight\.source' has 11 copied weights; expected from 1 to 10"),
    "fewer weights": (bytes_of(TEN[:2], [1, 0], 20), r"'first\.weight\.source' has 3 bytes, which are not as many as"),
    "an index too large": (bytes_of(TEN, [*range(20, 30)], 32), r"'first\.weight\.source' has the index 29; expected"),
    "padding": (raw(bytes([1, 1 | 0x80]) + ONE[2:]), r"'first\.weight\.source' has padding bits that are not 0"),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *WITH_DATA])
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    change, says = {**AT_ONCE, **WITH_DATA}[name]
    tried = attempt(tmp_path / "f", changed(file, change))
    assert tried.refused_at_once if name in AT_ONCE else tried.refused_with_data
    assert re.search(says, str(tried.loaded)), tried.loaded
    assert attempt(tmp_path / "f", file.bytes()).verified


def test_other_sources_are_other_weights(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", changed(file, bytes_of(TEN, [*range(1, 10), 0], 20)))
    assert isinstance(tried.loaded, Net)
    assert not tried.verified
    assert "do not match weights_sha256" in str(tried.verified)


@given(st.binary(max_size=24), st.integers(0, 12))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(b"", 0)
def test_whatever_the_bytes_are_the_reader_says_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, file: File, more: bytes, place: int
) -> None:
    data = file.tensors[NAME][2]
    other = changed(file, raw(data[:place] + more + data[place + len(more) :]))
    attempt(tmp_path_factory.mktemp("f") / "f", other)
