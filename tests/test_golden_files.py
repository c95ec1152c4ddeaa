"""Files of earlier versions: each loads, resumes, and is recognised. tests/golden/README.md says what each file is.

Digests are compared where a result is exact by design: masks, weights rebuilt from a seed, stored tensors. What
training or a forward pass computes may differ between processors, and is compared with a tolerance.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from safetensors.torch import load_file
from torch import Tensor, nn

from popup_surgery import (
    ArtifactError,
    PopupError,
    Recipe,
    RunError,
    bake,
    build,
    convert,
    evaluate,
    inspect,
    load,
    masks,
    sampled,
    save,
    start_from,
    train,
    verify,
)
from popup_surgery.sweep import Run, Sweep, execute
from popup_surgery.sweep.engines import Events, Stop
from support import PATIENCE, lines, state_digest

GOLDEN = Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "digests.json").read_text(encoding="utf-8"))
CONV2: dict[str, Any] = {"width": 0.05, "in_chans": 1, "img_size": 8}  # of tiny.yaml
DENSE = GOLDEN / "artifacts" / "dense.safetensors"


def layers() -> nn.Module:
    """A network of torch.nn classes alone, with a layer of each kind that reads its weights in a way of its own."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 6, 3, stride=2),
            "norm": nn.BatchNorm2d(6),
            "lstm": nn.LSTM(9, 8, batch_first=True),
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
            "place": nn.Embedding(6, 8),
            "head": nn.Linear(8, 10),
        }
    )


def small() -> nn.Module:
    """The same without layers that a `Sequential` cannot call, so that the hooks of a global ranking run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10))


def images() -> Tensor:
    return torch.linspace(-1, 1, 8 * 64).sin().view(8, 1, 8, 8) + torch.eye(8)


def outputs(net: nn.Module) -> Tensor:
    """What a network computes for `images`."""
    if not isinstance(net, nn.ModuleDict):
        return net(images())
    maps = net["norm"](net["conv"](images())).relu()
    steps, _ = net["lstm"](maps.flatten(2))
    mixed, _ = net["attention"](steps, steps, steps)
    return net["head"]((mixed + net["place"](torch.arange(6))).mean(1))


def step(net: nn.Module) -> float:
    """One step of training. The loss before it."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.train()
    with sampled(0):
        loss = nn.functional.cross_entropy(outputs(net), torch.arange(8))
    if learning:
        loss.backward()
        torch.optim.SGD(learning, lr=5.0).step()
    return float(loss.detach())


