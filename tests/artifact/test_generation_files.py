"""Files of weights that were drawn again: the golden one, and those that somebody else made."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import popup_surgery as ps
from artifact.hostile import File, Net, attempt, both, drop, masked, take_apart, tensor, top
from docs.test_docs import reader
from popup_surgery.codecs.generations import encode
from support import GOLDEN, Outcome, golden_manifest, state_digest

FILE = GOLDEN / "generation.popup.safetensors"
NAME = "first.weight.generation"


def test_the_golden_file() -> None:
    golden = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))["artifact"]
    assert golden_manifest(golden).requires == golden["requires"] == ["range_coded", "generation"]
    page = {name: torch.from_numpy(np.asarray(array)) for name, array in reader(3)["read"](FILE).items()}
    assert state_digest(page) == golden["state_dict_sha256"], "the page's reader"
    with pytest.raises(ValueError, match="needs a newer reader"):
        reader(2)["read"](FILE)


def test_inspect_says_where_the_bytes_go(cli: Callable[..., Outcome]) -> None:
    told = cli("inspect", FILE)
    assert told.status == 0
    sizes = ps.Artifact.open(FILE).sizes
    assert sizes is not None
    kept = ps.inspect(FILE).kept
    assert f"\nplanes: generation, {8 * sizes.planes / kept:.3f} bits a kept weight\n" in told.out
    assert f"planes {sizes.planes:,}," in told.out


@pytest.fixture(params=["bitpack", "range_coded"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> File:
    model = ps.convert(Net(), 0.5, exclude="kept", seed=3, scheme="kaiming_normal")
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            if name.endswith("_score"):
                parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
        if step < 3:
            ps.redraw(model, step, every=1, share=0.9)
    ps.save(model, tmp_path / "original", encoding=request.param)
    return take_apart((tmp_path / "original").read_bytes())


def bytes_of(*numbers: int) -> Callable[[File], object]:
    data = encode(np.array(numbers, np.uint16)).tobytes()
    return tensor(NAME, "U8", [len(data)], data)


def raw(data: bytes) -> Callable[[File], object]:
    return tensor(NAME, "U8", [len(data)], data)


def changed(file: File, change: Callable[[File], object]) -> bytes:
    """The file after a change of its planes alone, which its digests allow."""
    other = file.copy()
    change(other)
    masks = other.manifest["masks_sha256"]
    other.digest()
    other.manifest["masks_sha256"] = masks  # over packed bits, however they are coded
    return other.bytes()


AT_ONCE: dict[str, tuple[Callable[[File], object], str]] = {
    "nothing": (raw(b""), r"'first\.weight\.generation' is U8 \[0\]; expected U8 \[2 to 4179\] for 10 kept weights"),
    "more than it can have": (raw(bytes(4180)), r"is U8 \[4180\]; expected U8 \[2 to 4179\] for 10 kept weights"),
    "another dtype": (tensor(NAME, "I8", [8], bytes(8)), r"'first\.weight\.generation' is I8 \[8\]; expected U8"),
    "no plane": (drop(NAME), r"'first\.weight' has no plane 'generation'; expected the tensor 'first\.weight\.gen"),
    "no name": (top(requires=[]), r"requires is \[\]; expected \[.*'generation'\], as the encodings and planes say"),
    "another order": (
        both(masked(0, planes=["sign", "generation"]), tensor("first.weight.sign", "U8", [2], b"\0\0")),
        r"masked\[0\]\.planes is \['sign', 'generation'\]; expected a list of some of source, generation, sign",
    ),
    "on pretrained weights": (
        lambda file: file.manifest["masked"][0].update(distribution="base") or file.manifest["masked"][0].pop("std"),
        r"masked\[0\]\.planes is \['generation'\]; expected a list of some of sign, coat2",
    ),
}
WITH_DATA: dict[str, tuple[Callable[[File], object], str]] = {
    "none was drawn again": (raw(bytes([10, 0])), r"'first\.weight\.generation' has no weight that was drawn again"),
    "fewer weights": (bytes_of(0, 1, 0), "'first.weight.generation' does not say how many of its 10 weights|has other"),
    "more weights": (bytes_of(*[0, 1] * 20), r"'first\.weight\.generation' does not say how many of its 10 weights"),
    "too often": (raw(bytes(4100)), r"'first\.weight\.generation' has weights that were drawn again more than 4,095"),
    "half a word": (raw(bytes([9, 1, 0, 0, 0])), r"'first\.weight\.generation' has bytes that are no whole words"),
    "other words": (raw(bytes([9, 1]) + b"\1" * 4), r"'first\.weight\.generation' has other"),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *WITH_DATA])
def test_refused_by_every_reader(name: str, file: File, tmp_path: Path) -> None:
    change, says = {**AT_ONCE, **WITH_DATA}[name]
    tried = attempt(tmp_path / "f", changed(file, change))
    assert tried.refused_at_once if name in AT_ONCE else tried.refused_with_data
    assert re.search(says, str(tried.loaded)), tried.loaded
    assert attempt(tmp_path / "f", file.bytes()).verified


def test_other_generations_are_other_weights(file: File, tmp_path: Path) -> None:
    tried = attempt(tmp_path / "f", changed(file, bytes_of(*[4095, 0] * 5)))
    assert isinstance(tried.loaded, Net)
    assert not tried.verified
    assert "do not match weights_sha256" in str(tried.verified)


@given(st.binary(max_size=24), st.integers(0, 30))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(b"", 0)
def test_whatever_the_bytes_are_the_reader_says_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, file: File, more: bytes, place: int
) -> None:
    data = file.tensors[NAME][2]
    other = changed(file, raw(data[:place] + more + data[place + len(more) :]))
    attempt(tmp_path_factory.mktemp("f") / "f", other)
