"""Recipes: what is shipped, what is refused, and all of it at once."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popup_surgery import PopupError, Recipe, RecipeError, UnknownName
from popup_surgery.config.catalog import find, shipped
from popup_surgery.config.mistakes import section_of
from popup_surgery.config.yaml import read_yaml, to_yaml
from popup_surgery.learners import LEARNERS
from popup_surgery.masking.settings import WITHOUT_K
from popup_surgery.weights import SCHEMES

PAPER = {"cifar10/conv2", "cifar10/conv4", "cifar10/conv6", "cifar10/conv8"}


def digits() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(find("digits")))


def change(path: str, value: Any) -> dict[str, Any]:
    """The digits recipe's values with one of them changed."""
    values = digits()
    *parents, leaf = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    return values


def lines(values: Any) -> list[str]:
    """The mistakes that parsing `values` reports, one a line, without the heading."""
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    heading, *found = str(caught.value).split("\n")
    return found if found else [heading.removeprefix("recipe: ")]


# shipped ones


def test_the_shipped_recipes_are_those_of_the_issue() -> None:
    wanted = {"digits", "fashion_mnist/conv4", "cifar10/resnet18"} | PAPER
    assert wanted <= set(shipped()), sorted(wanted - set(shipped()))


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_parses_and_states_scaled(name: str) -> None:
    recipe = Recipe.load(name)
    raw = read_yaml(find(name))
    assert isinstance(recipe.surgery, str) or isinstance(raw["surgery"]["scaled"], bool)
    assert recipe.data.root is None
    assert recipe.data.download is False


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_has_a_header_with_its_exact_command(name: str) -> None:
    first, *header = find(name).read_text().splitlines()
    match = re.fullmatch(r"# popup-surgery train (\S+)( --data-dir DIR)?", first)
    assert match, first
    assert match[1] == name
    assert bool(match[2]) == (Recipe.load(name).data.name != "digits")
    assert header[0] == "#"
    assert len(header[1]) > 20
    assert header[1].startswith("# ")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_says_what_accuracy_to_expect(name: str) -> None:
    comments = " ".join(line for line in find(name).read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\d ?%", comments), (
        "style.md: a header with the exact command, expected accuracy, hardware and time"
    )


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_hyperparameters(name: str) -> None:
    recipe = Recipe.load(name)
    training, data = recipe.training, recipe.data
    assert (training.optimizer, training.momentum, training.lr) == ("sgd", 0.9, 0.1)
    assert (training.weight_decay, training.schedule, training.epochs) == (1e-4, "cosine", 100)
    assert (training.warmup_epochs, training.label_smoothing, training.nesterov) == (0, 0.0, False)
    assert (data.batch_size, data.pad, data.hflip) == (128, 4, 0.5)
    assert data.mean == [0.491, 0.482, 0.447]
    assert data.std == [0.247, 0.243, 0.262]
    assert not isinstance(recipe.surgery, str)
    assert recipe.surgery.scaled is False
    assert recipe.surgery.scheme == "signed_kaiming_constant"
    assert recipe.model.name == f"popup_surgery/{name.split('/')[1]}"
    assert recipe.model.kwargs.get("width", 1.0) == 1.0


# what is refused


def test_scaled_must_be_stated() -> None:
    values = digits()
    del values["surgery"]["scaled"]
    assert lines(values) == ["surgery.scaled is missing; expected true or false"]


def test_three_mistakes_make_three_lines_with_the_nearest_names() -> None:
    values = digits()
    values["training"]["wieght_decay"] = values["training"].pop("weight_decay")
    values["surgery"].update(k=1.2, scheme="signed_kaming_constant")
    found = lines(values)
    assert len(found) == 3, found
    by_key = {line.split(" is ")[0]: line for line in found}
    assert "weight_decay" in by_key["training.wieght_decay"]
    assert "1.2" in by_key["surgery.k"]
    assert "signed_kaiming_constant" in by_key["surgery.scheme"]


