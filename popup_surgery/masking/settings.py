"""The arguments of `convert`: their defaults, and the check of what a caller gave.

To import this module imports neither torch nor NumPy, so that `popup-surgery convert --help` can show the defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import SimpleNamespace
from typing import Any, Literal, get_args

from ..errors import ConversionError, nearest

Patterns = str | Sequence[str] | None
Shares = float | Mapping[str, float]
Schemes = str | Mapping[str, str]
Scope = Literal["layer", "global"]
Choice = Literal["frozen", "train"]

WITHOUT_K: dict[str, Any] = {"k": None, "scaled": False, "scope": "layer"}  # what learners that take no k allow
_WORDS = {"scope": get_args(Scope), "others": get_args(Choice), "norm": get_args(Choice)}


@dataclass(frozen=True)
class MaskingSettings:
    """Every argument of `convert`, which explains them, with its default.

    The signatures of `convert` and `plan`, the recipe's `surgery` section and the command's options take their defaults
    from here. A converted network keeps the settings that it was converted with. `of` makes one from what a caller
    gave, and checks it; the class itself checks nothing.
    """

    k: Shares | None = 0.3
    scheme: Schemes = "signed_kaiming_constant"
    scaled: bool = True
    seed: int = 0
    learner: str = "edge_popup"
    learner_options: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = "layer"
    include: Patterns = None
    exclude: Patterns = None
    others: Choice = "frozen"
    norm: Choice = "frozen"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "MaskingSettings":
        """The given arguments and defaults for all others, checked, each of its type.

        A k or a scheme by pattern without `*` has the default there.
        """
        from ..learners import get_learner
        from ..weights import PRETRAINED, get_scheme
        from ..weights.streams import check_seed

        asked = cls(**given)
        if not get_learner(asked.learner, asked.learner_options).takes_k:
            for name, expected in WITHOUT_K.items():
                if given.get(name, expected) != expected:
                    raise ConversionError(
                        f"{name} is {given[name]!r}; expected {expected!r}; {asked.learner} takes no k, its scores "
                        "decide what is kept"
                    )
            asked = replace(asked, **WITHOUT_K)
        for name, words in _WORDS.items():
            if (word := getattr(asked, name)) not in words:
                raise ConversionError(f"{name} is {word!r}; expected {' or '.join(map(repr, words))}")
        k = None if asked.k is None else _checked_shares(asked)
        for scheme in asked.by_pattern("scheme").values():
            if scheme != PRETRAINED:
                get_scheme(scheme)
        copies = {name: own_copy(value) for name, value in vars(asked).items()}
        return cls(**copies | {"k": k, "seed": check_seed(asked.seed)})

    def by_pattern(self, name: Literal["k", "scheme"]) -> dict[str, Any]:
        """k or the scheme by glob pattern, `*` first unless it is given elsewhere."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return {"*": value}
        for pattern in value:
            if not isinstance(pattern, str):
                raise ConversionError(f"{name} has the key {pattern!r}; expected a glob pattern on layer names")
        return dict(value) if "*" in value else {"*": getattr(DEFAULT, name).value, **value}


def _checked_shares(asked: MaskingSettings) -> Shares:
    by_pattern = asked.by_pattern("k")
    for pattern, share in by_pattern.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
            where = f" for {pattern!r}" if isinstance(asked.k, Mapping) else ""
            raise ConversionError(f"k{where} is {share!r}; expected a number above 0 and up to 1, the share kept")
    if asked.scope == "global" and len(set(by_pattern.values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")
    if asked.scope == "global" or not isinstance(asked.k, Mapping):
        return float(by_pattern["*"])
    return {pattern: float(share) for pattern, share in asked.k.items()}


def own_copy(value: Any) -> Any:
    """A copy that no caller can change later, equal for equal patterns."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


class Default:
    """The default of an argument in a signature: shown as its value and equal to it, and yet told from a given value.

    A converted network that is completed keeps its settings: whatever the caller gives must agree with them, be it the
    default or not, and what the caller does not give is as it was. So `k=0.3` in a call is not the same as no k.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, Default) else other))

    __hash__ = None  # type: ignore[assignment]


DEFAULT: Any = SimpleNamespace(**{name: Default(value) for name, value in vars(MaskingSettings()).items()})


def given_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of `convert` or `plan`, as their `locals()` has them, the settings that the caller gave.

    A k of None is not given. `TypeError` where there are arguments that the two do not take, under the name `unknown`.
    """
    names = vars(DEFAULT)
    if arguments["unknown"]:
        from ..models.architecture import KWARGS

        name = min(arguments["unknown"])
        hint = "build takes it" if name in KWARGS else f"the nearest: {nearest(name, names)}"
        raise TypeError(f"convert has no argument {name!r}; {hint}")
    given = {name: arguments[name] for name in names if not isinstance(arguments[name], Default)}
    return {name: value for name, value in given.items() if name != "k" or value is not None}