def agreement(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share of weights that two sets of masks decide alike."""
    assert one.keys() == other.keys()
    same = sum(int((one[key] == other[key]).sum()) for key in one)
    return same / sum(mask.numel() for mask in one.values())


def nonzero(net: nn.Module) -> dict[str, Tensor]:
    return {key: tensor != 0 for key, tensor in net.state_dict().items()}


# artifacts


ARTIFACTS: dict[str, Callable[[], nn.Module] | None] = {  # with the network that a reader has to hand over
    "edge_popup": None, "supermask": None, "supermask_rescaled": None, "random": None, "global": None,
    "pretrained": None, "norm_train": small, "layers": layers,
}  # fmt: skip


def open_artifact(name: str) -> nn.Module:
    network = ARTIFACTS[name]
    base = DENSE if name == "pretrained" else None
    return load(GOLDEN / "artifacts" / f"{name}.popup.safetensors", network and network(), base=base)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_gives_the_network_that_was_saved(name: str) -> None:
    file, network = GOLDEN / "artifacts" / f"{name}.popup.safetensors", ARTIFACTS[name]
    net, recorded = open_artifact(name), RECORDED["artifacts"][name]
    assert state_digest(net.state_dict()) == recorded["state"]
    with torch.no_grad():
        torch.testing.assert_close(outputs(net), torch.tensor(recorded["outputs"]), rtol=1e-3, atol=1e-4)
    checked = verify(file, network and network(), base=DENSE if name == "pretrained" else None)
    assert checked, str(checked)
    assert inspect(file).masks_sha256 == recorded["masks_sha256"]


@pytest.mark.parametrize("name", ["edge_popup", "supermask", "random", "global"])
def test_a_network_starts_from_an_artifact_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    file = GOLDEN / "artifacts" / f"{name}.popup.safetensors"
    surgery = inspect(file).provenance["recipe"]["surgery"]
    net = convert(build("popup_surgery/conv2", **CONV2), **surgery)
    start_from(net, file)
    assert state_digest(bake(net).state_dict()) == RECORDED["artifacts"][name]["state"]
    save(net, tmp_path / "again", provenance=inspect(file).provenance)
    one, other = load_file(file), load_file(tmp_path / "again")
    assert state_digest(one) == state_digest(other)


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if ARTIFACTS[name] is None])
def test_an_artifact_is_evaluated_on_the_images_that_it_names(name: str) -> None:
    file = GOLDEN / "artifacts" / f"{name}.popup.safetensors"
    found = evaluate(file, base=DENSE if name == "pretrained" else None)
    assert (found.data, found.images) == ("digits", 200)
    assert found.accuracy == pytest.approx(inspect(file).provenance["accuracy"], abs=0.02)


@pytest.mark.parametrize("name", ["dense", "dnw"])
def test_weights_that_were_trained_are_read(name: str) -> None:
    file = GOLDEN / "artifacts" / f"{name}.safetensors"
    net = build("popup_surgery/conv2", pretrained=file, **CONV2)
    assert state_digest(net.state_dict()) == state_digest(load_file(file)) == RECORDED["dense"][name]
    if name == "dnw":
        kept = load_file(file.with_suffix(".masks.safetensors"))
        assert all(mask.dtype == torch.bool for mask in kept.values())
        assert agreement(nonzero(net), kept) == 1


# runs


RUNS = {"tiny": "tiny.popup.safetensors", "ticket": "ticket.safetensors"}


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "popup_surgery", *map(str, words)], capture_output=True, text=True, timeout=PATIENCE
    )


def copied(source: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / source, tmp_path / "run"))


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def kept_by(name: str, folder: Path) -> dict[str, Tensor]:
    """The masks in the result of a run."""
    if name == "ticket":
        return load_file(folder / "ticket.masks.safetensors")
    return nonzero(load(folder / RUNS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_to_the_end(name: str, tmp_path: Path) -> None:
    """In this process and by the command line to the same bytes, and nearly to what an undisturbed run gave then."""
    here, there = (copied(f"stopped/{name}", tmp_path / place) for place in ("here", "there"))
    before = lines(here)
    state = json.loads(max((here / "checkpoints").glob("*.json")).read_bytes())
    assert 0 < len(before) == len(state["history"])
    assert state["batch"] > 0, "within an epoch"
    result = train(GOLDEN / f"{name}.yaml", output=here, resume=True)
    assert result.file == here / RUNS[name]
    done = command("train", GOLDEN / f"{name}.yaml", "-o", there, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"epoch {len(before) + 1}/" in done.stdout
    assert "epoch 1/" not in done.stdout
    assert results(here) == results(there)
    assert not (here / "checkpoints").exists()

    through = lines(GOLDEN / "finished" / name)
    assert lines(here)[: len(before)] == before
    assert [line["epoch"] for line in lines(here)] == [line["epoch"] for line in through]
    for ours, theirs in zip(lines(here), through, strict=True):
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
        assert ours["changed"] == pytest.approx(theirs["changed"], abs=0.01)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
    assert agreement(kept_by(name, here), kept_by(name, GOLDEN / "finished" / name)) > 0.985
    if name == "tiny":
        assert verify(result.file)
        assert state_digest(load(result.file).state_dict()) == state_digest(result.model.state_dict())
    else:
        assert agreement(nonzero(result.model), kept_by(name, here)) == 1


def test_a_stopped_run_that_is_stopped_again_says_so(tmp_path: Path) -> None:
    run = copied("stopped/tiny", tmp_path)

    def stop(epoch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PopupError, match="stopped after step") as stopped:
        train(GOLDEN / "tiny.yaml", output=run, resume=True, after_epoch=stop)
    assert getattr(stopped.value, "status", None) == 75
    whole = train(GOLDEN / "tiny.yaml", output=run, resume=True)
    assert verify(whole.file)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copied("stopped/tiny", tmp_path / "damaged")
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    result = train(GOLDEN / "tiny.yaml", output=run, resume=True)
    assert f"{newest} is damaged" in caplog.text
    whole = train(GOLDEN / "tiny.yaml", output=copied("stopped/tiny", tmp_path / "whole"), resume=True)
    assert result.file.read_bytes() == whole.file.read_bytes()


def unchanged(folder: Path) -> Callable[[], bool]:
    """Whether a folder's files still are what they are now, and as old."""

    def found() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}

    before = found()
    return lambda: found() == before


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_recognised(name: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    run = copied(f"finished/{name}", tmp_path)
    same = unchanged(run)

    def never(epoch: Any) -> None:
        raise AssertionError("it trained")

    result = train(GOLDEN / f"{name}.yaml", output=run, resume=True, after_epoch=never)
    recorded = RECORDED["finished"][name]
    assert state_digest(result.model.state_dict()) == recorded["state"]
    assert (result.accuracy, result.weights, result.kept) == (
        recorded["accuracy"], recorded["weights"], recorded["kept"],
    )  # fmt: skip
    assert len(result.history) == len(lines(run))
    done = cli("train", GOLDEN / f"{name}.yaml", "-o", run, "--resume")
    assert done.status == 0
    assert f"the run in {run} had already finished" in done.out
    for also in ((), ("training.lr=0.5",)):
        with pytest.raises(RunError, match="of another recipe" if also else "holds a run already"):
            train(GOLDEN / f"{name}.yaml", overrides=also, output=run, resume=bool(also))
    assert same()


# sweeps


class Nothing:
    """An engine that has nothing to do."""

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, runs: Sequence[Run], output: Path, stop: Stop) -> Events:
        assert not runs
        yield None