def test_two_mistakes_of_other_sections_make_two_lines() -> None:
    values = digits()
    values["training"]["optimizer"] = "sdg"
    values["model"]["name"] = "popup_surgery/conv3"
    found = lines(values)
    assert len(found) == 2, found
    assert found[0].startswith("model.name is 'popup_surgery/conv3'")
    assert {"conv2", "conv4", "conv6", "conv8"} & set(re.findall(r"conv\d", found[0].split("nearest")[1]))
    assert found[1].startswith("training.optimizer is 'sdg'")
    assert re.search(r"\bsgd\b", found[1])


@pytest.mark.parametrize("k", [0, 0.0, -0.1, 1.2, math.nan, math.inf, True, "0.5", None, {"features.*": 2.0}])
def test_a_bad_k_is_one_mistake(k: Any) -> None:
    found = lines(change("surgery.k", k))
    assert len(found) == 1, found
    assert found[0].startswith("surgery.k")


@pytest.mark.parametrize(
    ("path", "value", "nearest"),
    [
        ("surgery.learner", "edgepopup", "edge_popup"),
        ("surgery.scheme", "kaiming_norml", "kaiming_normal"),
        ("model.name", "timm/rsenet50", "resnet50"),
        ("model.name", "tim/resnet50", "timm"),
        ("training.optimizer", "admw", "adamw"),
        ("model.kwargs", {"widht": 1.0}, "width"),
        ("surgery.shceme", "x", "scheme"),
        ("trainning", {}, "training"),
    ],
)
def test_an_unknown_name_says_the_nearest(path: str, value: Any, nearest: str) -> None:
    (found,) = lines(change(path, value))
    assert re.search(rf"nearest.*\b{nearest}\b", found), found
    assert re.split(" is |: ", found)[0] in (path, "model")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.epochs", 0),
        ("training.epochs", 2.0),
        ("training.lr", math.nan),
        ("training.lr", "fast"),
        ("training.lr", -0.1),
        ("training.momentum", 1.0),
        ("training.seed", -1),
        ("training.schedule", "linear"),
        ("training.precision", "int8"),
        ("training.weight_decay", math.inf),
        ("surgery.seed", 2**64),
        ("surgery.scaled", "yes"),
        ("surgery.scope", "network"),
        ("surgery", "nothing"),
        ("data.batch_size", 0),
        ("data.hflip", 1.5),
        ("data.mean", [math.nan]),
        ("data.std", [0.0]),
        ("data.input_size", [1, 8]),
        ("data.root", 3),
        ("data", None),
        ("model", "conv2"),
    ],
)
def test_a_bad_value_is_one_mistake_that_names_its_key(path: str, value: Any) -> None:
    found = lines(change(path, value))
    assert len(found) == 1, found
    assert found[0].startswith(path)


WRONG: tuple[Any, ...] = (None, "x", 32, -1, 1.5, math.nan, [], ["a"], [1, 2], {}, {"a": 1}, {1: 2}, True)
OF_THE_VALIDATOR = re.compile(
    r"[Ii]nput should|valid |validation,|dictionary|instance|literal|\bNone\b|\bTrue\b|at least \d+ items?"
)


SECTIONS: dict[str, Any] = {name: section_of(Recipe, name) for name in Recipe.model_fields if name != "plugins"}
EVERY_KEY = [*SECTIONS, *(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields)]


