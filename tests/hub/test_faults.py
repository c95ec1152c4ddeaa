"""What goes wrong on the Hub or on the way: one sentence that names the file and what to do, and no half file."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import popup_surgery as ps
from hub_server import Hub
from popup_surgery.artifact.assemble import assemble
from popup_surgery.artifact.rebuild import stored_tensor
from support import ROOT

ADDRESS = "hf://me/digits"
FILE = f"{ADDRESS}/digits.popup.safetensors"


def refused(address: str, words: str, call: Callable[[str], Any] = ps.load) -> None:
    with pytest.raises(ps.PopupError) as caught:
        call(address)
    text = str(caught.value)
    assert text.startswith(f"{address}: "), text
    assert words in text
    assert "\n" not in text
    assert "hf_" not in text
    assert "http" not in text.replace(constants.ENDPOINT, "")


def left(home: Path) -> list[Path]:
    """Files of the cache that could be taken for an artifact, or a part of one."""
    return [path for path in home.rglob("*") if path.is_file() and {"blobs", "snapshots"} & set(path.parts)]


def test_missing(here: Hub, home: Path) -> None:
    refused("hf://me/absent", "there is no repository me/absent, or it is private; log in with `hf auth login`, or set")
    refused(f"{ADDRESS}@v9", "me/digits has no revision 'v9'; choose a branch, a tag or a commit of it")
    refused(f"{ADDRESS}@v9/digits.popup.safetensors", "me/digits has no revision 'v9'")
    refused(f"{ADDRESS}/x.popup.safetensors", "me/digits has no file 'x.popup.safetensors' in the revision 'main'")
    refused(f"{ADDRESS}@{'0' * 40}/digits.popup.safetensors", f"me/digits has no revision '{'0' * 40}'")
    assert not left(home)


def test_rights(here: Hub, data: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.add("me/private", {"a.popup.safetensors": data}, private=True)
    here.add("me/gated", {"a.popup.safetensors": data}, gated=True)
    for address in ("hf://me/private", "hf://me/private/a.popup.safetensors"):
        refused(address, "there is no repository me/private, or it is private; log in with `hf auth login`")
    refused("hf://me/gated", "access to me/gated is restricted; ask for it on the repository's page, and log in")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused("hf://me/private", "there is no repository me/private, or the token may not see it")
    refused("hf://me/gated", "access to me/gated is restricted; ask for it on the repository's page")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    refused("hf://me/private", "the Hub does not know the token; log in with `hf auth login`, or set HF_TOKEN")
    refused("hf://me/gated/a.popup.safetensors", "the Hub does not know the token")
    assert not left(home)
    here.fail("GET /me/digits/resolve/", status=403)
    monkeypatch.delenv("HF_TOKEN")
    refused(FILE, "the token may not read me/digits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "words"),
    [(429, "the Hub takes no more requests for now (429); try again"), (503, "an error of its own (503); try again")],
)
@pytest.mark.parametrize("where", ["HEAD /me", "GET /me.* ", "GET /_large/", "GET /api/models/me/digits"])
@pytest.mark.usefixtures("hasty")
def test_too_much_and_down(here: Hub, home: Path, status: int, words: str, where: str) -> None:
    """For good; and for a while, which huggingface_hub's own repetitions outlast."""
    here.fail(where.strip(), status=status)
    refused(ADDRESS if "/api/" in where else FILE, words)
    assert not left(home)
    if "/api/" not in where:  # which huggingface_hub asks once
        here.clear()
        here.fail(where.strip(), status=status, times=2)
        assert ps.load(FILE)


