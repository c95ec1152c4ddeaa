"""Learners of a user's own: in every process that needs them, and imported only because the user named them."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import popup_surgery
from popup_surgery import PopupError, Recipe, RecipeError, UnknownName, evaluate, load
from popup_surgery import plugins as plugins_module
from popup_surgery.codecs import CODECS
from popup_surgery.config.catalog import find
from popup_surgery.config.keys import fingerprint
from popup_surgery.learners import LEARNERS
from popup_surgery.plugins import load_entry_points, load_plugins, loaded_plugins, restore_plugins
from popup_surgery.sweep import Sweep
from popup_surgery.weights import SCHEMES
from support import PATIENCE, Outcome, slow_except

Cli = Callable[..., Outcome]
PLUGIN = """
from popup_surgery.learners import EdgePopup, register_learner

class Mine(EdgePopup):
    pass

register_learner("mine", Mine())
"""
EVIL = "raise SystemExit('imported')\n"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    registries: list[dict[str, Any]] = [LEARNERS, CODECS, SCHEMES, plugins_module._loaded]
    before = [dict(registry) for registry in registries]
    yield
    for registry, values in zip(registries, before):
        registry.clear()
        registry.update(values)


def written(folder: Path, **more: Any) -> Path:
    """A recipe of one short epoch with the learner `mine`."""
    values = yaml.safe_load(find("digits").read_text())
    values["surgery"]["learner"] = "mine"
    values["training"]["epochs"] = 1
    values["data"] = {"name": "digits", "max_train": 64}
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "recipe_of_mine.yaml").write_text(yaml.dump({**values, **more}))
    return folder / "recipe_of_mine.yaml"


def popup(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "popup_surgery", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


def test_a_recipes_plugins_are_relative_to_it_and_a_file_names_none(tmp_path: Path) -> None:
    recipe = written(tmp_path, plugins=["mine.py"])
    result = popup_surgery.train(recipe, output=tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["plugins"] == [str(tmp_path / "mine.py")]
    provenance = popup_surgery.inspect(result.file).provenance
    assert "plugins" not in provenance["recipe"]
    assert "mine.py" not in json.dumps(provenance)
    del LEARNERS["mine"]
    load(result.file)
    assert evaluate(result.file).accuracy == result.accuracy


@pytest.mark.parametrize("how", slow_except(["option", "module", "recipe"], []))
def test_train_in_a_process_of_its_own(how: str, tmp_path: Path) -> None:
    recipe = written(tmp_path, **({"plugins": ["mine.py"]} if how == "recipe" else {}))
    words = {"option": ["--import", "mine.py"], "module": ["--import", "mine"], "recipe": []}[how]
    done = popup("train", recipe.name, "-o", "run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if how == "option":
        refused = popup("train", recipe.name, "-o", "other", cwd=tmp_path)
        assert refused.returncode == 2
        assert "unknown learner 'mine'" in refused.stderr
        assert "name its file under plugins in the recipe, or by --import" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "recipe", "sweep"])
def test_a_sweeps_workers_have_them(how: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path, **({"plugins": ["mine.py"]} if how == "recipe" else {}))
    named = {"plugins": ["mine.py"]} if how == "sweep" else {}
    Path("sweep.yaml").write_text(yaml.dump({"recipe": recipe.name, "grid": {"surgery.k": [0.3]}, **named}))
    words = ["--import", "mine.py"] if how == "option" else []
    done = cli("sweep", "sweep.yaml", "-o", "out", "--jobs", "1", *words)
    assert done.status == 0, done.err
    assert len(list(Path("out").glob("*/*.popup.safetensors"))) == 1


@pytest.mark.slow
def test_several_processes_have_them(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    done = popup("train", recipe.name, "-o", "run", "--import", "mine.py", "--num-processes", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ray_has_them(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    recipe = written(tmp_path)
    done = popup("sweep", recipe.name, "-o", "out", "--import", "mine.py", "--on", "ray", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_script_itself_may_be_the_plugin(tmp_path: Path) -> None:
    written(tmp_path)
    script = PLUGIN + (
        "if __name__ == '__main__':\n"
        "    from popup_surgery.plugins import load_plugins\n"
        "    from popup_surgery.sweep import Local, Sweep, execute\n"
        "    load_plugins([__file__])\n"
        "    print(*(o.state for o in execute(Sweep.load('recipe_of_mine.yaml'), 'out', Local(1))))\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "finished\n", done.stderr


def test_a_node_without_the_file_gets_its_content(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    (path,) = load_plugins(["mine.py"], tmp_path)
    carried = loaded_plugins()
    assert carried[path] == PLUGIN.encode()
    LEARNERS.pop("mine")
    plugins_module._loaded.clear()
    os.unlink(path)
    restore_plugins(carried)
    assert "mine" in LEARNERS
    assert load_plugins([path]) == [path], "a recipe that names it finds it imported"


def test_each_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    for name in ("mine.py", "./mine.py", str(tmp_path / "mine.py")):
        assert load_plugins([name], tmp_path) == [str(tmp_path / "mine.py")]


@pytest.mark.parametrize(
    ("content", "plugin", "says"),
    [
        (None, "none.py", r"the plugin \S+/none\.py does not exist; expected a Python file, or the name of a module"),
        (None, "no_such_module_at_all", "the plugin no_such_module_at_all cannot be imported: ModuleNotFoundError"),
        ("1 / 0\n", "x.py", r"the plugin \S+/x\.py cannot be imported: ZeroDivisionError: division by zero"),
        ("def\n", "x.py", r"the plugin \S+/x\.py cannot be imported: SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported(
    content: str | None, plugin: str, says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.py").write_text(content)
    with pytest.raises(PopupError, match=says):
        load_plugins([plugin])
    told = cli("recipes", "--import", plugin)
    assert (told.status, told.out, told.err.count("\n")) == (2, "", 1)


def test_every_command_has_the_option(cli: Cli) -> None:
    from popup_surgery.commands import app

    for command in app.registered_commands:
        assert "--import FILE_OR_MODULE" in " ".join(cli(str(command.name), "--help").out.split()), command.name


def test_fingerprints_are_as_before() -> None:
    values = Recipe.load("digits").dump()
    assert fingerprint(Recipe.parse({**values, "plugins": ["x.py"]})) == fingerprint(Recipe.parse(values))
    with pytest.raises(RecipeError, match="plugins"):
        Recipe.parse({**values, "plugins": "x.py"})


# nothing but the user's word


def test_nothing_that_a_file_says_is_imported(tmp_path: Path) -> None:
    """Provenance, the recipe beside dense weights, a checkpoint's recipe, plain values, an archive."""
    (tmp_path / "evil.py").write_text(EVIL)
    evil = str(tmp_path / "evil.py")
    values = Recipe.load("digits", ["training.epochs=1", "data.max_train=64"]).dump()
    recipe = Recipe.parse({**values, "plugins": [evil]})
    assert recipe.plugins == [evil]
    result = popup_surgery.train({**values, "plugins": [evil]}, output=tmp_path / "run")
    from popup_surgery import save

    model = popup_surgery.convert(popup_surgery.build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5)
    file = tmp_path / "net.popup.safetensors"
    save(model, file, provenance={"recipe": {**values, "plugins": [evil]}})
    evaluate(file)
    popup_surgery.train({**values, "plugins": [evil]}, output=tmp_path / "run", resume=True)
    dense = popup_surgery.train({**values, "surgery": "none", "plugins": [evil]}, output=tmp_path / "dense")
    assert evil in (tmp_path / "dense" / "recipe.yaml").read_text()
    evaluate(dense.file)
    sweep = Sweep.load("digits", ["training.epochs=1", "data.max_train=64"])
    from popup_surgery.sweep import Outcome as SweepOutcome

    folder = sweep.runs[0].folder(tmp_path).path
    result.output.rename(folder)
    SweepOutcome.read(sweep.runs[0], tmp_path)
    assert evil not in plugins_module._loaded


