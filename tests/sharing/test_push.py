"""Pushes with the official client against a Hub in another process: what is there afterwards, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from hub_server import Hub
from popup_surgery import Artifact, build, convert, inspect, list_repo, load, masks, model_card, push_to_hub
from popup_surgery.errors import ArtifactError, HubError, PopupError
from popup_surgery.sharing import push
from popup_surgery.sharing.card import Card
from support import GOLDEN, Outcome, equal_states

ARTIFACTS = GOLDEN / "artifacts"
TINY = GOLDEN / "finished" / "tiny" / "tiny.popup.safetensors"
PRETRAINED = GOLDEN / "artifacts" / "pretrained.popup.safetensors"
EDGE, RANDOM = ARTIFACTS / "edge_popup.popup.safetensors", ARTIFACTS / "random.popup.safetensors"


@pytest.fixture
def me(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub of this test, for a user who may write."""
    hub.here(monkeypatch, tmp_path / "home", token="hf_me")
    monkeypatch.setattr(push, "PAUSE", 0.01)
    return hub


def card(hub: Hub, repo: str = "me/masks", revision: str = "main") -> str:
    return hub.files(repo, revision)["README.md"].decode()


def config(hub: Hub, repo: str = "me/masks") -> Any:
    return json.loads(hub.files(repo)["config.json"])


def commits(repo: str = "me/masks") -> list[str]:
    return [commit.title for commit in HfApi().list_repo_commits(repo)]


def test_one_commit_has_it_all(me: Hub) -> None:
    pushed = push_to_hub(TINY, "me/masks", private=True, license="mit")
    files = me.files("me/masks")
    assert files.keys() == {".gitattributes", "tiny.popup.safetensors", "tiny.popup.png", "README.md", "config.json"}
    assert files["tiny.popup.safetensors"] == TINY.read_bytes()
    assert files["tiny.popup.png"].startswith(b"\x89PNG")
    assert card(me) == model_card(TINY, "me/masks", license="mit"), "the command card prints what is pushed"
    assert HfApi().model_info("me/masks").private
    assert commits()[0] == "Add tiny.popup.safetensors"
    assert len(commits()) == 2, "that of the new repository, and one"
    assert pushed.address == "hf://me/masks/tiny.popup.safetensors"
    assert pushed.url == f"{me.url}/me/masks/commit/{pushed.commit}"
    assert pushed.lines in card(me)
    assert equal_states(load(pushed.address), load(TINY))


def test_config_lists_the_artifacts(me: Hub) -> None:
    me.add("me/masks", {"config.json": b'{"model_type": "theirs", "popup_surgery": 3}'})
    push_to_hub(TINY, "me/masks")
    push_to_hub(EDGE, "me/masks", path_in_repo="sub/edge.popup.safetensors")
    found = config(me)
    assert found.pop("model_type") == "theirs"
    assert found.keys() == {"popup_surgery"}
    artifacts = found["popup_surgery"]["artifacts"]
    assert list(artifacts) == ["sub/edge.popup.safetensors", "tiny.popup.safetensors"]
    manifest, tiny = inspect(TINY), artifacts["tiny.popup.safetensors"]
    assert tiny["library"] == "popup-surgery"
    assert tiny["architecture"] == {
        "library": "popup_surgery", "network": "conv2", "arguments": {"img_size": 8, "in_chans": 1, "width": 0.05}
    }  # fmt: skip
    assert tiny["classes"] == [str(i) for i in range(10)]
    assert (tiny["weights"], tiny["kept"]) == (manifest.weights, manifest.kept)
    assert tiny["size"] == TINY.stat().st_size


