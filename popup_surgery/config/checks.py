"""Checks of single recipe keys. Each returns the value, or raises a ValueError that says what was expected."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import AfterValidator, ValidationInfo

from ..errors import ConversionError, PopupError, unknown
from ..learners import Learner, get_learner
from ..masking.k_schedule import KSchedule
from ..masking.rewrites import Rewrite, learner_mistake, scheme_mistake
from ..masking.settings import (
    as_floor,
    called,
    fixed_bounds,
    fixed_mistakes,
    floor_mistake,
    from_to,
    in_layers,
    is_rule,
    is_share,
    own_shares,
    rule_mistakes,
    without_fixed,
    without_pattern,
)
from ..models.architecture import check_kwargs
from ..selection.pattern import parse_pattern
from ..weights import PRETRAINED, get_scheme


def known(look_up: Any) -> Any:
    """Return a check of a name by the function that looks it up."""

    def check(name: str) -> str:
        try:
            look_up(name)
        except PopupError as error:
            raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


def schemes(scheme: str | dict[str, str]) -> str | dict[str, str]:
    """Check the names of weight schemes."""
    for name in scheme.values() if isinstance(scheme, dict) else [scheme]:
        if name != PRETRAINED:
            known(get_scheme).func(name)
    return scheme


def recordable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check that an artifact can record a network's arguments."""
    try:
        check_kwargs(kwargs)
    except PopupError as error:
        raise ValueError(str(error)) from None
    return kwargs


def look_up_optimizer(name: str) -> None:
    """Look up one of timm's optimisers."""
    import timm.optim

    known = [str(optimizer) for optimizer in timm.optim.list_optimizers()]
    if name not in known:
        raise unknown("optimizer", name, known)


def options(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Check a learner's options."""
    if "learner" in info.data:
        known(lambda name: get_learner(name, options)).func(info.data["learner"])
    return options


def commit(name: str | None) -> str | None:
    """Check the name of a commit."""
    if name is not None and re.fullmatch("[0-9a-f]{40}", name) is None:
        raise ValueError("expected a commit of 40 digits from 0 to f, or null")
    return name


def neighbours(text: object) -> object:
    """Check a pattern of neighbours such as `2:4`."""
    if text is not None:
        parse_pattern(text)
    return text


SHARES = (
    "a number above 0 and up to 1, or a mapping from patterns on layer names to such numbers, or a rule such as "
    "{rule: erk, k: 0.1}"
)


def shares(k: Any) -> Any:
    """Check `k`: a share in (0, 1], such shares by pattern, or a rule."""
    if k is None:
        return k
    if is_rule(k):
        mistakes = rule_mistakes(k)
        for name in ("k", *own_shares(k)):
            if name in k and not is_share(k[name]):
                mistakes.append(f"{name} is {k[name]!r}; expected a number above 0 and up to 1")
        if mistakes:
            raise ValueError("; and ".join(mistakes))
        return k
    shares = k.values() if isinstance(k, dict) else [k]
    keys = list(k) if isinstance(k, dict) else []
    if not all(type(share) in (int, float) and 0 < share <= 1 for share in shares) or not all(
        isinstance(key, str) for key in keys
    ):
        raise ValueError(f"expected {SHARES}")
    return k


def floors(value: Any, info: ValidationInfo) -> float | None:
    """Check a floor against k, the scope and the learner."""
    learner, scope = info.data.get("learner"), info.data.get("scope")
    if value is None or learner is None:
        return value
    chosen = get_learner(learner, info.data.get("learner_options"))
    if not chosen.takes_k:  # which `Surgery` says
        return value
    mistake = floor_mistake(value, info.data.get("k"), scope or "global")
    if mistake is None and not chosen.takes_floor:
        mistake = f"expected null; {learner} ranks without a floor"
    if mistake is not None:
        raise ValueError(mistake)
    return as_floor(value)


def fixed_shares(value: Any, info: ValidationInfo) -> dict[str, float] | None:
    """Check the shares that the seed fixes, also against k and the pattern."""
    if value is None:
        return value
    if mistakes := fixed_mistakes(value, info.data.get("k"), info.data.get("pattern")):
        raise ValueError("; ".join(mistakes))
    return dict(value)


def start_beside(fixed: dict[str, float], schedule: dict[str, Any]) -> None:
    """Check that a schedule of k starts with a share that the fixed weights allow."""
    least, most = fixed_bounds(fixed)
    if schedule["kind"] != "constant" and not least <= schedule["start"] <= most:
        raise ValueError(
            f"start is {schedule['start']}; expected a share {from_to(least, most)}, which surgery.fixed allows"
        )


def beside_learner(name: str, value: Any, learner: str, options: Mapping[str, Any], chosen: Learner) -> None:
    """Check `k`, `scope`, `pattern` or `fixed` against a learner with its options."""
    learner = called(learner, options)
    if name == "k" and value is not None and chosen.takes_k and (wrong := chosen.k_error(value)):
        raise ValueError(wrong)
    if name == "scope" and value == "global" and not chosen.ranks_globally:
        raise ValueError(f"expected layer; {in_layers(learner)}")
    if name == "pattern" and value is not None and not chosen.takes_pattern:
        raise ValueError(f"expected null; {without_pattern(learner)}")
    if name == "fixed" and value is not None and not chosen.takes_fixed:
        raise ValueError(f"expected null; {without_fixed(learner)}")


def rewrites(kind: type[Rewrite]) -> Callable[[Any, ValidationInfo], dict[str, Any] | None]:
    """Return a check of when weights get other values, which returns all of its keys."""

    def check(value: Any, info: ValidationInfo) -> dict[str, Any] | None:
        if value is None:
            return None
        wrong, found = [], None
        try:
            found = kind.of(value)
        except ConversionError as error:
            wrong.append(str(error))
        learner, given = info.data.get("learner"), info.data.get("scheme", {})
        if learner is not None and (why := learner_mistake(get_learner(learner, info.data.get("learner_options")))):
            wrong.append(f"expected null; {learner} {why}")
        for name in dict.fromkeys(given.values() if isinstance(given, dict) else [given]):
            if why := scheme_mistake(name):
                wrong.append(f"expected null; the scheme {name} {why}")
        if found is None or wrong:
            raise ValueError("; and ".join(wrong))
        return asdict(found)

    return check


def ramp(value: Any) -> dict[str, Any] | None:
    """Return a schedule of k with all of its keys."""
    if value is None:
        return None
    try:
        return asdict(KSchedule.of(value))
    except ConversionError as error:
        raise ValueError(str(error)) from None


def without_graph(training: Any) -> Iterator[str]:
    """Yield why a CUDA graph cannot be the steps of a run with these settings, whatever its network and device."""
    if training.accumulate > 1:
        yield f"training.accumulate is {training.accumulate}"
    if training.mixup or training.cutmix:
        yield "training.mixup and cutmix draw on the host"
    if training.precision == "float16":
        yield "training.precision is float16, with which the host decides whether a step counts"
    if training.compile in ("reduce-overhead", "max-autotune"):
        yield f"training.compile is {training.compile}, which makes graphs of its own"
    if training.schedule_per == "step":
        yield "training.schedule_per is step, and a graph has one learning rate"
