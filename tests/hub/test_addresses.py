"""What an address on the Hub means: the same as for huggingface_hub's own file system."""

from pathlib import Path

import pytest
from huggingface_hub.utils import parse_hf_uri

import popup_surgery as ps
from popup_surgery.hub import Address, is_address, suggestion

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "text",
    [
        "hf://me/digits",
        "hf://me/digits/",
        "hf://models/me/digits",
        "hf://me/digits/a.popup.safetensors",
        "hf://me/digits/sub/folder/a.popup.safetensors",
        "hf://me/digits@v1",
        "hf://me/digits@v1/a.popup.safetensors",
        "hf://me/digits@feature%2Fnew/a.popup.safetensors",
        "hf://me/digits@refs/pr/1",
        "hf://me/digits@refs/pr/12/sub/a.popup.safetensors",
        "hf://me/digits@refs%2Fpr%2F1/a.popup.safetensors",
        "hf://me/digits@refs/convert/parquet/a.popup.safetensors",
        f"hf://me/digits@{COMMIT}/a.popup.safetensors",
        "hf://me/digits/a@b.popup.safetensors",
        "hf://me/digits/50%25.popup.safetensors",
        "hf://me/digits/a file #1?.popup.safetensors",
    ],
)
def test_same_meaning_as_in_huggingface_hub(text: str) -> None:
    found, theirs = Address.parse(text), parse_hf_uri(text)
    assert (found.repo, found.revision, found.path) == (theirs.id, theirs.revision, theirs.path_in_repo)
    assert Address.parse(str(found)) == found, "its own text is read as the same"
    assert found.pinned == (COMMIT in text)
    assert is_address(text)
    assert not is_address(Path(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://datasets/me/digits", "the address of a dataset; expected a model repository"),
        ("hf://spaces/me/digits/a.popup.safetensors", "the address of a space"),
        ("hf://buckets/me/digits", "the address of a bucket"),
        ("hf://gpt2", "no address of a repository"),
        ("hf://", "no address of a repository"),
        ("hf://me/digits@", "no address of a repository"),
        ("hf://me/di gits", "no address of a repository"),
        ("hf://me/digits//a", "no address of a repository"),
        ("hf://me/digits/../../other", "a path with '.', '..'"),
        ("hf://me/digits@%2e%2e%2f%2e%2e/a", "a path with '.', '..'"),
        ("hf://me/digits/a\\..\\b", "a path with '.', '..'"),
    ],
)
def test_refused(text: str, words: str) -> None:
    """In one sentence, before any request."""
    with pytest.raises(ps.HubError) as caught:
        ps.inspect(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("me/digits", "hf://me/digits"),
        ("me/digits@v1", "hf://me/digits@v1"),
        ("me/digits/sub/a.popup.safetensors", "hf://me/digits/sub/a.popup.safetensors"),
        (Path("hf://me/digits"), "hf://me/digits"),
        ("https://huggingface.co/me/digits", "hf://me/digits"),
        ("https://huggingface.co/me/digits/blob/main/a.popup.safetensors", "hf://me/digits/a.popup.safetensors"),
        ("https://hf.co/me/digits/resolve/v1/a%20b.popup.safetensors?download=true", "hf://me/digits@v1/a b.popup"),
        ("https://huggingface.co/me/digits/tree/feature%2Fnew", "hf://me/digits@feature%2Fnew"),
    ],
)
def test_the_address_is_suggested(path: str | Path, address: str) -> None:
    """To whoever names a repository in another way; nothing is asked of the Hub."""
    with pytest.raises(ps.ArtifactError, match="the file does not exist; for") as caught:
        ps.load(path)
    assert address in str(caught.value)


@pytest.mark.parametrize("path", ["digits.popup.safetensors", "runs/digits.popup.safetensors", "./me/digits", "/me/x"])
def test_files_stay_files(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert suggestion(path) == ""
    (tmp_path / "me").mkdir()
    assert suggestion("me/digits") == "", "a folder here is what was meant"
