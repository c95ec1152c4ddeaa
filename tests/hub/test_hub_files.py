"""Files on the Hub wherever a file is taken, by the real client from a real server."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import popup_surgery as ps
from hub_server import Hub
from popup_surgery.analysis.overlap import overlap
from popup_surgery.artifact import Artifact
from popup_surgery.bank.files import files_of
from support import GOLDEN, ROOT, equal_states, write_digit

ADDRESS = "hf://me/digits"


def sent(hub: Hub) -> int:
    """Bytes of files that the Hub has sent."""
    return sum(each["sent"] for each in hub.log() if each["path"].startswith(("/_large/", "/_xorb/")))


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def command(hub: Hub, home: Path, *arguments: object, **others: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    env = hub.environment(home, **others) | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "popup_surgery", *map(str, arguments)]
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)


def test_inspect_reads_the_header_alone(here: Hub, data: bytes, home: Path) -> None:
    """Eight bytes and the header, each by a request of its range; nothing is kept on the disk."""
    manifest = ps.inspect(ADDRESS)
    assert manifest.text() == ps.inspect(GOLDEN / "artifacts" / "edge_popup.popup.safetensors").text()
    ranges = [each["range"] for each in here.log() if each["path"].startswith("/_large/")]
    assert ranges == ["bytes=0-7", f"bytes=8-{header_size(data) - 1}"]
    assert sent(here) == header_size(data)
    assert not list(home.rglob("*.safetensors"))


def test_load(here: Hub, data: bytes) -> None:
    """The network is that of the file, to the bit; the whole file comes once, and then from the cache."""
    expected = ps.load(GOLDEN / "artifacts" / "edge_popup.popup.safetensors")
    assert equal_states(ps.load(ADDRESS), expected)
    assert sent(here) == header_size(data) + len(data)
    assert "/me/digits/resolve/" in (counted := here.log()[-1]["path"])
    assert counted.endswith("/config.json"), "the Hub counts a download by this request"
    assert equal_states(ps.load(f"{ADDRESS}/digits.popup.safetensors"), expected)
    assert ps.verify(ADDRESS)
    assert ps.inspect(ADDRESS).seed == ps.inspect(GOLDEN / "artifacts" / "edge_popup.popup.safetensors").seed
    assert sent(here) == header_size(data) + len(data), "what is in the cache is not sent again"


def test_wherever_a_file_is_taken(here: Hub, tmp_path: Path) -> None:
    """Each call gives what it gives for the file on the disk."""
    file = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"
    write_digit(tmp_path / "digit.png", 4)
    for call in (
        lambda path: ps.evaluate(path).accuracy,
        lambda path: ps.predict(path, [tmp_path / "digit.png"]),
        lambda path: {name: mask.tolist() for name, mask in ps.masks(path).items()},
        lambda path: str(overlap(path, GOLDEN / "artifacts" / "global.popup.safetensors")),
        lambda path: str(ps.sanity(path, repeats=1, values=[1.0])),
        lambda path: Artifact.open(path).manifest.text(),
        lambda path: str(ps.verify(path)),
    ):
        assert call(ADDRESS) == call(file)
    manifest = ps.inspect(file)
    kwargs = manifest.architecture.kwargs
    started = []
    for path in (ADDRESS, file):
        settings = manifest.provenance["recipe"]["surgery"]
        model = ps.convert(ps.build("popup_surgery/" + manifest.architecture.name, **kwargs), **settings)
        ps.start_from(model, path)
        started.append(model)
    assert equal_states(*started)


def test_dense_weights_and_masks(here: Hub, data: bytes) -> None:
    """The other files that commands take."""
    files: dict[str, bytes | None] = {
        name: (GOLDEN / "artifacts" / name).read_bytes() for name in ("dnw.masks.safetensors",)
    }
    network = ps.load(ADDRESS)
    from popup_surgery.experiment.dense import write_dense

    write_dense(network, Path("dense.safetensors").absolute(), ps.inspect(ADDRESS).provenance)
    files["dense.safetensors"] = Path("dense.safetensors").read_bytes()
    Path("dense.safetensors").unlink()
    here.add("me/dense", files)
    found = ps.masks("hf://me/dense/dnw.masks.safetensors")
    expected = ps.masks(GOLDEN / "artifacts" / "dnw.masks.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected | found)
    assert ps.evaluate("hf://me/dense/dense.safetensors").accuracy == ps.evaluate(ADDRESS).accuracy
    with pytest.raises(ps.ArtifactError, match="this is not a popup artifact: dense weights of a run"):
        ps.load("hf://me/dense/dense.safetensors")


@pytest.mark.slow
def test_commands(hub: Hub, data: bytes, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in its own process prints what it prints for the file, for a token alone; then again offline."""
    monkeypatch.chdir(tmp_path)
    file = Path("digits.popup.safetensors")
    file.write_bytes(data)
    hub.add("me/digits", {file.name: data}, private=True)
    write_digit(tmp_path / "digit.png", 4)
    calls: Sequence[Sequence[Any]] = (
        ("inspect", ADDRESS),
        ("predict", ADDRESS, "digit.png"),
    )
    for call in calls:
        expected = command(hub, home, *(file if str(each).startswith(ADDRESS) else each for each in call))
        found = command(hub, home, *call, HF_TOKEN="hf_me")
        assert (found.returncode, found.stdout, found.stderr) == (0, expected.stdout, ""), call
    before = len(hub.log())
    for call in calls:
        assert command(hub, home, *call, HF_HUB_OFFLINE="1").returncode == 0, call
    assert len(hub.log()) == before, "offline, nothing is asked"
    hub.stop()
    assert command(hub, home, *calls[0]).returncode == 0


