"""The config.json of a repository: ours under one key, and everything of others."""

import json
from pathlib import Path

import pytest

from hub_server import Hub
from popup_surgery import Artifact
from popup_surgery.errors import HubError, PopupError
from popup_surgery.sharing.config_json import Config, Recorded
from popup_surgery.sharing.remote import Contents, connect
from popup_surgery.sharing.summary import Summary
from support import GOLDEN

ONE = Recorded(Summary.of(Artifact.open(GOLDEN / "finished" / "tiny" / "tiny.popup.safetensors")), "0" * 64, "a.png")


def test_round_trip() -> None:
    config = Config({"a.safetensors": ONE}, {"license": "mit"}, {"model_type": "theirs", "n": [1, {"x": None}]})
    assert Config.read(config.text()) == config
    assert json.loads(Config.read(None).text())["library_name"] == "popup-surgery"
    assert "library_name" not in json.loads(Config.read("{}").text()), "the file is somebody else's"


@pytest.mark.parametrize(
    "own", [3, [], {"artifacts": []}, {"artifacts": {"a": 3}}, {"card": "x"}, {"artifacts": {"a": {}}}]
)
def test_what_is_not_ours_under_our_key_is_left_out(own: object) -> None:
    found = Config.read(json.dumps({"popup_surgery": own, "b": 1}))
    assert (found.artifacts, found.card, found.others) == ({}, {}, {"b": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(PopupError, match=r"me/x: config.json is not (JSON|a JSON object).*; mend it, or remove it"):
        Config.read(text, "me/x: config.json")


def test_texts_of_a_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.here(monkeypatch, tmp_path / "home", token="hf_me")
    hub.add("me/x", {"a.txt": "é\r\n".encode("utf-8-sig"), "b.txt": b"\xff", "c.txt": b"x" * (11 << 20)})
    there = Contents.of(connect(), "me/x")
    assert there.text("a.txt") == "é\r\n"
    assert there.text("none.txt") is None
    with pytest.raises(HubError, match=r"me/x: b.txt is not UTF-8; mend it first"):
        there.text("b.txt")
    with pytest.raises(HubError, match=r"me/x: c.txt has 11,534,336 bytes; expected at most 10,485,760"):
        there.text("c.txt")
