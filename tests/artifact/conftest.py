"""Fixtures: one artifact of an entry of each sort, as bytes, as parts and as the state that it gives."""

import pytest
import torch

from artifact.hostile import File, Net, take_apart
from popup_surgery import convert, load, save, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of `Net`, whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = convert(Net(), exclude="kept", seed=3, k=0.5)
    model(torch.randn(16, 4))
    path = tmp_path_factory.mktemp("original") / "net"
    manifest = save(model, path, probe=(2, 4), provenance={"note": "é", "accuracy": 0.5})
    sorts = manifest.masked, manifest.generated, manifest.constants, manifest.aliases, manifest.probe
    assert all(sorts)
    return path.read_bytes()


@pytest.fixture(scope="module")
def state(original: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("state") / "net"
    path.write_bytes(original)
    assert verify(path, Net())
    return load(path, Net()).state_dict()


@pytest.fixture
def file(original: bytes) -> File:
    return take_apart(original)