def sweep_folder(tmp_path: Path) -> Path:
    """A copy without the results, which are to be written again."""
    folder = Path(shutil.copytree(GOLDEN / "sweep", tmp_path / "sweep"))
    for file in ("results.json", "results.csv"):
        (folder / file).unlink()
    return folder


def test_a_finished_sweep_is_recognised(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path)
    same = {run: unchanged(run) for run in folder.iterdir()}
    outcomes = execute(Sweep.load(GOLDEN / "sweep.yaml"), folder, Nothing())
    assert sorted(outcome.run.name for outcome in outcomes) == sorted(run.name for run in same)
    assert {str(outcome.state) for outcome in outcomes} == {"finished"}
    assert all(check() for check in same.values())
    for file in ("results.json", "results.csv"):
        assert (folder / file).read_bytes() == (GOLDEN / "sweep" / file).read_bytes()


@pytest.mark.slow
def test_a_finished_sweep_is_recognised_by_the_command_line(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path)
    same = {run: unchanged(run) for run in folder.iterdir()}
    done = command("sweep", GOLDEN / "sweep.yaml", "-o", folder, "--jobs", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("6 of 6 runs had ended before\n")
    assert all(check() for check in same.values())
    for file in ("results.json", "results.csv"):
        assert (folder / file).read_bytes() == (GOLDEN / "sweep" / file).read_bytes()


def section(name: str) -> type[BaseModel]:
    """The class of a recipe's section; of the recipe itself for ``."""
    if not name:
        return Recipe
    found = Recipe.model_fields[name].annotation
    return next(one for one in (found, *get_args(found)) if isinstance(one, type) and issubclass(one, BaseModel))


SECTIONS = ["model", "surgery", "data", "training", ""]


@pytest.fixture
def a_key_more(request: pytest.FixtureRequest) -> Iterator[str]:
    """A key that no recipe of that time knew, `added: 7`, in one section or beside them."""
    home = section(request.param)
    home.model_fields["added"] = FieldInfo(annotation=int, default=7)
    try:
        for cls in (home, Recipe):
            cls.model_rebuild(force=True)
        yield f"{request.param}.added".lstrip(".")
    finally:
        del home.model_fields["added"]
        for cls in (home, Recipe):
            cls.model_rebuild(force=True)


@pytest.mark.parametrize("a_key_more", SECTIONS, indirect=True)
def test_a_new_key_leaves_a_finished_run_what_it_was(a_key_more: str, tmp_path: Path) -> None:
    run = copied("finished/tiny", tmp_path)
    result = train(GOLDEN / "tiny.yaml", output=run, resume=True)
    assert state_digest(result.model.state_dict()) == RECORDED["finished"]["tiny"]["state"]
    with pytest.raises(RunError, match=f"of another recipe: {a_key_more} is 7 there and 8 here"):
        train(GOLDEN / "tiny.yaml", overrides=[f"{a_key_more}=8"], output=run, resume=True)


@pytest.mark.parametrize("a_key_more", SECTIONS, indirect=True)
def test_a_new_key_leaves_a_finished_sweep_what_it_was(a_key_more: str, tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path)
    execute(Sweep.load(GOLDEN / "sweep.yaml"), folder, Nothing())
    assert (folder / "results.json").read_bytes() == (GOLDEN / "sweep" / "results.json").read_bytes()
    values = {"recipe": str(GOLDEN / "tiny.yaml"), "set": {"training.epochs": 2, a_key_more: 8}, "seeds": 2}
    assert not {run.name for run in Sweep.parse(values).runs} & {path.name for path in folder.iterdir()}


# networks written by torch.save


SAVED: dict[str, Callable[[], nn.Module] | None] = {  # with the plain network, where its result can be saved
    "edge_popup": layers, "global": small, "supermask": layers, "supermask_rescaled": small, "random": small,
    "dnw": None, "conv2": lambda: build("popup_surgery/conv2", **CONV2),
    "pretrained": lambda: build("popup_surgery/conv2", pretrained=DENSE, **CONV2),
}  # fmt: skip


def opened(name: str) -> nn.Module:
    return torch.load(GOLDEN / "saved" / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("name", SAVED)
def test_a_network_of_torch_save_is_what_it_was(name: str) -> None:
    net, recorded = opened(name), RECORDED["saved"][name]
    assert state_digest(masks(net)) == recorded["masks"]
    plain = bake(net).eval()
    assert state_digest(plain.state_dict()) == recorded["state"]
    with torch.no_grad():
        torch.testing.assert_close(outputs(plain), torch.tensor(recorded["outputs"]), rtol=1e-3, atol=1e-4)
        if not name.startswith("supermask"):  # which shows a sample
            torch.testing.assert_close(outputs(net.eval()), outputs(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAVED)
def test_a_network_of_torch_save_trains_and_is_saved(name: str, tmp_path: Path) -> None:
    net = opened(name)
    before, frozen = masks(net), {key: tensor for key, tensor in net.state_dict().items() if key.endswith("weight")}
    frozen = {key: tensor.clone() for key, tensor in frozen.items() if key in before}
    assert all(torch.isfinite(torch.tensor(step(net))) for _ in range(2))
    assert (agreement(masks(net), before) == 1) == (name == "random")
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in frozen.items())
    assert agreement(masks(torch.load(saved(net, tmp_path), weights_only=False)), masks(net)) == 1
    network = SAVED[name]
    if network is None:
        with pytest.raises(ArtifactError, match="trains the weights themselves"):
            save(net, tmp_path / "net")
        return
    save(net, tmp_path / "net")
    assert state_digest(load(tmp_path / "net", network()).state_dict()) == state_digest(bake(net).state_dict())
    if name in ("conv2", "pretrained"):  # whose description travels with them
        assert inspect(tmp_path / "net").architecture.name == "conv2"
    if name == "pretrained":
        assert state_digest(load(tmp_path / "net", base=DENSE).state_dict()) == state_digest(bake(net).state_dict())


def saved(net: nn.Module, tmp_path: Path) -> Path:
    torch.save(net, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_network_of_torch_save_is_completed_by_convert() -> None:
    """It knows the settings that it was converted with."""
    net: Any = opened("global")
    net[4] = nn.Linear(54, 3)
    convert(net, k=0.4, scheme="kaiming_uniform", seed=5, scope="global")
    assert set(masks(net)) == {"0.weight", "4.weight"}
    with pytest.raises(PopupError, match=r"was converted with k=0\.4, which 0\.9 cannot change"):
        convert(opened("edge_popup"), k=0.9)


def test_a_state_dict_is_read_by_a_network_that_is_converted_now() -> None:
    state = torch.load(GOLDEN / "saved" / "edge_popup.state_dict.pt", weights_only=True)
    recorded = RECORDED["saved"]["edge_popup"]
    net = convert(layers(), k=0.4, seed=5, norm="train")
    assert state_digest(masks(net)) != recorded["masks"]
    assert net.state_dict().keys() == state.keys()
    net.load_state_dict(state)
    assert state_digest(masks(net)) == recorded["masks"]
    assert state_digest(bake(net).state_dict()) == recorded["state"]


# a third party's script


@pytest.mark.slow
def test_a_script_of_a_third_party_still_works(tmp_path: Path) -> None:
    script, file = GOLDEN / "third_party.py", GOLDEN / "third_party.popup.safetensors"
    done = subprocess.run(
        [sys.executable, "-W", "default", str(script), str(tmp_path / "new"), str(file)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == RECORDED["third_party"]
    others = [line for line in done.stderr.splitlines() if "Warning: " in line and "DeprecationWarning: " not in line]
    assert not others
