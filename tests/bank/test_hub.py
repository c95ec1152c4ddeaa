"""A bank of masks that lie on the Hub: by address in Python, and a whole repository on the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hub_server import Hub
from popup_surgery import MaskBank, PopupError, combine, load
from support import GOLDEN, Outcome, equal_states

Cli = Callable[..., Outcome]

FILE = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"


@pytest.fixture
def two(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, with one artifact under two names in `me/digits`."""
    data = FILE.read_bytes()
    hub.add("me/digits", {"one/a.popup.safetensors": data, "b.popup.safetensors": data, "README.md": b"# Digits\n"})
    hub.here(monkeypatch, tmp_path / "home")
    return hub


def test_masks_by_address(two: Hub) -> None:
    bank = MaskBank("hf://me/digits/b.popup.safetensors")
    bank.add("a", "hf://me/digits/one/a.popup.safetensors")
    bank.add("b", FILE)
    assert equal_states(bank.use("a"), load(FILE))
    with pytest.raises(PopupError, match="hf://me/digits: me/digits has 2 artifacts; name one"):
        bank.add("c", "hf://me/digits")
    assert bank.names == ("a", "b")
    same = combine(["hf://me/digits/b.popup.safetensors", FILE], "union")
    assert same.manifest.kept == bank.manifest("a").kept


def test_a_repository(two: Hub, cli: Cli) -> None:
    done = cli("bank", "hf://me/digits")
    assert [line.split()[0] for line in done.out.splitlines()] == ["task", "b", "one/a", "mean"], done
    assert done.status == 0
    failed = cli("bank", "hf://me/none")
    assert (failed.status, failed.err.count("\n")) == (2, 1), failed
    failed = cli("bank", "me/digits")
    assert failed.status == 2
    assert "for a file on the Hub write hf://me/digits" in failed.err