@pytest.mark.slow
def test_several_artifacts_and_what_becomes_of_them(me: Hub) -> None:
    push_to_hub(TINY, "me/masks")
    push_to_hub(EDGE, "me/masks")
    both = Card.read(card(me))
    assert list(both.sections) == ["edge_popup.popup.safetensors", "tiny.popup.safetensors"]
    assert len(ModelCard(card(me)).data.get("eval_results")) == 2
    me.add("me/masks", {"edge_popup.popup.safetensors": None, "edge_popup.popup.png": None})
    me.add("me/masks", {"random.popup.safetensors": RANDOM.read_bytes(), "other.safetensors": b"none"})
    push_to_hub(TINY, "me/masks")
    now = Card.read(card(me))
    assert list(now.sections) == ["random.popup.safetensors", "tiny.popup.safetensors"], "what is there, and no more"
    assert now.sections["tiny.popup.safetensors"] == both.sections["tiny.popup.safetensors"]
    assert "random.popup.png" not in card(me), "it came without a picture"
    assert list(config(me)["popup_surgery"]["artifacts"]) == list(now.sections)
    me.add("me/masks", {"random.popup.safetensors": EDGE.read_bytes()})
    push_to_hub(TINY, "me/masks")
    assert f"{inspect(EDGE).kept:,} of" in Card.read(card(me)).sections["random.popup.safetensors"], "it was replaced"


def test_what_the_owner_wrote_stays(me: Hub) -> None:
    push_to_hub(TINY, "me/masks")
    owners = (
        card(me).replace("# masks", "# My masks\n\nMade on a rainy day.").replace("- supermask", "- supermask\n- mine")
    )
    owners = (
        owners.replace("---\nlibrary_name", "---\n# about the model\nlicense: mit\nlibrary_name", 1) + "\n## See also\n"
    )
    me.add("me/masks", {"README.md": owners.encode(), "notes.txt": b"mine"})
    push_to_hub(EDGE, "me/masks")
    found = card(me)
    for text in (
        "# My masks\n\nMade on a rainy day.",
        "- mine\n",
        "# about the model\nlicense: mit\n",
        "\n## See also\n",
    ):
        assert text in found
    assert me.files("me/masks")["notes.txt"] == b"mine"
    assert list(Card.read(found).sections) == ["edge_popup.popup.safetensors", "tiny.popup.safetensors"]


def test_nothing_new_is_no_commit(me: Hub) -> None:
    first = push_to_hub(TINY, "me/masks")
    again = push_to_hub(TINY, "me/masks")
    assert again.commit == first.commit
    assert len(commits()) == 2


@pytest.mark.slow
def test_branches_and_pull_requests(me: Hub) -> None:
    push_to_hub(TINY, "me/masks")
    on_branch = push_to_hub(EDGE, "me/masks", revision="try/one")
    assert on_branch.address == "hf://me/masks@try%2Fone/edge_popup.popup.safetensors"
    asked = push_to_hub(RANDOM, "me/masks", create_pr=True, message="Look at this")
    assert asked.address == "hf://me/masks@refs/pr/1/random.popup.safetensors"
    assert asked.url == f"{me.url}/me/masks/discussions/1"
    assert "hf://me/masks/random.popup.safetensors" in card(me, revision="refs/pr/1"), "as it is once it is merged"
    assert "edge_popup.popup.safetensors" not in me.files("me/masks")
    for each, file in ((on_branch, EDGE), (asked, RANDOM)):
        assert equal_states(load(each.address), load(file))