@pytest.mark.parametrize("path", EVERY_KEY)
def test_whatever_is_wrong_with_a_key_is_told_in_our_own_words(path: str) -> None:
    section, _, key = path.partition(".")
    for wrong in WRONG:
        values = digits()
        if section == "lottery_ticket":
            values |= {"surgery": "none", "lottery_ticket": {"k": 0.5, "rounds": 1}}
        values |= {"hub": {"repo": "me/digits"}} if section == "hub" else {}
        if key:
            values[section][key] = wrong
        else:
            values[section] = wrong
        try:
            Recipe.parse(values)
        except RecipeError as error:
            found = [line for line in str(error).removeprefix("recipe: ").split("\n") if not line.endswith("mistakes:")]
            assert len(found) == 1 or isinstance(wrong, dict), found
            for line in found:
                assert section in line, line
                assert not OF_THE_VALIDATOR.search(line), line
                assert re.search("; expected |nearest|; set |timm's|no option", line), line


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("data.input_size", 32, "data.input_size is 32; expected a list of 3 integers from 1 to 8,192 or null; "
         "for example [3, 32, 32]"),
        ("data.input_size", [3, 32], "data.input_size is [3, 32]; expected a list of 3 integers from 1 to 8,192 or "
         "null; for example [3, 32, 32]"),
        ("data.std", [0.1, 0.0], "data.std is [0.1, 0.0]; expected a list of numbers above 0 or null"),
        ("training.epochs", None, "training.epochs has no value; expected an integer from 1"),
        ("training.epochs", "3", "training.epochs is '3'; expected an integer from 1"),
        ("training.seed", -1, "training.seed is -1; expected an integer from 0 to 2**63 - 1"),
        ("training.nesterov", 1, "training.nesterov is 1; expected true or false"),
        ("training.precision", "half", "training.precision is 'half'; expected 'float32', 'tf32', 'bfloat16' or "
         "'float16'"),
        ("training.trackers", "wandb", "training.trackers is 'wandb'; expected a list of any of 'tensorboard', "
         "'wandb', 'mlflow' or 'trackio'"),
        ("model.pretrained", None, "model.pretrained has no value; expected true, false, or a string"),
        ("surgery.include", 3, "surgery.include is 3; expected a string, a list of strings, or null"),
        ("surgery", "nothing", "surgery is 'nothing'; expected a section with keys such as learner, learner_options "
         "and k or 'none'"),
    ],
)  # fmt: skip
def test_the_sentence_of_a_bad_value(path: str, value: Any, sentence: str) -> None:
    assert lines(change(path, value)) == [sentence]


def test_a_bad_surgery_word_is_told_the_right_one() -> None:
    (found,) = lines(change("surgery", "nothing"))
    assert "none" in found


@pytest.mark.parametrize("values", [None, [1], "digits", 3])
def test_values_that_are_no_mapping(values: Any) -> None:
    (found,) = lines(values)
    assert not re.search(r"^ | {2}", found), f"no key before 'is': {found!r}"


# files


@pytest.mark.parametrize(
    "content",
    [
        b"model: [1",
        b"",
        b"- 1\n- 2\n",
        b"\xff\xfe\x00a",
        b"a: \x00\n",
        b"a: !!python/object/apply:os.getcwd []\n",
        b"a: 2024-13-01\n",
        b"{a: b}: 1\n",
        b"[" * 3000,
    ],
    ids=["flow", "empty", "list", "utf-8", "nul", "object", "date", "key", "deep"],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        Recipe.load(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(find("digits").read_text().replace("  batch_size: 32\n", "  batch_size: 32\n  batch_size: 64\n"))
    with pytest.raises(RecipeError, match="batch_size"):
        Recipe.load(path)


def test_find_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(find("digits").read_text())
    assert find(path) == find(str(path)) == path
    assert find("cifar10/conv2").name == "conv2.yaml"
    assert Recipe.load(path) == Recipe.load("digits")


def test_a_name_that_is_not_there_lists_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'digts'.*nearest.*\bdigits\b"):
        find("digts")
    with pytest.raises(UnknownName, match=r"'cifar/conv4'.*nearest.*\bcifar10/conv4\b"):
        Recipe.load("cifar/conv4")


@pytest.mark.parametrize("name", ["nowhere.yaml", "../digits", "digits.yml", "", "/"])
def test_a_path_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PopupError):
        Recipe.load(name)


# overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("training.lr=1e-4", "training.lr", 1e-4),
        ("training.lr=2E+1", "training.lr", 20.0),
        ("training.lr = .5", "training.lr", 0.5),
        ("training.nesterov=true", "training.nesterov", True),
        ("surgery.k=0.25", "surgery.k", 0.25),
        ("surgery.k={'features.*': 0.5}", "surgery.k", {"features.*": 0.5}),
        ("surgery.include=['features.*']", "surgery.include", ["features.*"]),
        ("surgery=none", "surgery", "none"),
        ("model.kwargs.width=0.5", "model.kwargs.width", 0.5),
        ("model.kwargs={width: 2}", "model.kwargs", {"width": 2}),
        ("model.name=timm/resnet18", "model.name", "timm/resnet18"),
        ("data.root=/a=b", "data.root", "/a=b"),
        ("data.root=null", "data.root", None),
        ("data.mean=[1e-1]", "data.mean", [0.1]),
        ("data.auto_augment=rand-m9-mstd0.5", "data.auto_augment", "rand-m9-mstd0.5"),
    ],
)
def test_an_override_of_any_key(override: str, path: str, value: Any) -> None:
    got: Any = Recipe.load("digits", [override]).dump()
    for part in path.split("."):
        got = got[part]
    assert got == value
    assert type(got) is type(value)


