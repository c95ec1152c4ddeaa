"""The recipe section `hub`: checked before a run, pushed after it, and no part of what the run is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub
from popup_surgery import Recipe, inspect, list_repo, train
from popup_surgery.config.keys import fingerprint
from popup_surgery.errors import HubError, RecipeError
from popup_surgery.sweep import Sweep
from support import GOLDEN, ROOT, Outcome

TINY = ["data.max_train=64", "data.max_validation=32", "training.epochs=1"]
Cli = Callable[..., Outcome]


@pytest.fixture
def me(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub of this test, for a user who may write."""
    hub.here(monkeypatch, tmp_path / "home", token="hf_me")
    return hub


def test_a_run_ends_with_a_push(me: Hub, tmp_path: Path) -> None:
    result = train("digits", overrides=[*TINY, "hub=me/digits"], output=tmp_path / "run")
    assert result.pushed is not None
    assert result.pushed.address == "hf://me/digits/digits.popup.safetensors"
    assert me.files("me/digits")["digits.popup.safetensors"] == result.file.read_bytes()
    assert "hub" not in inspect(result.file).provenance["recipe"]
    left = "".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.suffix in (".yaml", ".jsonl"))
    assert "hf_me" not in left
    plain = train("digits", overrides=TINY, output=tmp_path / "plain")
    assert plain.file.read_bytes() == result.file.read_bytes()
    assert plain.pushed is None
    again = train("digits", overrides=[*TINY, "hub={repo: me/other, path: a/b.safetensors, private: true}"],
                  output=tmp_path / "run", resume=True)  # fmt: skip
    assert again.pushed is not None
    assert again.pushed.address == "hf://me/other/a/b.safetensors"
    assert me.files("me/other")["a/b.safetensors"] == result.file.read_bytes()


