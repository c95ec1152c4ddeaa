"""The arguments of `convert`: their defaults, and the checks of given values.

Importing this module imports neither torch nor NumPy, so that `popup-surgery convert --help` can show the defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, get_args

from ..errors import ConversionError, PopupError, nearest

if TYPE_CHECKING:
    from ..learners import Learner

Patterns = str | Sequence[str] | None
Shares = float | Mapping[str, float | str]
Schemes = str | Mapping[str, str]
Scope = Literal["layer", "global"]
Choice = Literal["frozen", "train"]
Checked = TypeVar("Checked")  # a dataclass that checks its fields

OF_PRETRAINED = "piggyback"  # the learner of the scheme `pretrained` if neither a learner nor k is given
RULES = ("balanced", "erk", "fan", "uniform")  # how k is spread over the layers: `masking.shares`
# the only values for learners without k
WITHOUT_K: dict[str, Any] = {
    "k": None, "pattern": None, "scaled": False, "scope": "layer", "floor": None, "fixed": None,
}  # fmt: skip
_WORDS = {"scope": get_args(Scope), "others": get_args(Choice), "norm": get_args(Choice)}


@dataclass(frozen=True)
class MaskingSettings:
    """Every argument of `convert`, with its default. The docstring of `convert` explains them.

    The signatures of `convert` and `plan`, the recipe's `surgery` section and the command's options take their defaults
    from here. A converted network stores the settings that it was converted with. `of` checks the values that a caller
    gave and makes settings of them; the constructor checks nothing.
    """

    k: Shares | None = 0.3
    pattern: str | None = None
    scheme: Schemes = "signed_kaiming_constant"
    scaled: bool = True
    seed: int = 0
    learner: str = "edge_popup"
    learner_options: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = "layer"
    floor: float | None = None
    fixed: Mapping[str, float] | None = None
    include: Patterns = None
    exclude: Patterns = None
    others: Choice = "frozen"
    norm: Choice = "frozen"
    train: Patterns = None

    @property
    def called(self) -> str:
        """The learner and its options' names, for a message."""
        return called(self.learner, self.learner_options)

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

        asked = cls(**with_share(with_learner(given)))
        learner = get_learner(asked.learner, asked.learner_options)
        if not learner.takes_k:
            for name, expected in WITHOUT_K.items():
                if given.get(name, expected) != expected:
                    raise ConversionError(
                        f"{name} is {given[name]!r}; expected {expected!r}; {without_k(asked.learner)}"
                    )
            asked = replace(asked, **WITHOUT_K)
        if asked.pattern is not None:
            _check_pattern(asked, learner)
        for name, words in _WORDS.items():
            if (word := getattr(asked, name)) not in words:
                raise ConversionError(f"{name} is {word!r}; expected {' or '.join(map(repr, words))}")
        if asked.scope == "global" and not learner.ranks_globally:
            raise ConversionError(f"scope is 'global'; expected 'layer'; {in_layers(asked.called)}")
        k = None if asked.k is None else _checked_shares(asked)
        if wrong := learner.k_error(k):
            raise ConversionError(f"k is {k!r}; {wrong}")
        if asked.floor is not None:
            _check_floor(asked, k, learner)
        if asked.fixed is not None:
            _check_fixed(asked, k, learner)
        for scheme in asked.by_pattern("scheme").values():
            if scheme != PRETRAINED:
                get_scheme(scheme)
        copies = {name: own_copy(value) for name, value in vars(asked).items()}
        return cls(**copies | {"k": k, "seed": check_seed(asked.seed), "floor": as_floor(asked.floor)})

    @property
    def ranked(self) -> str:
        """How scores are ranked, in words."""
        if self.pattern is not None:
            return f"ranked among neighbours, {self.pattern}"
        return "ranked over all layers" if self.scope == "global" else "ranked layer by layer"

    def by_pattern(self, name: Literal["k", "scheme"]) -> dict[str, Any]:
        """Return k or the scheme by glob pattern. `*` comes first, unless the caller gave it in another place.

        With a rule, `*` gets the share of the whole network.
        """
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return {"*": value}
        if name == "k" and is_rule(value):
            value = {"*": value.get("k"), **own_shares(value)}
        for pattern in value:
            if not isinstance(pattern, str):
                raise ConversionError(f"{name} has the key {pattern!r}; expected a glob pattern on layer names")
        return dict(value) if "*" in value else {"*": getattr(DEFAULT, name).value, **value}


def share_of(pattern: str) -> float:
    """Return N/M of a pattern; `ValueError` says what was expected."""
    from ..selection.pattern import parse_pattern

    keep, of = parse_pattern(pattern)
    return keep / of


