"""The picture of the home page is drawn from a run: its squares are the file's, its accuracies are measured."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import popup_surgery as ps
from support import ROOT

DOCS = ROOT / "docs"
PICTURES = [f"hidden-network-{theme}.png" for theme in ("light", "dark")]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hidden_network", DOCS / "hidden_network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_measures_and_draws(
    program: ModuleType,
    ten: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["data.name=folder", "training.epochs=1", "model.kwargs={width: 0.1}", "data.workers=0"]
    arguments = ["--data-dir", str(ten), "--output", str(tmp_path / "run"), "--images", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hidden_network.py", *arguments, *(f"--set={change}" for change in changes)])
    program.main()
    (file,) = (tmp_path / "run").glob("*.popup.safetensors")
    shown = {name: float(share) for name, share in re.findall(r"^(\w+ \w+) +(\S+)$", capsys.readouterr().out, re.M)}
    assert shown.keys() == {"all weights", "shuffled mask", "learned mask"}
    assert shown["learned mask"] == round(ps.evaluate(file, data_dir=ten).accuracy, 4)
    for name in PICTURES:
        assert np.asarray(Image.open(tmp_path / name))[0, 0, 3] == 0, "the page shows through"


def test_the_squares_are_those_of_the_file(program: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "conv2.popup.safetensors"
    ps.save(ps.convert("conv2", k=0.3, scheme="signed_kaiming_constant", seed=4), file)
    weights, kept = program.kernels(ps.Artifact.open(file))
    assert weights.shape == (program.ROWS * program.COLUMNS, 3, 3)
    effective = ps.load(file).get_parameter("features.0.weight").detach().flatten(0, 1)[: len(weights)].numpy()
    np.testing.assert_array_equal(np.where(kept, weights, 0.0), effective)
    assert (weights != 0).all()


def test_all_weights_differ_from_the_mask(program: ModuleType, digits_run: ps.Result) -> None:
    """A trained network, so that the three accuracies are far apart."""
    shown = program.accuracies(ps.Artifact.open(digits_run.file), None)
    assert shown["learned mask"] == digits_run.accuracy
    assert max(shown["all weights"], shown["shuffled mask"]) < 0.5


def test_the_pictures_are_small_and_shown_with_the_command_that_drew_them() -> None:
    for page, folder in (("README.md", "docs/images"), ("docs/index.md", "images")):
        text = (ROOT / page).read_text()
        assert "`python docs/hidden_network.py --data-dir DIR`" in text
        for name in PICTURES:
            assert f"{folder}/{name}" in text
            assert (DOCS / "images" / name).stat().st_size < 200_000