@pytest.mark.slow
def test_networks_open_artifacts_and_addresses(me: Hub, tmp_path: Path) -> None:
    model = convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5)
    pushed = push_to_hub(model, "me/a", path_in_repo="net.popup.safetensors", provenance={"accuracy": 0.25})
    assert inspect(pushed.address).provenance["accuracy"] == 0.25
    assert {k: v.tolist() for k, v in masks(pushed.address).items()} == {k: v.tolist() for k, v in masks(model).items()}
    copy = push_to_hub(pushed.address, "me/b")
    assert copy.address == "hf://me/b/net.popup.safetensors"
    assert me.files("me/b")["net.popup.safetensors"] == me.files("me/a")["net.popup.safetensors"]
    opened = Artifact.open(TINY)
    contents = opened.contents
    memory = Artifact.of(opened.manifest, contents.masks, contents.stored, path="made.popup.safetensors")
    push_to_hub(memory, "me/c", path_in_repo="made.popup.safetensors")
    assert equal_states(load("hf://me/c/made.popup.safetensors"), load(TINY))
    for file, arguments, says in (
        (model, {}, "pass path_in_repo"), (TINY, {"provenance": {}}, "provenance is for a network"),
    ):  # fmt: skip
        with pytest.raises(PopupError, match=says):
            push_to_hub(file, "me/d", **arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_commit_in_between_is_kept(me: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(TINY, "me/masks")
    seen: list[str | None] = []
    real = push.Contents.of

    def then_somebody_commits(*arguments: Any) -> push.Contents:
        there = real(*arguments)
        if not seen:
            me.add("me/masks", {"README.md": card(me).encode() + b"Written meanwhile.\n"})
        seen.append(there.commit)
        return there

    monkeypatch.setattr(push.Contents, "of", then_somebody_commits)
    push_to_hub(EDGE, "me/masks")
    assert len(seen) == 2
    assert "Written meanwhile." in card(me)
    assert list(Card.read(card(me)).sections) == ["edge_popup.popup.safetensors", "tiny.popup.safetensors"]


@pytest.mark.slow
def test_pushes_at_the_same_time_lose_nothing(me: Hub, tmp_path: Path) -> None:
    names = [f"{i}.popup.safetensors" for i in range(4)]
    push_to_hub(TINY, "me/masks")
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(push_to_hub, TINY, "me/masks", path_in_repo=name) for name in names]:
            each.result()
    assert list(Card.read(card(me)).sections) == [*names, "tiny.popup.safetensors"]
    assert len(commits()) == 6
    me.fail("POST /api/models/me/masks/commit", status=412)
    with pytest.raises(HubError, match=r"me/masks: others committed at the same time, 8 times; push again"):
        push_to_hub(EDGE, "me/masks")


def test_a_token_in_hand_is_the_one(me: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    me.add("me/masks", {"random.popup.safetensors": RANDOM.read_bytes()}, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="the token may not see it"):
        list_repo("me/masks")
    pushed = push_to_hub(TINY, "me/masks", token="hf_me")
    found = list_repo("me/masks", token="hf_me")
    assert [one.path for one in found.artifacts] == ["random.popup.safetensors", "tiny.popup.safetensors"]
    said = f"{pushed}{caplog.text}{card(me)}{config(me)}{found}"
    assert "hf_me" not in said.replace("hf_me/", "")


def test_refused_before_anything_is_sent(me: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me.add("me/public", {"a.txt": b"a"})
    me.clear()
    for repo in ("masks", "me/", "a/b/c", "me/a b", "me/--x", "../x", "hf://me/x", "", None, "me/x.git"):
        with pytest.raises(HubError, match=r"the repository is .*; expected user/name"):
            push_to_hub(TINY, repo)  # type: ignore[arg-type]
    for path in ("a.bin", "/a.safetensors", "../a.safetensors", "a//b.safetensors", "a\nb.safetensors", ".safetensors",
                 "a\\b.safetensors", "README.md"):  # fmt: skip
        with pytest.raises(HubError, match=r"the path in the repository is .*; expected a name that ends in"):
            push_to_hub(TINY, "me/x", path_in_repo=path)
    for arguments, says in (({"revision": "a b"}, "the revision is 'a b'"), ({"license": "My own"}, "the license is")):
        with pytest.raises(HubError, match=says):
            push_to_hub(TINY, "me/x", **arguments)  # type: ignore[arg-type]
    damaged = tmp_path / "d.popup.safetensors"
    data = TINY.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for file, says in (
        (ARTIFACTS / "dense.safetensors", "this is not a popup artifact: dense weights"),
        (ARTIFACTS / "dnw.masks.safetensors", "this is not a popup artifact: masks"),
        (tmp_path / "none.safetensors", "the file does not exist"), (TINY.parent, "the folder of a run"),
        (damaged, "keeps 42 weights; expected 41"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=says):
            push_to_hub(file, "me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="me/x: to push, the Hub needs a token; log in"):
        push_to_hub(TINY, "me/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="me/x: HF_HUB_OFFLINE forbids to push"):
        push_to_hub(TINY, "me/x", token="hf_me")
    assert not me.log(), "no request was made"


def test_refused_with_the_repository_as_it_was(me: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = (ARTIFACTS / "dense.safetensors").read_bytes()
    marks = b"<!-- popup-surgery: begin -->\n"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"tiny.popup.safetensors": dense}, {}, "has another tiny.popup.safetensors, which is not a popup artifact"),
        ({"tiny.popup.png": b"mine"}, {}, "has a file tiny.popup.png, where the mask's picture would go"),
        ({"README.md": marks}, {}, "has of popup-surgery's marks begin"),
        ({"config.json": b"[]"}, {}, "config.json is not a JSON object"),
        ({}, {"private": True}, "exists and is public, and the push is to be private"),
        ({}, {"license": "no-such-license"}, 'the Hub refuses the card: .*"license" must be one of'),
    ]
    for number, (files, arguments, says) in enumerate(cases):
        repo = f"me/case{number}"
        me.add(repo, {"a.txt": b"a", **files})
        before = me.files(repo)
        with pytest.raises(PopupError, match=says) as error:
            push_to_hub(TINY, repo, **arguments)
        assert str(error.value).startswith(repo)
        assert me.files(repo) == before, says
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="the token may not write me/case4"):
        push_to_hub(TINY, "me/case4")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match="the token may not write"):
        push_to_hub(TINY, "me/case4")
    with pytest.raises(HubError, match="there is no repository me/none"):
        push_to_hub(TINY, "me/none", create_pr=True)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "says"), [
    ({"status": 429}, "the Hub takes no more requests"), ({"status": 500}, "the Hub has an error of its own"),
    ({"break_after": 0}, "the connection to .* broke|cannot be reached|transfer failed"),
])  # fmt: skip
def test_faults_of_the_commit(me: Hub, fault: dict[str, Any], says: str) -> None:
    me.add("me/masks", {"a.txt": b"a"})
    before = me.files("me/masks")
    me.fail("POST /api/models/me/masks/commit", **fault)
    with pytest.raises(HubError, match=says):
        push_to_hub(TINY, "me/masks")
    after = me.files("me/masks")
    assert after == before or "break_after" in fault, "the Hub may have taken a commit whose answer was lost"
    me.clear()
    push_to_hub(TINY, "me/masks")
    now = me.files("me/masks")
    assert now.keys() == {"a.txt", "tiny.popup.safetensors", "tiny.popup.png", "README.md", "config.json"}
    assert after in (before, now), "all of a push or nothing"