def with_share(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings, with the k of their pattern if they have none, and their learner takes one.

    Later checks say what is wrong with a pattern or learner that is none.
    """
    from ..learners import get_learner

    if given.get("pattern") is None or given.get("k") is not None:
        return dict(given)
    try:
        takes_k = get_learner(given.get("learner", MaskingSettings.learner), given.get("learner_options")).takes_k
    except PopupError:
        return dict(given)
    try:
        k = share_of(given["pattern"])
    except (ValueError, PopupError):
        k = 1.0  # any, since it is the pattern that is wrong
    return {**given, "k": k} if takes_k else dict(given)


def _check_pattern(asked: "MaskingSettings", learner: "Learner") -> None:
    """Raise `ConversionError` if the pattern is none, or does not go with the other arguments."""
    try:
        share = share_of(str(asked.pattern))
    except ValueError as error:
        raise ConversionError(f"pattern is {asked.pattern!r}; {error}") from None
    if not learner.takes_pattern:
        raise ConversionError(f"pattern is {asked.pattern!r}; expected None; {without_pattern(asked.called)}")
    if asked.scope != "layer":
        raise ConversionError(f"scope is {asked.scope!r}; expected 'layer'; {ALONE}")
    if asked.k != share:
        raise ConversionError(f"k is {asked.k!r}; expected {share:g}, which the pattern {asked.pattern} sets, or none")


ALONE = "a pattern ranks the neighbours in each layer among themselves"


def called(learner: str, options: Mapping[str, Any] | None) -> str:
    """Return a learner and its options' names, for a message."""
    return f"{learner} with {' and '.join(options)}" if options else learner


def without_pattern(learner: str) -> str:
    """Return why a learner, as `called` says, does not take a pattern, for a message."""
    return f"a pattern keeps the largest scores among neighbours, and {learner} chooses in another way"


def with_learner(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings, with a learner if they have none, and the scheme is `pretrained` and no k given."""
    from ..weights import PRETRAINED

    free = given.get("k") is None and given.get("pattern") is None
    brings = given.get("scheme") == PRETRAINED and "learner" not in given and free
    return {**given, "learner": OF_PRETRAINED} if brings else dict(given)


def in_layers(learner: str) -> str:
    """Return why a learner, as `called` says, does not rank all layers together, for a message."""
    return f"{learner} ranks each layer by itself"


def without_k(learner: str) -> str:
    """Return why `learner` does not take a setting that comes with k, for a message."""
    why = f"{learner} takes no k, because its scores decide how many weights are kept"
    return f"{why}; scheme pretrained brings it unless k or a learner is given" if learner == OF_PRETRAINED else why


def is_rule(k: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether k is a rule for all layers, not a share nor shares by pattern."""
    return isinstance(k, Mapping) and "rule" in k and not isinstance(k["rule"], Real)


def own_shares(k: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shares by pattern that a rule leaves alone."""
    return {pattern: share for pattern, share in k.items() if pattern not in ("rule", "k")}


def rule_mistakes(k: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the rule in k, apart from its shares."""
    found = []
    if k["rule"] not in RULES:
        found.append(f"rule is {k['rule']!r}; expected {', '.join(RULES[:-1])} or {RULES[-1]}")
    if "k" not in k:
        found.append("k is missing beside rule; expected the share that the whole network keeps")
    if "*" in k:
        found.append("'*' is beside rule and would leave it no layer; expected a narrower pattern")
    return found


def from_keys(cls: type[Checked], values: Mapping[str, Any]) -> Checked:
    """Return an instance of a dataclass that checks its own fields.

    Raises:
        ConversionError: a key or a value is bad; the message names all of them.
    """
    names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
    mistakes = [
        f"{key!r} is not one of its keys; nearest: {nearest(str(key), names)}" for key in values if key not in names
    ]
    try:
        found = cls(**{key: value for key, value in values.items() if key in names})
    except ConversionError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ConversionError("; and ".join(mistakes))
    return found


def is_share(share: Any) -> bool:
    """Return whether this is a share of weights that can be kept."""
    return isinstance(share, Real) and not isinstance(share, bool) and 0 < float(share) <= 1


def _checked_shares(asked: MaskingSettings) -> Shares:
    """Return k as a float, or as floats by pattern; `ConversionError` if a share is not in (0, 1] or cannot be used."""
    rule = is_rule(asked.k)
    if is_rule(asked.k) and (mistakes := rule_mistakes(asked.k)):
        raise ConversionError(f"k is {asked.k!r}: {'; and '.join(mistakes)}")
    by_pattern = asked.by_pattern("k")
    for pattern, share in by_pattern.items():
        if not is_share(share):
            where = f" for {pattern!r}" if isinstance(asked.k, Mapping) and not (rule and pattern == "*") else ""
            raise ConversionError(
                f"k{where} is {share!r}; expected a number above 0 and up to 1, the share of weights kept"
            )
    if asked.scope == "global" and rule:
        raise ConversionError(
            f"scope='global' ranks all layers together and spreads k by the scores; expected a number, not {asked.k!r}"
        )
    if asked.scope == "global" and len(set(by_pattern.values())) > 1:
        raise ConversionError("scope='global' ranks all layers together and takes one k, not one for each pattern")
    if asked.scope == "global" or not isinstance(asked.k, Mapping):
        return float(by_pattern["*"])
    return {pattern: share if isinstance(share, str) else float(share) for pattern, share in asked.k.items()}


def floor_mistake(floor: Any, k: Any, scope: str) -> str | None:
    """Return what was expected in place of `floor`; None if it can be used."""
    if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 < float(floor) < 2**63:
        return "expected a share above 0 and below 1, or a number of weights from 1"
    if float(floor) >= 1 and not float(floor).is_integer():
        return "expected a share above 0 and below 1, or a whole number of weights"
    if scope != "global":
        return "expected none unless scope is global; by itself, each layer keeps its own k"
    if isinstance(k, Real) and float(k) < float(floor) < 1:
        return f"expected at most k, {k}"
    return None


def as_floor(floor: float | None) -> float | None:
    """Return a floor as a number of weights, an int, or as a share, a float."""
    return floor if floor is None else int(floor) if floor >= 1 else float(floor)


def _check_floor(asked: MaskingSettings, k: Shares | None, learner: "Learner") -> None:
    """Raise `ConversionError` unless the floor can be used with the other settings."""
    if mistake := floor_mistake(asked.floor, k, asked.scope):
        raise ConversionError(f"floor is {asked.floor!r}; {mistake}")
    if not learner.takes_floor:
        raise ConversionError(f"floor is {asked.floor!r}; expected None: {asked.learner} ranks without a floor")


def fixed_bounds(fixed: Mapping[str, float]) -> tuple[float, float]:
    """Return the smallest and the largest share of a layer that can be kept where the seed fixes these shares."""
    # rounded, as 1 − 0.8 would be less than 0.2
    return float(fixed.get("kept", 0)), round(1 - float(fixed.get("dropped", 0)), 12)


def from_to(least: float, most: float) -> str:
    """Return bounds of a share for a message: 0 is none."""
    return f"from {least:g} to {most:g}" if least else f"above 0 and up to {most:g}"


def fixed_mistakes(fixed: Any, k: Any, pattern: str | None) -> list[str]:
    """Return what is wrong with the shares in `fixed`, also beside a k or a pattern."""
    if not isinstance(fixed, Mapping) or not fixed:
        return ["expected a mapping with dropped, kept, or both, such as {dropped: 0.5, kept: 0.1}"]
    known = ("dropped", "kept")
    found = [
        f"{name!r} is not one of its keys; nearest: {nearest(str(name), known)}" for name in fixed if name not in known
    ]
    for name in known:
        share = fixed.get(name, 0)
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= float(share) < 1:
            found.append(f"{name} is {share!r}; expected a share of each layer's weights, from 0 and below 1")
    if found:
        return found
    least, most = fixed_bounds(fixed)
    if (least, most) == (0, 1):
        found.append("dropped and kept are 0; expected a share above 0, or no such setting")
    elif least >= most:
        found.append("dropped and kept together are 1 or more; expected some weights for the scores to choose from")
    elif isinstance(k, Real) and not least <= float(k) <= most:
        found.append(f"k is {k}; expected a k {from_to(least, most)}, as kept and dropped leave it")
    if pattern is not None:
        found.append(f"it is beside the pattern {pattern}, which ranks all weights among their neighbours")
    return found


def without_fixed(learner: str) -> str:
    """Return why a learner, as `called` says, does not take fixed weights, for a message."""
    return f"the largest scores of the free weights are to be kept, and {learner} chooses in another way"


def _check_fixed(asked: MaskingSettings, k: Shares | None, learner: "Learner") -> None:
    """Raise `ConversionError` unless the fixed shares can be used with the other settings."""
    if mistakes := fixed_mistakes(asked.fixed, k, asked.pattern):
        raise ConversionError(f"fixed is {asked.fixed!r}: {'; and '.join(mistakes)}")
    if not learner.takes_fixed:
        raise ConversionError(f"fixed is {asked.fixed!r}; expected None; {without_fixed(asked.called)}")


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
