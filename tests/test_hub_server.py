"""The local Hub answers huggingface_hub's own client, so that what other tests show holds for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import Hub, card_errors
from hub_xet import unpack_frame

WRITE = """
import sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
api = HfApi()
assert api.whoami()["name"] == "me"
api.create_repo("me/x", private=True)
api.create_repo("me/x", exist_ok=True)
data = open(sys.argv[1], "rb").read()
card = b"---\\nlicense: mit\\n---\\n# A card\\n"
files = [CommitOperationAdd("sub/a.safetensors", sys.argv[1]), CommitOperationAdd("README.md", card)]
first = api.create_commit("me/x", files, commit_message="one")
files = [CommitOperationAdd("README.md", card + b"more"), CommitOperationDelete("sub/a.safetensors")]
second = api.create_commit("me/x", files, commit_message="two", create_pr=True)
assert second.pr_revision == "refs/pr/1"
found = {f.path: getattr(f, "size", None) for f in api.list_repo_tree("me/x", recursive=True)}
assert found == {".gitattributes": 50, "README.md": len(card), "sub": None, "sub/a.safetensors": len(data)}, found
assert [s.rfilename for s in api.model_info("me/x", revision="refs/pr/1").siblings] == [".gitattributes", "README.md"]
path = hf_hub_download("me/x", "sub/a.safetensors")
assert open(path, "rb").read() == data and first.oid in path
api.create_branch("me/x", branch="a/b")
assert open(hf_hub_download("me/x", "README.md", revision="a/b"), "rb").read() == card
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["xet", "basic", "multipart"])
def test_official_client_writes_and_reads(tmp_path: Path, way: str) -> None:
    """Large files go up as Xet chunks, as one LFS object, or as one in parts, and come back as they were."""
    data = bytes(range(256)) * 900 + b"".join(n.to_bytes(4, "little") for n in range(30_000)) * 2
    (tmp_path / "a.safetensors").write_bytes(data)
    with Hub() as hub:
        hub.set(multipart=200_000 if way == "multipart" else 10_000_000, part=150_000)
        others = {"HF_HUB_DISABLE_XET": "0" if way == "xet" else "1"}
        command = [sys.executable, "-c", WRITE, str(tmp_path / "a.safetensors")]
        env = hub.environment(tmp_path / "home", token="hf_me", **others)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        log = [f"{each['method']} {each['path']}" for each in hub.log()]
        sent_on = [each for each in hub.log() if each["path"].startswith(("/_large", "/_upload")) and each["token"]]
        assert hub.files("me/x")["sub/a.safetensors"] == data
    routes = {"xet": "POST /_xet/v1/xorbs/", "basic": "PUT /_upload/", "multipart": "POST /_complete/"}
    assert {name for name, route in routes.items() if any(each.startswith(route) for each in log)} == (
        {"basic", "multipart"} if way == "multipart" else {way}
    )
    assert not sent_on, "the token stays with the Hub"


def test_tokens_and_visibility(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    hub.add("me/private", {"a.txt": b"a"}, private=True)
    hub.add("me/gated", {"a.txt": b"a"}, gated=True)
    hub.here(monkeypatch, tmp_path)
    other, mine, reader = (HfApi(token=token) for token in ("hf_other", "hf_me", "hf_reader"))
    with pytest.raises(RepositoryNotFoundError):
        other.model_info("me/private")
    with pytest.raises(RepositoryNotFoundError):
        other.model_info("me/absent")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).model_info("me/private")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").model_info("me/private")
    with pytest.raises(GatedRepoError):
        other.hf_hub_download("me/gated", "a.txt")
    with pytest.raises(RevisionNotFoundError):
        mine.model_info("me/private", revision="absent")
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="me/private")
    with pytest.raises(HfHubHTTPError, match="403"):
        other.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="me/gated")
    assert mine.model_info("me/private").private
    with pytest.raises(ValueError, match="license"):
        mine.upload_file(path_or_fileobj=b"---\nlicense: 3\n---\n", path_in_repo="README.md", repo_id="me/private")
    hub.set(page=2)
    hub.add("me/private", {f"{n}.txt": b"" for n in range(7)})
    assert len(list(mine.list_repo_tree("me/private"))) == 8


def test_card_check() -> None:
    metric = {"type": "accuracy", "value": 0.9}
    result = {"task": {"type": "image-classification"}, "dataset": {"type": "digits", "name": "d"}, "metrics": [metric]}
    good = {"license": "mit", "model-index": [{"name": "a", "results": [result]}]}
    assert not list(card_errors(good))
    for bad in ({"license": "my own"}, {"datasets": ["a b"]}, {"tags": "one"}, {"base_model_relation": "mask"}):
        assert len(list(card_errors(bad))) == 1
    del result["metrics"]
    assert list(card_errors(good)) == ['"model-index[0].results[0].metrics" is required']


def test_lz4_frames() -> None:
    """The chunks that hf_xet packs are read without its library."""
    block = bytes([0x35]) + b"abc" + bytes([3, 0]) + bytes([0x50]) + b"defgh"  # 9 more of "abc", then 5 letters
    frame = b"\x04\x22\x4d\x18\x40\x40\xc0" + len(block).to_bytes(4, "little") + block + bytes(4)
    assert unpack_frame(frame) == b"abc" * 4 + b"defgh"