def test_refused_before_the_run(me: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me.add("me/public", {"a.txt": b""})
    me.add("other/x", {"a.txt": b""})
    cases: list[tuple[str, str | None, bool, str]] = [
        ("me/digits", None, False, "me/digits: to push, the Hub needs a token; log in"),
        ("me/digits", "hf_wrong", False, "me/digits: the Hub does not know the token"),
        ("me/digits", "hf_reader", False, "me/digits: the token of me may only read; use one that may write"),
        ("other/x", "hf_me", False, "the token may not write other/x"),
        ("{repo: me/public, private: true}", "hf_me", False, "me/public exists and is public"),
        ("{repo: me/public, license: nope}", "hf_me", False, "me/public: the Hub refuses the license nope"),
        ("me/digits", "hf_me", True, "me/digits: HF_HUB_OFFLINE forbids to push"),
    ]
    for hub, token, offline, says in cases:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=says):
            train("digits", overrides=[*TINY, f"hub={hub}"], output=tmp_path / "run")
        assert not (tmp_path / "run").exists(), "nothing was begun"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    me.stop()
    with pytest.raises(HubError, match="cannot be reached"):
        train("digits", overrides=[*TINY, "hub=me/digits"], output=tmp_path / "run")


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_run_finished(
    me: Hub, tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    me.fail("POST /api/models/me/digits/commit", status=503)
    arguments = [part for each in (*TINY, "hub={repo: me/digits, license: mit}") for part in ("--set", each)]
    done = cli("train", "digits", *arguments, "-o", tmp_path / "run")
    file = tmp_path / "run" / "digits.popup.safetensors"
    by_hand = f"popup-surgery push {file} me/digits --license mit"
    assert done.status == 1
    assert f"the run in {tmp_path / 'run'} is finished, but its file was not pushed: me/digits: " in caplog.text
    assert done.err.splitlines()[-1] == f"error: the file was not pushed; to do so: {by_hand}"
    assert file.exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "digits.popup.safetensors" not in me.files("me/digits")
    me.clear()
    done = cli("train", "digits", *arguments, "-o", tmp_path / "run", "--resume")
    assert done.status == 0
    assert "had already finished" in done.out
    assert f"pushed        {me.url}/me/digits/commit/" in done.out
    assert me.files("me/digits")["digits.popup.safetensors"] == file.read_bytes()


@pytest.mark.slow
def test_several_processes_push_once(hub: Hub, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "popup_surgery",
        "train",
        "digits",
        "--num-processes",
        "2",
        "-o",
        str(tmp_path / "run"),
    ]
    command += [part for each in (*TINY, "hub=me/digits") for part in ("--set", each)]
    env = hub.environment(tmp_path / "home", token="hf_me", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    hub.fail("POST /api/models/me/digits/commit", status=503)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: the file was not pushed") == 1
    hub.clear()
    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sum(each["method"] == "POST" and "/commit/" in each["path"] for each in hub.log()) == 1
    assert "digits.popup.safetensors" in hub.files("me/digits")


def test_the_section_is_no_part_of_the_run() -> None:
    plain = Recipe.load("digits")
    for hub in ("me/digits", "{repo: me/x, path: a.safetensors, private: true, revision: b, license: mit}"):
        assert fingerprint(Recipe.load("digits", [f"hub={hub}"])) == fingerprint(plain)
    for file in sorted(GOLDEN.rglob("recipe.yaml")):
        recipe = Recipe.load(file)
        assert recipe.hub is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["hub=digits"], "hub is 'digits'; expected user/name"),
        (["hub={repo: a/b/c}"], "hub.repo is 'a/b/c'; expected user/name"),
        (["hub={repo: me/x, token: hf_secret}"], "hub.token is not a key of a recipe"),
        (["hub={repo: me/x, path: a.bin}"], "hub.path is 'a.bin'; expected a name that ends in .safetensors"),
        (["hub={repo: me/x, revision: 'a b'}"], "hub.revision is 'a b'; expected the name of a branch"),
        (["hub={repo: me/x, license: My own}"], "hub.license is 'My own'; expected an identifier"),
        (["hub=me/x", "surgery=none"], "hub is there, and the run ends with dense weights; only artifacts are pushed"),
        (["hub=me/x", "surgery.learner=dnw"], "only artifacts are pushed"),
    ],
)
def test_mistakes_in_the_section(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load("digits", settings)
    assert says in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_each_run_of_a_sweep_has_a_file_of_its_own() -> None:
    sweep = Sweep.load("digits", ["surgery.k=[0.3, 0.5]", "hub=me/sweep"], seeds=2)
    hubs = [run.recipe.hub for run in sweep.runs]
    paths = [hub.path for hub in hubs if hub is not None]
    assert len(set(paths)) == 4
    assert paths[0] == f"k=0.3,seed=0-{sweep.runs[0].name}.popup.safetensors"
    assert [run.name for run in sweep.runs] == [
        run.name for run in Sweep.load("digits", ["surgery.k=[0.3, 0.5]"], seeds=2).runs
    ]
    with pytest.raises(RecipeError, match=r"hub.path is 'a.safetensors' for several runs; remove it"):
        Sweep.load("digits", ["surgery.k=[0.3, 0.5]", "hub={repo: me/sweep, path: a.safetensors}"])


@pytest.mark.slow
def test_a_sweep_pushes_its_runs(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    for name, value in hub.environment(tmp_path / "home", token="hf_me").items():
        monkeypatch.setenv(name, value)
    settings = [part for each in (*TINY, "surgery.k=[0.3, 0.5]", "hub=me/sweep") for part in ("--set", each)]
    done = cli("sweep", "digits", *settings, "-o", tmp_path / "sweep", "--jobs", "2")
    assert done.status == 0, done.err
    hub.here(monkeypatch, tmp_path / "home", token="hf_me")
    found = list_repo("me/sweep")
    assert [one.path.split("-")[0] for one in found.artifacts] == ["k=0.3", "k=0.5"]
    config: Any = json.loads(hub.files("me/sweep")["config.json"])
    assert len(config["popup_surgery"]["artifacts"]) == 2