@pytest.mark.slow
def test_the_command_line_keeps_both_slashes(
    here: Hub, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = cli("inspect", ADDRESS, "--json")
    assert (status, err) == (0, "")
    assert int(json.loads(out)["seed"]) == ps.inspect(ADDRESS).seed
    status, out, err = cli("verify", f"{ADDRESS}@main/digits.popup.safetensors")
    assert (status, err) == (0, "")
    monkeypatch.chdir(tmp_path)
    file = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"
    write_digit(tmp_path / "digit.png", 4)
    for call in (
        ("evaluate", ADDRESS),
        ("predict", ADDRESS, "digit.png"),
        ("diff", ADDRESS, f"{ADDRESS}@main/digits.popup.safetensors"),
        ("export", ADDRESS, "-o", "out.safetensors", "--force"),
        ("repack", ADDRESS, "--encoding", "range_coded", "-o", "out.popup.safetensors", "--force"),
    ):
        expected = cli(*(file if each.startswith(ADDRESS) else each for each in call))
        assert cli(*call) == (0, expected.out.replace(str(file), ADDRESS), ""), call
    status, out, err = cli("sanity", ADDRESS, "--repeats", "1", "--value", "1")
    assert (status, err) == (0, "")
    assert (tmp_path / "digits.sanity.png").exists(), "named after the repository, here"
    status, _, err = cli("verify", ADDRESS, "--base", "hf://me/base/model.safetensors")
    assert status in (1, 2)
    status, _, err = cli("inspect", "https://huggingface.co/me/digits")
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith("for this file on the Hub write hf://me/digits\n")


def test_revisions(here: Hub, data: bytes) -> None:
    """A branch with a slash, a tag, a pull request and a commit, each its own file."""
    other = (GOLDEN / "artifacts" / "global.popup.safetensors").read_bytes()
    first = here.refs("me/digits")["refs/heads/main"]
    for revision in ("feature/new", "refs/pr/1"):
        here.add("me/digits", {"digits.popup.safetensors": other}, revision=revision)
    digest = ps.inspect(GOLDEN / "artifacts" / "global.popup.safetensors").masks_sha256
    for address in (f"{ADDRESS}@feature%2Fnew", f"{ADDRESS}@refs/pr/1", f"{ADDRESS}@refs%2Fpr%2F1"):
        assert ps.inspect(address).masks_sha256 == digest
        ps.load(address)
    for address in (ADDRESS, f"{ADDRESS}@{first}", f"{ADDRESS}@{first}/digits.popup.safetensors"):
        assert ps.inspect(address).masks_sha256 != digest
    here.stop()
    assert ps.inspect(f"{ADDRESS}@feature%2Fnew").masks_sha256 == digest
    assert ps.inspect(f"{ADDRESS}@refs/pr/1").masks_sha256 == digest


def test_several_artifacts(here: Hub, data: bytes) -> None:
    here.add("me/many", {"a.popup.safetensors": data, "sub/b.popup.safetensors": data, "c.safetensors": b""})
    with pytest.raises(ps.HubError) as caught:
        ps.load("hf://me/many@main")
    assert str(caught.value) == (
        "hf://me/many@main: me/many has 2 artifacts; name one, such as hf://me/many@main/a.popup.safetensors, of "
        "'a.popup.safetensors', 'sub/b.popup.safetensors'"
    )
    assert ps.inspect("hf://me/many/sub/b.popup.safetensors")
    here.add("me/none", {"README.md": b"", "weights.bin": b"1"})
    with pytest.raises(ps.HubError, match=r"me/none has no artifact; expected a file whose name ends in \.popup"):
        ps.load("hf://me/none")


def test_the_artifacts_of_a_repository(here: Hub, data: bytes) -> None:
    """By the names that their files would have in a folder, from the cache too."""
    here.add("me/many", {"sub/b.popup.safetensors": data, "a.popup.safetensors": data, "c.safetensors": b"1"})
    files = files_of("hf://me/many")
    assert list(files) == ["a", "sub/b"]
    for file in files.values():
        ps.load(file)
    here.stop()
    assert list(files_of("hf://me/many")) == ["a", "sub/b"]
    with pytest.raises(ps.HubError, match="names a file; expected a repository: hf://me/many"):
        files_of("hf://me/many/a.popup.safetensors")


def test_a_commit_in_the_cache_asks_nothing(here: Hub) -> None:
    commit = here.refs("me/digits")["refs/heads/main"]
    address = f"{ADDRESS}@{commit}/digits.popup.safetensors"
    ps.load(address)
    here.clear()
    ps.load(address)
    assert here.log() == []


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.usefixtures("hasty")
def test_from_the_cache(here: Hub, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """Without the network, and where the Hub is not to be asked, in every way of writing the address."""
    expected = ps.load(ADDRESS)
    here.clear()
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        here.stop()
    for address in (ADDRESS, f"{ADDRESS}@main", f"{ADDRESS}/digits.popup.safetensors"):
        assert equal_states(ps.load(address), expected)
        assert ps.inspect(address)
    if offline:
        assert here.log() == []
    words = "not in the cache, and HF_HUB_OFFLINE" if offline else "cannot be reached; check the connection"
    with pytest.raises(ps.HubError, match=words):
        ps.load("hf://me/other")
    with pytest.raises(ps.HubError, match=words):
        ps.load(f"{ADDRESS}/other.popup.safetensors")


def test_newer_file(here: Hub) -> None:
    """Online, a branch is what it is now; the older file stays in the cache under its commit."""
    first = here.refs("me/digits")["refs/heads/main"]
    ps.load(ADDRESS)
    other = (GOLDEN / "artifacts" / "global.popup.safetensors").read_bytes()
    here.add("me/digits", {"digits.popup.safetensors": other})
    assert ps.inspect(ADDRESS).masks_sha256 != ps.inspect(f"{ADDRESS}@{first}").masks_sha256
    opened = Artifact.open(ADDRESS)
    here.add("me/digits", {"digits.popup.safetensors": b"changed"})
    assert opened.masks(), "an open artifact stays with its commit"


def test_uploaded_with_xet(by_xet: Hub, data: bytes) -> None:
    """A file that came by Xet is read by ranges and downloaded by Xet."""
    ps.inspect("hf://me/xet")
    assert sent(by_xet) == header_size(data)
    assert equal_states(ps.load("hf://me/xet"), ps.load(GOLDEN / "artifacts" / "edge_popup.popup.safetensors"))
    assert any(each["path"].startswith("/_xorb/") for each in by_xet.log())


def test_the_token_stays_with_the_hub(
    here: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is huggingface_hub's own, from the variable or the file, and goes to no other host, log or file."""
    here.add("me/private", {"a.popup.safetensors": data}, private=True)
    home.mkdir(exist_ok=True)
    (home / "token").write_text("hf_me")
    caplog.set_level("DEBUG")
    opened = Artifact.open("hf://me/private")
    opened.masks()
    asked = [each for each in here.log() if each["path"].startswith(("/api/", "/me/"))]
    assert {each["token"] for each in asked} == {"Bearer hf_me"}
    assert {each["token"] for each in here.log() if each["path"].startswith("/_large/")} == {None}
    assert "hf_me" not in caplog.text + repr(opened) + str(opened.manifest.text())
    assert not [
        path for path in home.rglob("*") if path.is_file() and path != home / "token" and b"hf_me" in path.read_bytes()
    ]


def test_an_earlier_commit_from_the_cache(
    here: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was loaded once is there without the Hub, also if another file was pushed and loaded since."""
    here.add("me/many", {"a.popup.safetensors": data})
    ps.load("hf://me/many/a.popup.safetensors")
    here.add("me/many", {"b.popup.safetensors": data})
    ps.load("hf://me/many/b.popup.safetensors")
    here.stop()
    assert not caplog.records
    assert ps.load("hf://me/many/a.popup.safetensors")
    assert "a.popup.safetensors is read from the cache, as it was in the commit" in caplog.text


@pytest.mark.parametrize("wrong", [3, None, {"a": 1}])
def test_what_is_no_file(wrong: Any) -> None:
    for call in (ps.load, ps.inspect, ps.masks):
        with pytest.raises(ps.ArtifactError, match="is no file; expected a path, or an address on the Hub"):
            call(wrong)


def test_nothing_is_written_to_an_address(tmp_path: Path, cli: Any) -> None:
    model = ps.convert(ps.build("popup_surgery/conv2"))
    for path in ("hf://me/digits", Path("hf://me/digits")):
        with pytest.raises(ps.PopupError, match="is an address on the Hub; write a file here, and publish it with"):
            ps.save(model, path)
    status, _, err = cli("convert", "conv2", "-o", "hf://me/digits")
    assert (status, err.count("\n")) == (2, 1)
    assert "is an address on the Hub" in err