@pytest.mark.usefixtures("hasty")
def test_the_connection_breaks(here: Hub, data: bytes, home: Path) -> None:
    """In the header, and in the data: again and again, and once."""
    header = 8 + int.from_bytes(data[:8], "little")
    for after in (3, header // 2):
        here.clear()
        here.fail("GET /_large/", break_after=after)
        refused(FILE, "the connection to", ps.inspect)
        assert not left(home)
    here.clear()
    here.fail("GET /_large/", break_after=5, times=1)
    assert ps.inspect(FILE)
    opened = ps.Artifact.open(FILE)
    here.fail("GET /_large/", break_after=len(data) // 2, times=3)
    assert opened.masks(), "the download is taken up where it broke"


def test_the_download_breaks_for_good(here: Hub, data: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    opened = ps.Artifact.open(FILE)
    here.fail("GET /_large/", break_after=0)
    with pytest.raises(ps.HubError, match=r"the connection to .* broke"):
        opened.masks()
    assert not left(home)
    here.clear()
    assert opened.masks(), "the same open artifact works once the connection does"


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_no_answer(here: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    here.fail("GET /me/digits", delay=2)
    refused(FILE, "did not answer in time; try again")
    here.stop()
    refused("hf://me/digits", "cannot be reached; check the connection, and HF_ENDPOINT if it is set")
    refused(FILE, "cannot be reached; check the connection, and HF_ENDPOINT if it is set")
    assert not left(home)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/_xorb/", "/_xet/v1/reconstructions/"])
def test_xet_fails(by_xet: Hub, home: Path, where: str) -> None:
    by_xet.fail(f"GET {where}", status=404)
    refused("hf://me/xet", "the transfer by Xet failed; try again, or set HF_HUB_DISABLE_XET=1 to do without it")
    assert not left(home)
    by_xet.clear()
    assert ps.load("hf://me/xet")


@pytest.mark.parametrize("header_too", [True, False])
def test_changed_under_its_digest(here: Hub, data: bytes, home: Path, header_too: bool) -> None:
    """Other bytes of the same length under the same address and digest, from the start or after the header."""
    other = bytearray(data)
    other[-1] ^= 1
    opened = ps.Artifact.open(FILE)
    here.fail("GET /_large/", content=bytes(other))
    with pytest.raises(ps.HubError, match="the download is not the file that the Hub stated before; try again"):
        (ps.load(FILE) if header_too else opened.masks())
    assert not left(home)
    here.clear()
    assert ps.load(FILE)


def test_the_header_was_another(here: Hub, data: bytes, home: Path) -> None:
    """Its header came from one file, its data from another that the Hub's digest is right for."""
    found = ps.Artifact.open(FILE)
    manifest = replace(found.manifest, provenance={**found.manifest.provenance, "epochs": 9})
    stored = {name: stored_tensor(*part) for name, part in found.contents.stored.items()}
    _, other = assemble(manifest, found.contents.bits, stored, None)
    assert len(other) == len(data)
    assert other != data
    shutil.rmtree(home)
    here.fail("GET /_large/", content=other, times=2)
    opened = ps.Artifact.open(FILE)
    with pytest.raises(ps.ArtifactError, match="the file changed between its header and its data; try again"):
        opened.masks()


@pytest.mark.parametrize("size", ["100", "99999999", "1000000000000"])
def test_a_wrong_size(here: Hub, data: bytes, home: Path, size: str) -> None:
    """The size that the Hub states has to be what the header needs: refused before the download."""
    here.fail("HEAD /me/digits", headers={"X-Linked-Size": size})
    with pytest.raises(ps.ArtifactError) as caught:
        ps.load(FILE)
    assert str(caught.value).startswith(f"{FILE}: ")
    assert sum(each["sent"] for each in here.log() if each["path"].startswith("/_large/")) < len(data)
    assert not left(home)


def test_never_more_than_stated(here: Hub, data: bytes, home: Path) -> None:
    """A server that sends without end: neither the header nor the data fill the memory or the disk."""
    here.fail("GET /_large/", endless=True)
    assert ps.inspect(FILE)
    with pytest.raises(ps.HubError, match=f"more than the {len(data):,} bytes arrive"):
        ps.load(FILE)
    assert not left(home)
    assert sum(each["sent"] for each in here.log()) < 100_000_000


def test_a_server_without_ranges(here: Hub, data: bytes) -> None:
    """It sends the whole file; what is not needed of it is not read."""
    here.fail("GET /me/digits/resolve/", status=200, text="x")  # a page, as of a login
    refused(FILE, "", ps.inspect)


def test_no_hub(here: Hub, data: bytes) -> None:
    """A server that answers everything, but not as the Hub does."""
    for headers in ({"X-Repo-Commit": "../../../etc"}, {"X-Repo-Commit": ""}):
        here.clear()
        here.fail("HEAD /me/digits", headers=headers)
        refused(FILE, "does not answer as the Hub does; check HF_ENDPOINT")


def test_no_room_in_the_cache(here: Hub, home: Path) -> None:
    home.write_text("a file where the cache should be")
    refused(FILE, "cannot be written")


@pytest.mark.parametrize("address", ["hf://me/absent", f"{ADDRESS}@v9", f"{ADDRESS}/no.popup.safetensors", "hf://x"])
@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_the_command_line(here: Hub, cli: Any, address: str, name: str) -> None:
    """One line on stderr and exit status 2."""
    status, out, err = cli(name, address)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {address}")


@pytest.mark.slow
def test_a_real_process_waits_and_says_why(hub: Hub, data: bytes, tmp_path: Path) -> None:
    """Without a terminal, nothing but the sentence; after huggingface_hub's own pauses."""
    hub.add("me/digits", {"digits.popup.safetensors": data})
    hub.fail("HEAD /me/digits", status=503)
    env = hub.environment(tmp_path / "home", token="hf_me") | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "popup_surgery", "export", FILE, "-o", str(tmp_path / "out.safetensors")]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)
    expected = f"error: {FILE}: the Hub has an error of its own (503); try again later\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert not (tmp_path / "out.safetensors").exists()