def test_the_last_override_of_a_key_counts_and_the_others_stay() -> None:
    recipe = Recipe.load("digits", ["training.epochs=3", "training.epochs=4", "training.seed=9"])
    assert (recipe.training.epochs, recipe.training.seed) == (4, 9)
    assert recipe.model == Recipe.load("digits").model
    assert Recipe.load("digits").training.epochs == 40


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.epochs", "training.epochs"),
        ("training.epoch=3", r"training\.epoch is not a key.*\bepochs\b"),
        ("trainig.epochs=3", r"trainig is not a key.*\btraining\b"),
        ("training.epochs.more=3", r"training\.epochs"),
        ("training.lr=", r"training\.lr"),
        ("training.lr=abc", r"training\.lr is 'abc'"),
        ("data.mean=[1, 2", r"data\.mean"),
        ("=3", "key=value"),
    ],
)
def test_a_bad_override(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.load("digits", [override])
    assert "\n" not in str(caught.value)


# round trips

share = st.floats(0, 1, exclude_min=True)
positive = st.floats(1e-300, 1e300)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
patterns = st.none() | text | st.lists(text, max_size=3)
hidden: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "k": share | st.dictionaries(text, share, max_size=3),
        "scheme": st.sampled_from(sorted(SCHEMES)),
        "scaled": st.booleans(),
        "learner": st.sampled_from(sorted(LEARNERS)),
        "seed": st.integers(0, 2**64 - 1),
        "scope": st.sampled_from(["layer", "global"]),
        "include": patterns,
        "exclude": patterns,
    }
)
surgeries = st.just("none") | hidden.filter(
    lambda values: values["scope"] == "layer" or not isinstance(values["k"], dict)
).map(lambda values: values if LEARNERS[values["learner"]].takes_k else values | WITHOUT_K)
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["popup_surgery/conv2", "conv4", "timm/resnet18"]),
                "kwargs": st.fixed_dictionaries(
                    {}, optional={"width": st.floats(1e-3, 64), "in_chans": st.integers(1, 9)}
                ),
            }
        ),
        "surgery": surgeries,
        "data": st.fixed_dictionaries(
            {},
            optional={
                "name": text,
                "root": st.none() | text,
                "train_split": text,
                "batch_size": st.integers(1, 1 << 20),
                "input_size": st.none() | st.lists(st.integers(1, 999), min_size=3, max_size=3),
                "std": st.none() | st.lists(positive, max_size=4),
                "in_memory": st.none() | st.booleans(),
                "hflip": st.floats(0, 1),
                "auto_augment": st.none() | text,
            },
        ),
        "training": st.fixed_dictionaries(
            {"epochs": st.integers(1, 10**6), "lr": positive},
            optional={"weight_decay": st.floats(0, 1e10), "momentum": st.floats(0, 1, exclude_max=True)},
        ),
    }
)


@settings(max_examples=80, deadline=None)
@given(recipes)
def test_what_is_dumped_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    recipe = Recipe.parse(values)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_bytes(to_yaml(recipe.dump()).encode())
    assert read_yaml(path) == recipe.dump()
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize(
    "text", ["1e-4", "1e5", "on", "null", "2024-01-01", "0x1f", "1_000", ".5", "", " a ", "a: b", "#", "é\n"]
)
def test_a_string_that_looks_like_something_else_stays_one(tmp_path: Path, text: str) -> None:
    recipe = Recipe.parse(change("data.root", text))
    path = tmp_path / "round.yaml"
    path.write_bytes(to_yaml(recipe.dump()).encode())
    assert Recipe.load(path).data.root == text
