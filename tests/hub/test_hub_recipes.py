"""`model.init_from` with an address: a run starts from that file, and resumes with the same one whatever is pushed."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import popup_surgery as ps
from hub_server import Hub
from popup_surgery.config.yaml import read_yaml, to_yaml
from popup_surgery.sweep import Sweep
from support import GOLDEN, equal_states

ADDRESS = "hf://me/digits"
FIRST = GOLDEN / "artifacts" / "edge_popup.popup.safetensors"


def quick(source: str, **sections: Any) -> dict[str, Any]:
    """A recipe of two short epochs for the network of the file."""
    values = read_yaml(GOLDEN / "tiny.yaml")
    values = values | sections
    values["model"]["init_from"] = source
    values["data"] |= {"max_train": 64, "max_validation": 32}
    values["training"]["epochs"] = 2
    return values


def begin(output: Path, source: str, **arguments: Any) -> ps.Result:
    return ps.train(quick(source), output=output, **arguments)


@pytest.fixture
def other(tmp_path: Path) -> bytes:
    """An artifact of the same network and weights with another mask."""
    first = ps.inspect(FIRST)
    model = ps.build(f"popup_surgery/{first.architecture.name}", **first.architecture.kwargs)
    ps.save(ps.convert(model, 0.5, scheme="signed_kaiming_constant", scaled=False, seed=first.seed), tmp_path / "other")
    return (tmp_path / "other").read_bytes()


def stop(epoch: object) -> None:
    """Stop the run after its first epoch."""
    os.kill(os.getpid(), signal.SIGTERM)


def commit(hub: Hub) -> str:
    return hub.refs("me/digits")["refs/heads/main"]


def test_a_run_starts_from_an_address(here: Hub, tmp_path: Path) -> None:
    """As from the file; the recipe and the result say which commit it was, and no token."""
    found, expected = begin(tmp_path / "hub", ADDRESS), begin(tmp_path / "file", str(FIRST))
    assert equal_states(found.model, expected.model)
    model = read_yaml(tmp_path / "hub" / "recipe.yaml")["model"]
    assert (model["init_from"], model["init_commit"]) == (ADDRESS, commit(here))
    recorded = ps.inspect(found.file).provenance["recipe"]["model"]
    assert (recorded["init_from"], recorded["init_commit"]) == (ADDRESS, commit(here))
    assert ps.inspect(expected.file).provenance["recipe"]["model"]["init_from"] == FIRST.name


@pytest.mark.slow
def test_resume_after_a_push(here: Hub, other: bytes, tmp_path: Path) -> None:
    """A stopped run resumes from the commit it began with, and so does one whose checkpoints are gone."""
    expected = begin(tmp_path / "whole", ADDRESS)
    first = commit(here)
    with pytest.raises(ps.errors.Stopped):
        begin(tmp_path / "stopped", ADDRESS, after_epoch=stop)
    shutil.copytree(tmp_path / "stopped", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoints")
    here.add("me/digits", {"digits.popup.safetensors": other})
    assert commit(here) != first
    for name in ("stopped", "lost"):
        resumed = begin(tmp_path / name, ADDRESS, resume=True)
        assert equal_states(resumed.model, expected.model), name
        assert ps.inspect(resumed.file).provenance["recipe"]["model"]["init_commit"] == first
    assert not equal_states(begin(tmp_path / "new", ADDRESS).model, expected.model), (
        "a new run starts from the new file"
    )
    here.stop()
    assert begin(tmp_path / "stopped", ADDRESS, resume=True).accuracy == expected.accuracy, "without the Hub, too"


def test_another_address_is_another_run(here: Hub, tmp_path: Path) -> None:
    begin(tmp_path / "run", ADDRESS)
    with pytest.raises(
        ps.RunError, match=r"of another recipe: model\.init_from is 'hf://me/digits' there and 'hf://me/d"
    ):
        begin(tmp_path / "run", f"{ADDRESS}@main", resume=True)


def test_a_dense_run_starts_from_an_address(here: Hub, tmp_path: Path) -> None:
    """With `surgery: none`, weights and masks come from the file."""
    states = []
    for name, source in (("hub", ADDRESS), ("file", str(FIRST))):
        states.append(ps.train(quick(source, surgery="none"), output=tmp_path / name).model)
    assert equal_states(*states)


def test_a_sweep_keeps_its_names(here: Hub, other: bytes, tmp_path: Path) -> None:
    """The names of a sweep's runs do not change when something is pushed, so that what is finished is not run again."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(quick(ADDRESS)))
    values = {"recipe": "recipe.yaml", "grid": {"training.lr": [0.1, 0.2]}}

    def names() -> list[str]:
        return [run.name for run in Sweep.parse(values, folder=tmp_path).runs]

    before = names()
    here.add("me/digits", {"digits.popup.safetensors": other})
    assert names() == before


def test_a_commit_needs_an_address(tmp_path: Path) -> None:
    values = read_yaml(GOLDEN / "tiny.yaml")
    values["model"] |= {"init_from": str(FIRST), "init_commit": "0" * 40}
    with pytest.raises(ps.RecipeError, match=r"model\.init_from is .*; expected an address hf://"):
        ps.train(values, output=tmp_path / "run")
    values["model"]["init_commit"] = "main"
    with pytest.raises(ps.RecipeError, match=r"model\.init_commit is 'main'; expected a commit of 40 digits"):
        ps.Recipe.parse(values)
