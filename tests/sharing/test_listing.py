"""What `list` shows of a repository, from headers alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_server import Hub
from popup_surgery import inspect, list_repo, load
from popup_surgery.errors import HubError
from support import GOLDEN, Outcome, equal_states

TINY = GOLDEN / "finished" / "tiny" / "tiny.popup.safetensors"
CUSTOM = GOLDEN / "golden.popup.safetensors"
DENSE = GOLDEN / "artifacts" / "dense.safetensors"


@pytest.fixture
def me(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with a repository of two artifacts, and other files."""
    hub.here(monkeypatch, tmp_path / "home", token="hf_me")
    damaged = bytearray(TINY.read_bytes())
    damaged[300] ^= 255
    files: dict[str, bytes | None] = {
        "tiny.popup.safetensors": TINY.read_bytes(), "sub/golden.safetensors": CUSTOM.read_bytes(),
        "model.safetensors": DENSE.read_bytes(), "damaged.popup.safetensors": bytes(damaged), "README.md": b"# x",
    }  # fmt: skip
    hub.add("me/masks", files)
    hub.add("me/empty", {"a.txt": b""})
    hub.clear()
    return hub


def test_artifacts_and_others(me: Hub) -> None:
    found = list_repo("me/masks")
    assert [one.path for one in found.artifacts] == ["sub/golden.safetensors", "tiny.popup.safetensors"]
    assert found.others == ("damaged.popup.safetensors", "model.safetensors")
    golden, tiny = found.artifacts
    manifest = inspect(TINY)
    assert (tiny.summary.weights, tiny.summary.kept, tiny.summary.accuracy) == (manifest.weights, manifest.kept, 0.445)
    assert (tiny.summary.name, tiny.summary.data, tiny.summary.size) == ("popup_surgery/conv2", "digits", 4588)
    assert golden.summary.accuracy is None
    assert equal_states(load(tiny.address), load(TINY))
    assert [one.path for one in list_repo("hf://me/masks/sub").artifacts] == ["sub/golden.safetensors"]
    assert [one.path for one in list_repo(tiny.address).artifacts] == ["tiny.popup.safetensors"]


def test_only_headers_are_fetched(me: Hub) -> None:
    list_repo("me/masks")
    header = 8 + int.from_bytes(TINY.read_bytes()[:8], "little")
    asked = [each for each in me.log() if "tiny.popup" in each["path"] or each["path"].startswith(("/_large", "/_xet"))]
    assert asked
    assert all(each["range"] for each in asked if each["method"] == "GET" and each["status"] in (200, 206))
    mine = sum(each["sent"] for each in me.log() if "tiny.popup" in each["path"])
    assert mine <= header, "not a byte of its tensors"


def test_revisions(me: Hub) -> None:
    me.add("me/masks", {"tiny.popup.safetensors": None}, revision="other/branch")
    for listing in (list_repo("me/masks", revision="other/branch"), list_repo("hf://me/masks@other%2Fbranch")):
        assert [one.address for one in listing.artifacts] == ["hf://me/masks@other%2Fbranch/sub/golden.safetensors"]
    with pytest.raises(HubError, match="me/masks has no revision 'none'"):
        list_repo("me/masks", revision="none")
    with pytest.raises(HubError, match="there is no repository me/none"):
        list_repo("me/none")
    with pytest.raises(HubError, match="the repository is 'masks'"):
        list_repo("masks")


def test_the_command(me: Hub, cli: Callable[..., Outcome]) -> None:
    done = cli("list", "me/masks")
    assert (done.status, done.err) == (0, "")
    head, golden, tiny, more, others = done.out.splitlines()
    assert head.split() == ["file", "network", "kept", "accuracy", "data", "size"]
    assert tiny.split("  ")[0] == "tiny.popup.safetensors"
    for said in ("popup_surgery/conv2", "517 of 1,031 (50.1%)", "44.50%", "digits", "4,588 bytes"):
        assert said in tiny
    assert "custom/Sequential" in golden
    assert more == "popup-surgery inspect hf://me/masks/sub/golden.safetensors tells more of one"
    assert others == "2 other .safetensors files are no popup artifacts, such as damaged.popup.safetensors"
    found = json.loads(cli("list", "hf://me/masks", "--json").out)
    assert [one["path"] for one in found["artifacts"]] == ["sub/golden.safetensors", "tiny.popup.safetensors"]
    assert found["artifacts"][1]["kept"] == 517
    assert cli("list", "me/empty").out == "me/empty has no popup artifact\n"
    assert cli("list", "me/none").err.startswith("error: me/none: there is no repository me/none")
