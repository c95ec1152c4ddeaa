"""Properties of recipe keys, and the fingerprint of a recipe, which depends on them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# The keys of version 0.1.0, which are in every fingerprint. A later key is in it only if it differs from its default.
FIRST_KEYS = frozenset(
    f"{section}.{name}".removeprefix(".")
    for section, names in {
        "": "model surgery lottery_ticket data training",
        "model": "name pretrained init_from kwargs",
        "surgery": "learner learner_options k scheme scaled seed scope include exclude others norm",
        "lottery_ticket": "k rounds rewind_epoch",
        "data": "name root download train_split val_split max_train max_validation batch_size input_size mean std "
        "in_memory pad hflip scale ratio color_jitter auto_augment re_prob crop_pct interpolation workers on_error",
        "training": "epochs optimizer optimizer_kwargs lr momentum nesterov weight_decay schedule schedule_kwargs "
        "schedule_per warmup_epochs label_smoothing mixup cutmix mixup_prob mixup_switch_prob mixup_mode accumulate "
        "clip_norm checkpoint_minutes precision compile channels_last sync_batchnorm deterministic trackers seed",
    }.items()
    for name in names.split()
)

_S = TypeVar("_S", bound=BaseModel)


@dataclass(frozen=True)
class Key:
    """Properties of a recipe key beside its type: `Annotated[int, Key(affects_result=False)]`.

    Attributes:
        affects_result: False if no result depends on the key, except through images that cannot be read. Such a key
            may differ on resume.
        affects_speed: False if a step takes the same time whatever the key's value.
        first_default: the default that the key was introduced with. State it once the default has changed.
    """

    affects_result: bool = True
    affects_speed: bool = True
    first_default: Any = ...

    @classmethod
    def of(cls, field: FieldInfo) -> "Key":
        """Return the properties of a field, including its first default."""
        key = next((each for each in field.metadata if isinstance(each, cls)), cls())
        if key.first_default is not ...:
            return key
        return replace(key, first_default=field.get_default(call_default_factory=True))


@dataclass(frozen=True)
class Setting:
    """A key of a recipe: its path such as `training.lr`, its properties, and its value."""

    path: str
    key: Key
    value: Any


def select(section: BaseModel, wanted: Callable[[Setting], bool]) -> dict[str, Any]:
    """Return plain values of the `wanted` keys of a section, including those of nested sections."""
    return _select(section, section.model_dump(), wanted, "")


def _select(section: BaseModel, plain: dict[str, Any], wanted: Callable[[Setting], bool], at: str) -> dict[str, Any]:
    selected = {}
    for name, field in type(section).model_fields.items():
        inner, value = getattr(section, name), plain[name]
        if isinstance(inner, BaseModel):
            value = _select(inner, value, wanted, f"{at}{name}.")
        if wanted(Setting(at + name, Key.of(field), value)):
            selected[name] = value
    return selected


def as_recorded(section: _S) -> _S:
    """Return a section read from a run's record, where keys introduced after the record get their first default."""
    values = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name) if name in section.model_fields_set else Key.of(field).first_default
        values[name] = as_recorded(value) if isinstance(value, BaseModel) else value
    return section.model_copy(update=values)


def fingerprint(recipe: BaseModel) -> str:
    """Return a hash of all that a run's result depends on. A run may resume with any recipe that has the same hash."""
    values = {}
    for section, inner in select(recipe, _in_fingerprint).items():
        for key, value in inner.items() if inner and isinstance(inner, dict) else [("", inner)]:
            values[f"{section}.{key}"] = value
    return hashlib.sha256(comparable(sorted(values.items())).encode()).hexdigest()


def _in_fingerprint(setting: Setting) -> bool:
    first = setting.key.first_default
    # a section whose keys all have their defaults is empty
    default = {} if isinstance(first, BaseModel) else first
    return setting.key.affects_result and (
        setting.path in FIRST_KEYS or comparable(setting.value) != comparable(default)
    )


def comparable(values: Any) -> str:
    """Return text that is equal for equal values: 1.0 is 1. Order counts, as the last match of a k's patterns does."""
    text = json.dumps(values, default=str)
    return json.dumps(json.loads(text, parse_float=lambda digits: int(x) if (x := float(digits)).is_integer() else x))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to keys such as `training.lr`."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: value for name, inner in values.items() for key, value in flat(inner, f"{prefix}{name}.").items()}
