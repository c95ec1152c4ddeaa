"""The arguments of `convert`: their defaults, and the checks of given values.

Importing this module imports neither torch nor NumPy, so that `popup-surgery convert --help` can show the defaults.
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

OF_PRETRAINED = "piggyback"  # the learner of the scheme `pretrained` if neither a learner nor k is given
WITHOUT_K: dict[str, Any] = {"k": None, "scaled": False, "scope": "layer"}  # the only values for learners without k
_WORDS = {"scope": get_args(Scope), "others": get_args(Choice), "norm": get_args(Choice)}


@dataclass(frozen=True)
class MaskingSettings:
    """Every argument of `convert`, with its default. The docstring of `convert` explains them.

    The signatures of `convert` and `plan`, the recipe's `surgery` section and the command's options take their defaults
    from here. A converted network stores the settings that it was converted with. `of` checks the values that a caller
    gave and makes settings of them; the constructor checks nothing.
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
    train: Patterns = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "MaskingSettings":
        """Return the given arguments, checked and converted to their types, with defaults for all others.

        If k or the scheme is given by pattern without `*`, `*` gets the default. With the scheme `pretrained`, the
        learner is `piggyback` if neither a learner nor k is given.

        Raises:
            ConversionError: an argument has a bad value.
            UnknownName: there is no such scheme or learner.
        """
        from ..learners import get_learner
        from ..weights import PRETRAINED, get_scheme
        from ..weights.streams import check_seed

        asked = cls(**with_learner(given))
        learner = get_learner(asked.learner, asked.learner_options)
        if not learner.takes_k:
            for name, expected in WITHOUT_K.items():
                if given.get(name, expected) != expected:
                    raise ConversionError(
                        f"{name} is {given[name]!r}; expected {expected!r}; {without_k(asked.learner)}"
                    )
            asked = replace(asked, **WITHOUT_K)
        for name, words in _WORDS.items():
            if (word := getattr(asked, name)) not in words:
                raise ConversionError(f"{name} is {word!r}; expected {' or '.join(map(repr, words))}")
        if asked.scope == "global" and not learner.ranks_globally:
            raise ConversionError(f"scope is 'global'; expected 'layer'; {IN_LAYERS}")
        k = None if asked.k is None else _checked_shares(asked)
        if wrong := learner.k_error(k):
            raise ConversionError(f"k is {k!r}; {wrong}")
        for scheme in asked.by_pattern("scheme").values():
            if scheme != PRETRAINED:
                get_scheme(scheme)
        copies = {name: own_copy(value) for name, value in vars(asked).items()}
        return cls(**copies | {"k": k, "seed": check_seed(asked.seed)})

    def by_pattern(self, name: Literal["k", "scheme"]) -> dict[str, Any]:
        """Return k or the scheme by glob pattern. `*` comes first, unless the caller gave it in another place."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return {"*": value}
        for pattern in value:
            if not isinstance(pattern, str):
                raise ConversionError(f"{name} has the key {pattern!r}; expected a glob pattern on layer names")
        return dict(value) if "*" in value else {"*": getattr(DEFAULT, name).value, **value}


def with_learner(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings, with a learner if their scheme is `pretrained` and they have neither learner nor k."""
    from ..weights import PRETRAINED

    brings = given.get("scheme") == PRETRAINED and "learner" not in given and given.get("k") is None
    return {**given, "learner": OF_PRETRAINED} if brings else dict(given)


IN_LAYERS = "the learner's options rank each layer by itself"


def without_k(learner: str) -> str:
    """Return why `learner` does not take a setting that comes with k, for a message."""
    why = f"{learner} takes no k, because its scores decide how many weights are kept"
    return f"{why}; scheme pretrained brings it unless k or a learner is given" if learner == OF_PRETRAINED else why


def _checked_shares(asked: MaskingSettings) -> Shares:
    """Return k as a float, or as floats by pattern; `ConversionError` if a share is not in (0, 1] or cannot be used."""
    by_pattern = asked.by_pattern("k")
    for pattern, share in by_pattern.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
            where = f" for {pattern!r}" if isinstance(asked.k, Mapping) else ""
            raise ConversionError(
                f"k{where} is {share!r}; expected a number above 0 and up to 1, the share of weights kept"
            )
    if asked.scope == "global" and len(set(by_pattern.values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")
    if asked.scope == "global" or not isinstance(asked.k, Mapping):
        return float(by_pattern["*"])
    return {pattern: float(share) for pattern, share in asked.k.items()}


def own_copy(value: Any) -> Any:
    """Return a copy that no caller can change later. Equal patterns give equal copies."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


class Default:
    """The default of an argument in a signature: prints and compares like its value, but differs from a given value.

    A converted network that is completed keeps its settings. A value that the caller gives must agree with them, even
    if it is the default; an argument that the caller does not give keeps its setting. So `k=0.3` in a call is not the
    same as no k.
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
    """Return the settings that the caller of `convert` or `plan` gave.

    A k of None counts as not given.

    Args:
        arguments: the function's `locals()`. `unknown` has the arguments that it does not take.

    Raises:
        TypeError: there are unknown arguments.
    """
    names = vars(DEFAULT)
    if arguments["unknown"]:
        from ..models.architecture import KWARGS

        name = min(arguments["unknown"])
        hint = "build takes it" if name in KWARGS else f"the nearest: {nearest(name, names)}"
        raise TypeError(f"convert has no argument {name!r}; {hint}")
    given = {name: arguments[name] for name in names if not isinstance(arguments[name], Default)}
    return {name: value for name, value in given.items() if name != "k" or value is not None}
