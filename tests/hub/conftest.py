"""A Hub that huggingface_hub of this process is pointed at, with an artifact on it."""

from pathlib import Path

import pytest

from hub_server import Hub
from support import GOLDEN

ARTIFACT = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"


@pytest.fixture
def data() -> bytes:
    """An artifact of a small network on the digits."""
    return ARTIFACT.read_bytes()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of huggingface_hub's cache and tokens."""
    return tmp_path / "home"


@pytest.fixture
def here(hub: Hub, data: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, with that artifact alone in `me/digits`."""
    hub.add("me/digits", {"digits.popup.safetensors": data, "README.md": b"# Digits\n", "config.json": b"{}"})
    hub.here(monkeypatch, home)
    return hub


@pytest.fixture
def by_xet(here: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub with the artifact in `me/xet` too, where it came by Xet."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    api = HfApi(token="hf_me")
    api.create_repo("me/xet")
    api.upload_file(path_or_fileobj=data, path_in_repo="a.popup.safetensors", repo_id="me/xet")
    here.clear()
    return here


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub tries again at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
