"""The arguments of `convert`: one source of defaults, and what a converted network makes of them."""

import inspect
import pickle
from collections.abc import Callable
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import pytest
import typer
from torch import nn

from popup_surgery import ConversionError, convert, plan
from popup_surgery.commands.convert import run
from popup_surgery.config.schema import Surgery
from popup_surgery.masking.settings import DEFAULT, Default, MaskingSettings

DEFAULTS = {each.name: each.default if each.default is not MISSING else {} for each in fields(MaskingSettings)}
BY_LEARNER = ("k", "scaled")  # a recipe states them; the command leaves them to the learner


@pytest.mark.parametrize("verb", [convert, plan])
def test_a_signature_shows_every_argument_with_its_default(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    kinds = {name: parameters[name].kind for name in DEFAULTS}
    assert kinds.pop("k") is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
    others = {"model", "unknown"} | ({"architecture"} if verb is convert else set())
    assert parameters.keys() == DEFAULTS.keys() | others
    for name, value in DEFAULTS.items():
        assert parameters[name].default == value
        assert repr(parameters[name].default) == repr(value)
        assert parameters[name].annotation is not inspect.Parameter.empty
    assert "k: float | collections.abc.Mapping[str, float | str] | None = 0.3" in str(inspect.signature(verb))


def test_the_recipe_and_the_command_have_the_same_defaults() -> None:
    others = {"encoding", "k_schedule", "redraw", "recycle"}  # an argument of save, and three of the training loop
    assert Surgery.model_fields.keys() == DEFAULTS.keys() | others
    assert Surgery.model_fields["encoding"].default == inspect.signature(run).parameters["encoding"].default
    options = inspect.signature(run).parameters
    for name, value in DEFAULTS.items():
        if name not in BY_LEARNER:
            assert Surgery.model_fields[name].default == value
    for name in DEFAULTS.keys() - {*BY_LEARNER, "learner", "learner_options"}:
        default = options[name].default
        assert (default.value if isinstance(default, Enum) else default) == DEFAULTS[name]
    assert all(options[name].default is None for name in (*BY_LEARNER, "learner"))
    for name in ("k", "learner"):
        (option,) = (
            each for each in options[name].annotation.__metadata__ if isinstance(each, typer.models.OptionInfo)
        )
        assert str(DEFAULTS[name]) in str(option.help)
    assert Surgery.model_fields["scaled"].is_required()
    assert convert(nn.Linear(8, 4)).extra_repr().endswith("k=0.3")


def test_a_default_is_told_from_the_same_value() -> None:
    assert DEFAULT.k == 0.3 == DEFAULT.k.value
    assert DEFAULT.k == Default(0.3) != Default(0.4)
    net = convert(nn.Linear(8, 4), 0.5, include="*")
    assert convert(net) is net
    with pytest.raises(ConversionError, match=r"converted with k=0\.5, which 0\.3 cannot change"):
        convert(net, k=0.3)
    with pytest.raises(ConversionError, match=r"converted with include='\*', which None cannot change"):
        convert(net, include=None)


def test_settings_are_normalised() -> None:
    patterns, options = ["0", "1"], {"rescale": True}
    found = MaskingSettings.of({"learner": "supermask", "learner_options": options, "exclude": patterns})
    patterns.append("2")
    options.clear()
    assert found == MaskingSettings(
        None, scaled=False, learner="supermask", learner_options={"rescale": True}, exclude=["0", "1"]
    )
    assert MaskingSettings.of({"k": 1}).k == 1.0
    assert isinstance(MaskingSettings.of({"k": {"*": 1}}).k["*"], float)  # type: ignore[index]
    assert MaskingSettings.of({"k": {"*": 0.5}, "scope": "global"}).k == 0.5
    assert MaskingSettings.of({}) == MaskingSettings() == pickle.loads(pickle.dumps(MaskingSettings()))
    for given in ({"learner": "supermask", "k": 0.3}, {"learner": "supermask", "scaled": True}):
        with pytest.raises(ConversionError, match="supermask takes no k"):
            MaskingSettings.of(given)


def test_an_unknown_argument_is_named_with_the_nearest() -> None:
    for verb in (convert, plan):
        with pytest.raises(TypeError, match=r"convert has no argument 'shceme'; the nearest: scheme"):
            verb(nn.Linear(8, 4), shceme="kaiming_normal")  # type: ignore[arg-type]


def test_a_global_ranking_takes_one_share() -> None:
    with pytest.raises(ConversionError, match="takes one k"):
        MaskingSettings.of({"k": {"0": 0.5}, "scope": "global"})
    assert MaskingSettings.of({"k": {}, "scope": "global"}).k == 0.3
