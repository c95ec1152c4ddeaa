"""The arguments of `convert`: their defaults, and the check of what a caller gave."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypedDict

from ..errors import ConversionError
from ..learners import get_learner
from ..weights import PRETRAINED, get_scheme
from ..weights.streams import check_seed

Patterns = str | Sequence[str] | None
Shares = float | Mapping[str, float]
Schemes = str | Mapping[str, str]


class Settings(TypedDict, total=False):
    """The keyword arguments of `convert` and `plan`, which explain them; a converted network keeps its own."""

    scheme: Schemes
    scaled: bool
    seed: int
    learner: str
    learner_options: Mapping[str, Any]
    scope: Literal["layer", "global"]
    include: Patterns
    exclude: Patterns
    others: Literal["frozen", "train"]
    norm: Literal["frozen", "train"]


DEFAULTS: dict[str, Any] = {
    "k": 0.3,
    "scheme": "signed_kaiming_constant",
    "scaled": True,
    "seed": 0,
    "learner": "edge_popup",
    "learner_options": {},
    "scope": "layer",
    "include": None,
    "exclude": None,
    "others": "frozen",
    "norm": "frozen",
}
WITHOUT_K = {"k": None, "scaled": False, "scope": "layer"}  # what learners that take no k allow
_WORDS = {"scope": ("layer", "global"), "others": ("frozen", "train"), "norm": ("frozen", "train")}


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """All settings, each of its type; a k or a scheme without a pattern for the rest has the default there."""
    settings = DEFAULTS | given
    if not get_learner(settings["learner"], settings["learner_options"]).takes_k:
        for name, expected in WITHOUT_K.items():
            if given.get(name, expected) != expected:
                raise ConversionError(
                    f"{name} is {given[name]!r}; expected {expected!r}; {settings['learner']} takes no k, its scores "
                    "decide what is kept"
                )
        settings |= WITHOUT_K
    k = settings["k"]
    for name, words in _WORDS.items():
        if settings[name] not in words:
            raise ConversionError(f"{name} is {settings[name]!r}; expected {' or '.join(map(repr, words))}")
    for pattern, share in by_pattern(settings, "k").items() if k is not None else ():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
            where = f" for {pattern!r}" if isinstance(k, Mapping) else ""
            raise ConversionError(f"k{where} is {share!r}; expected a number above 0 and up to 1, the share kept")
    for name in by_pattern(settings, "scheme").values():
        if name != PRETRAINED:
            get_scheme(name)
    if settings["scope"] == "global" and len(set(by_pattern(settings, "k").values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")
    if settings["scope"] == "global":
        k = next(iter(by_pattern(settings, "k").values()))
    return {name: own_copy(value) for name, value in settings.items()} | {
        "k": own_copy(k),
        "seed": check_seed(settings["seed"]),
    }


def own_copy(value: Any) -> Any:
    """A copy that no caller can change later, equal for equal patterns."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def by_pattern(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The setting `name` by glob pattern, `*` first unless it is given elsewhere."""
    value = settings[name]
    if not isinstance(value, Mapping):
        return {"*": value}
    for pattern in value:
        if not isinstance(pattern, str):
            raise ConversionError(f"{name} has the key {pattern!r}; expected a glob pattern on layer names")
    return dict(value) if "*" in value else {"*": DEFAULTS[name], **value}
