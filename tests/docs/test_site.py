"""The documentation's site is whole: every public name, recipe key, command and exit code is on one of its pages."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import popup_surgery
from popup_surgery import commands, errors
from popup_surgery.config.schema import Recipe
from support import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _hooks()


def pages(nav: object = CONFIG["nav"]) -> list[str]:
    """The pages of the navigation, as paths within docs/."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]


def whole(page: str) -> str:
    """A page's Markdown, with the text that is generated for it."""
    return hooks.expand((DOCS / page).read_text())


def keys() -> list[str]:
    """Every key of a recipe, as a dump has them: from a recipe that has all sections."""
    hidden = Recipe.load("digits", ["hub=me/digits"]).dump()
    ticket = Recipe.load("digits", ["surgery=none", "lottery_ticket={k: 0.5, rounds: 1}"]).dump()["lottery_ticket"]
    return [f"{name}.{key}" for name, section in (hidden | {"lottery_ticket": ticket}).items() for key in section]


def test_every_page_is_in_the_navigation_once() -> None:
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(pages()) == [page for page in there if not page.startswith("reproduction/")]


@pytest.mark.parametrize("name", popup_surgery.__all__)
def test_every_public_name_has_an_entry(name: str) -> None:
    entry = re.compile(rf"^::: popup_surgery\.{name}$", re.M)
    found = [page for page in pages() if entry.search(whole(page))]
    assert len(found) == 1, f"add a line '::: popup_surgery.{name}' to one page under docs/reference/"


def test_every_entry_is_a_name() -> None:
    for page in pages():
        for path in re.findall(r"^::: (.+)$", whole(page), re.M):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{page} has an entry for {path}"


@pytest.mark.parametrize("key", keys())
def test_every_recipe_key_has_an_entry_with_its_meaning(key: str) -> None:
    text = whole("reference/recipe-keys.md")
    assert text.count(f"`{key}`{{ #{key} }}") == 1
    section, _, name = key.partition(".")
    assert hooks.meanings(section)[name], f"config/schema.py does not say what {key} means"


def test_recipe_keys_show_types_bounds_and_defaults() -> None:
    text = whole("reference/recipe-keys.md")
    assert "`training.lr`{ #training.lr } number > 0; required\n" in text
    assert "`training.momentum`{ #training.momentum } number ≥ 0, < 1; default `0.9`\n" in text
    assert "`surgery.seed`{ #surgery.seed } integer ≥ 0, < 2^64^; default `0`\n" in text
    assert "`data.on_error`{ #data.on_error } `stop` or `skip`; default `stop`\n" in text
    assert "Required, or `none`." in text


@pytest.mark.parametrize("name", [command.name for command in commands.app.registered_commands])
def test_every_command_has_an_entry_with_every_option(name: str) -> None:
    (entry,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", whole("reference/command-line.md"), re.M | re.S)
    for parameter in hooks.commands()[name].params:
        shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
        for option in shown:
            assert re.search(rf"^(.*, )?`\[?{option}\b", entry, re.M), option
    assert f"```console\n$ popup-surgery {name}" in entry


def test_the_exit_codes_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def status(*arguments: str, raises: type[BaseException] | None = None) -> int:
        def app(**_: object) -> None:
            raise raises("") if raises else AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["popup-surgery", *arguments])
            if raises:
                patch.setattr(commands, "app", app)
            return commands.main()

    damaged = tmp_path / "damaged.popup.safetensors"
    damaged.write_bytes(b"no artifact")
    found = [
        status("recipes"), status("verify", str(damaged)), status("recipes", "no such recipe"),
        status(raises=errors.Stopped), status(raises=KeyboardInterrupt),
    ]  # fmt: skip
    assert [str(code) for code in found] == re.findall(r"^\| (\d+) \|", whole("reference/errors.md"), re.M)


def test_links_that_leave_docs_go_to_files_that_are_there() -> None:
    found = [(page, path) for page in pages() for _, path in hooks.outside((DOCS / page).read_text(), page)]
    assert found
    for page, path in found:
        assert (ROOT / path).is_file(), f"{page} links to {path}"


def test_a_link_that_leaves_docs_is_found_from_any_depth() -> None:
    text = "[a](../README.md) [b](../../README.md#tests) [c](../training.md)"
    assert next(hooks.outside(text, "training.md")) == ("../README.md", "README.md")
    assert list(hooks.outside(text, "tutorials/share.md")) == [("../../README.md", "README.md")]


def test_a_bar_in_a_table_has_no_backslash() -> None:
    assert hooks.expand(r"| `a\|1` | b \| c |") == r"| `a|1` | b \| c |"


def test_the_method_on_the_home_page_is_that_of_convert() -> None:
    """The ten lines and a converted layer, with the same weights and scores: the same output and gradients."""
    import torch

    space: dict = {}
    exec(re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)[0], space)
    theirs = space["HiddenLinear"](8, 4)
    ours = popup_surgery.convert(torch.nn.Linear(8, 4, bias=False), k=0.5)
    of_ours = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.weight.copy_(of_ours["weight"])
        of_ours["weight_score"].copy_(theirs.score)
    images = torch.randn(16, 8)
    assert torch.equal(theirs(images), ours(images))
    for layer in (theirs, ours):
        layer(images).square().sum().backward()
    torch.testing.assert_close(theirs.score.grad, of_ours["weight_score"].grad)
