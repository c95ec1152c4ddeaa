"""What recipe keys say of themselves, and which of them a fingerprint counts."""

from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from popup_surgery import Recipe
from popup_surgery.config.catalog import find
from popup_surgery.config.keys import FIRST_KEYS, Key, Setting, as_recorded, comparable, fingerprint, select
from popup_surgery.config.schema import Data, LotteryTicket, Model, Surgery, Training
from popup_surgery.config.yaml import read_yaml

SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model,
    "surgery": Surgery,
    "lottery_ticket": LotteryTicket,
    "data": Data,
    "training": Training,
}
KEYS = {
    f"{section}.{name}": Key.of(field) for section, cls in SECTIONS.items() for name, field in cls.model_fields.items()
}


def digits() -> dict[str, Any]:
    return read_yaml(find("digits"))


def changed(recipe: BaseModel, section: str, **values: Any) -> BaseModel:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_the_keys_that_no_result_depends_on() -> None:
    assert {path for path, key in KEYS.items() if not key.affects_result} == {
        "data.root", "data.workers", "data.download", "data.on_error", "training.checkpoint_minutes",
        "training.trackers", "training.keep_scores", "training.log_every", "training.threads", "surgery.encoding",
        "model.init_commit", "training.preset",
    }  # fmt: skip


def test_the_keys_that_no_step_takes_longer_for() -> None:
    words = "epochs lr momentum weight_decay schedule warmup_epochs label_smoothing seed"
    assert {path for path, key in KEYS.items() if not key.affects_speed} == {
        *(f"surgery.{name}" for name in ("k", "k_schedule", "scheme", "scaled", "seed", "encoding")),
        *(f"training.{name}" for name in words.split()),
        "data.permute_seed",
        "training.keep_scores", "training.preset",
    }  # fmt: skip


def test_the_keys_of_the_first_version_are_still_there() -> None:
    assert KEYS.keys() | SECTIONS.keys() >= FIRST_KEYS


def test_select_takes_the_wanted_keys_of_every_section() -> None:
    found: list[Setting] = []
    recipe = Recipe.parse(digits())

    def wanted(setting: Setting) -> bool:
        found.append(setting)
        return True

    assert select(recipe, wanted) == recipe.dump()
    assert {setting.path: setting.value for setting in found}["training.lr"] == recipe.training.lr
    assert select(recipe, lambda setting: setting.path in ("data", "data.workers")) == {"data": {"workers": 2}}


def test_a_key_that_does_not_affect_the_result_is_in_no_fingerprint() -> None:
    recipe = Recipe.parse(digits())
    assert fingerprint(changed(recipe, "data", workers=7, root="x")) == fingerprint(recipe)
    assert fingerprint(changed(recipe, "data", batch_size=7)) != fingerprint(recipe)
    assert fingerprint(changed(recipe, "training", lr=1)) == fingerprint(changed(recipe, "training", lr=1.0))


# keys that come later


class Cache(BaseModel):
    size: int = 1
    folder: Annotated[str, Key(affects_result=False)] = ""


class LaterData(Data):
    more: int = 7
    cache: Cache = Cache()
    store: Cache | None = None


class Later(Recipe):
    data: LaterData = LaterData()
    average: Cache | None = None


@pytest.fixture
def later() -> Later:
    recipe = Later.model_validate(digits())
    assert fingerprint(recipe) == fingerprint(Recipe.parse(digits()))
    return recipe


@pytest.mark.parametrize(
    "values",
    [
        {"more": 8},
        {"cache": Cache(size=2)},
        {"store": Cache()},
        {"store": Cache(size=2)},
    ],
)
def test_a_later_key_counts_where_it_differs(later: Later, values: dict[str, Any]) -> None:
    assert fingerprint(changed(later, "data", **values)) != fingerprint(later)


def test_a_later_section_counts_where_it_is_given(later: Later) -> None:
    given = [later.model_copy(update={"average": value}) for value in (None, Cache(), Cache(size=2))]
    assert len({fingerprint(recipe) for recipe in given}) == 3


def test_a_later_section_without_what_counts_does_not(later: Later) -> None:
    assert fingerprint(changed(later, "data", cache=Cache(folder="x"))) == fingerprint(later)


class ChangedData(Data):
    more: Annotated[int, Key(first_default=7)] = 8


class Changed(Recipe):
    data: ChangedData = ChangedData()


def test_a_default_that_changes_leaves_old_runs_what_they_were() -> None:
    """The new default counts as other than the first; a record without the key is of the time of the first."""
    before, now = Later.model_validate(digits()), Changed.model_validate(digits())
    assert fingerprint(now) == fingerprint(changed(before, "data", more=8)) != fingerprint(before)
    assert fingerprint(changed(now, "data", more=7)) == fingerprint(before)
    record = as_recorded(now)
    assert (record.data.more, record.data.batch_size) == (7, now.data.batch_size)
    assert record.training == now.training
    assert fingerprint(record) == fingerprint(before)


def test_comparable_text() -> None:
    assert comparable({"k": 1.0}) == comparable({"k": 1})
    assert comparable({"a": 1, "b": 2}) != comparable({"b": 2, "a": 1}), "the last pattern of a k counts"
    assert comparable(True) != comparable(1)
