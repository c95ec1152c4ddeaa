"""Where a masked weight's values come from, and that no other room asks which of the two it is."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import popup_surgery
from popup_surgery import ArtifactError, UnknownName
from popup_surgery.weights import SCHEMES
from popup_surgery.weights.source import Drawn, Pretrained, distributions, source_of, source_of_scheme
from popup_surgery.weights.streams import CHUNK, DISTRIBUTIONS, draw

PACKAGE = Path(popup_surgery.__file__).parent


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_drawn_values_are_those_of_the_stream(distribution: str) -> None:
    source = source_of(distribution)
    assert isinstance(source, Drawn)
    assert (source.distribution, source.drawn, source.in_base) == (distribution, True, False)
    expected = torch.from_numpy(np.concatenate(list(draw(distribution, 60, 0.25, 7, "weight", "a")))).view(5, 12)
    found = np.concatenate(list(source.values(60, 0.25, 7, "a", torch.ones(60))))
    assert torch.equal(torch.from_numpy(found), expected.view(-1))
    tensor = torch.zeros(12, 5).t()
    source.fill(tensor, 0.25, 7, "a")
    assert torch.equal(tensor, expected)
    source.check("layer.weight", tensor, source.values(60, 0.25, 7, "a", None), 7)
    tensor[3, 2] += 1
    with pytest.raises(ArtifactError, match=r"^the weights of 'layer\.weight' are not those of seed 7 any more"):
        source.check("layer.weight", tensor, source.values(60, 0.25, 7, "a", None), 7)
    assert source.record(0.25) == {"std": 0.25}
    assert source.describe(0.123456) == "0.12346"


def test_pretrained_values_are_those_that_are_there() -> None:
    source = source_of("base")
    assert isinstance(source, Pretrained)
    assert (source.distribution, source.drawn, source.in_base) == ("base", False, True)
    tensor = torch.randn(CHUNK + 5, generator=torch.Generator().manual_seed(0)).half()
    pieces = list(source.values(len(tensor), 0.0, 7, "a", tensor))
    assert [(len(piece), piece.dtype) for piece in pieces] == [(CHUNK, np.float32), (5, np.float32)]
    assert torch.equal(torch.from_numpy(np.concatenate(pieces)), tensor.float())
    before = tensor.clone()
    source.fill(tensor, 0.0, 7, "a")
    assert torch.equal(tensor, before)
    source.check("layer.weight", tensor, [], 7)
    with pytest.raises(ArtifactError, match=r"^'layer\.weight' is a pretrained weight of float64; cast the network"):
        source.check("layer.weight", tensor.double(), [], 7)
    assert source.record(0.0) == {}
    assert source.describe(0.0) == "pretrained"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_has_a_source_and_a_width(scheme: str) -> None:
    found = SCHEMES[scheme]
    expected = source_of(found.distribution), found.std(9.0, 4.0, 0.25, True)
    assert source_of_scheme(scheme, 9.0, 4.0, 0.25, True) == expected


def test_the_scheme_pretrained_has_no_width() -> None:
    assert source_of_scheme("pretrained", 9.0, 4.0, 0.25, True) == (source_of("base"), 0.0)
    with pytest.raises(UnknownName, match="pretraind"):
        source_of_scheme("pretraind", 9.0, 4.0, 0.25, True)
    assert distributions() == [*DISTRIBUTIONS, "base"]


def test_no_other_room_asks_for_the_distribution_of_pretrained_weights() -> None:
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "weights":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare) else ""
            named = isinstance(node, ast.ImportFrom) and any(alias.name == "BASE" for alias in node.names)
            if named or ("distribution" in text and "'base'" in text):
                asked.append(f"{path.relative_to(PACKAGE)}: {text or 'imports BASE'}")
    assert not asked