# packages


class Point:
    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, f"package:{name}", found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_entry_points_of_packages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from popup_surgery import codecs, learners, models, weights
    from popup_surgery.codecs import Codec
    from popup_surgery.learners import EdgePopup
    from popup_surgery.models import layer_types

    class Mine(EdgePopup):
        pass

    bitpack, layer = CODECS["bitpack"], layer_types.LayerType(("my.Layer",), lambda module: {})
    points = {
        "learners": [Point("class", Mine), Point("object", Mine()), Point("broken", ImportError("no such thing"))],
        "codecs": [Point("mine", Codec("mine", bitpack.encode, bitpack.decode, bitpack.bound))],
        "schemes": [Point("mine", weights.Scheme("uniform"))],
        "layer_types": [Point("mine", layer)],
    }
    monkeypatch.setattr(plugins_module, "entry_points", lambda group: points[group.removeprefix("popup_surgery.")])
    for group, room in (("learners", learners), ("codecs", codecs), ("schemes", weights)):
        load_entry_points(group, room._take)
    load_entry_points("layer_types", layer_types._take)
    assert {"class", "object"} <= LEARNERS.keys()
    assert "mine" in CODECS
    assert "mine" in SCHEMES
    assert layer_types.LAYER_TYPES.pop() is layer
    assert "the entry point broken = package:broken cannot be used: no such thing" in caplog.text
    assert models


@pytest.mark.slow
def test_an_installed_package_needs_no_option(tmp_path: Path) -> None:
    """A package as pip leaves it: a module, and metadata with entry points."""
    written(tmp_path)
    (tmp_path / "my_package.py").write_text(
        "from popup_surgery.learners import EdgePopup\nclass Mine(EdgePopup): pass\n"
    )
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[popup_surgery.learners]\nmine = my_package:Mine\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import popup_surgery.learners as learners; print(type(learners.get_learner('mine')).__module__)"
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "my_package\n", done.stderr
    assert importlib.metadata.version("popup-surgery")
    with pytest.raises(UnknownName, match="unknown learner 'mine'"):
        popup_surgery.convert("conv2", 0.5, learner="mine")