def test_the_commands(me: Hub, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    file = shutil.copy(TINY, tmp_path / "digits.popup.safetensors")
    done = cli("push", file, "me/masks", "--license", "mit", "--private", "-m", "First")
    assert (done.status, done.err) == (0, "")
    url, *lines = done.out.splitlines()
    assert url.startswith(f"pushed {me.url}/me/masks/commit/")
    assert lines[1] == 'network = ps.load("hf://me/masks/digits.popup.safetensors")'
    assert commits()[0] == "First"
    done = cli("push", EDGE, "me/masks", "--path-in-repo", "sub/e.popup.safetensors", "--create-pr")
    assert done.out.startswith(f"pushed {me.url}/me/masks/discussions/1\n")
    for arguments, says in (
        ((file, "masks"), "error: the repository is 'masks'; expected user/name"),
        ((file, "other/masks"), "error: other/masks: "),
        ((ARTIFACTS / "dense.safetensors", "me/x"), "this is not a popup artifact"),
    ):
        done = cli("push", *arguments)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert says in done.err
    assert "--token" not in cli("push", "--help").out, "a token would stay in the shell's history"


def test_help_ends_with_real_calls_and_their_output(me: Hub, cli: Callable[..., Outcome], artifact: Path) -> None:
    for command in ("push", "list", "card"):
        line, *wanted = cli(command, "--help").out.partition("$ popup-surgery ")[2].rstrip().split("\n")
        call, _, head = line.partition(" | head -n ")
        done = cli(*call.split())
        assert (done.status, done.err) == (0, "")
        out = re.sub(r"commit/\w{40}", "commit/#", done.out.replace(me.url, "https://huggingface.co"))
        said = out.splitlines()[: int(head) if head else None]
        shown = [re.sub(r"commit/\w{40}", "commit/#", line.strip()) for line in wanted if line.strip()]
        blurred = [[re.sub(r"\d[\d.,]*", "#", line).split() for line in lines] for lines in (said, shown)]
        assert blurred[0] == blurred[1]


@pytest.mark.slow
def test_a_push_says_what_it_replaced(me: Hub) -> None:
    def pushed(file: Path) -> bool:
        return push_to_hub(file, "me/masks", path_in_repo="a.popup.safetensors").replaced

    assert not pushed(TINY)
    assert not pushed(TINY), "it is the same file"
    assert pushed(PRETRAINED)
