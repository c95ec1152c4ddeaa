"""Where weights come from: a scheme gives the distribution and its width (paper, section 4), a stream the values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import unknown
from ..plugins import load_entry_points
from .streams import DISTRIBUTIONS


@dataclass(frozen=True)
class Scheme:
    """A distribution and its standard deviation √(gain² / fan).

    Args:
        distribution: a key of `streams.DISTRIBUTIONS`.
        xavier: whether the fan is fan_in + fan_out; otherwise it is fan_in (Kaiming).
        gain2: the squared gain: 2.0 for ReLU, or 1.0 for LeCun initialisation, a comparison in the paper (section 4.4).
    """

    distribution: str
    xavier: bool = False
    gain2: float = 2.0

    def std(self, fan_in: float, fan_out: float, k: float, scaled: bool) -> float:
        """Return the standard deviation, in float64.

        `scaled` multiplies it by √(1/k), which keeps the variance of a layer's output.
        """
        std = math.sqrt(self.gain2 / (fan_in + fan_out if self.xavier else fan_in))
        return std * math.sqrt(1.0 / k) if scaled else std


SCHEMES: dict[str, Scheme] = {}
PRETRAINED = "pretrained"  # the scheme that leaves weights unchanged (Piggyback, ECCV 2018) …
BASE = "base"  # … and the word for it in place of a distribution in a file


def is_pretrained(scheme: str | Mapping[str, str]) -> bool:
    """Return whether a scheme, or one of several schemes by pattern, keeps pretrained weights."""
    return PRETRAINED in (scheme.values() if isinstance(scheme, Mapping) else [scheme])


def register_scheme(name: str, scheme: Scheme) -> None:
    """Register `scheme` under `name`.

    Raises:
        ValueError: the name is taken.
        UnknownName: there is no such distribution.
    """
    if name in SCHEMES or name == PRETRAINED:
        raise ValueError(f"the scheme {name!r} is registered already")
    if scheme.distribution not in DISTRIBUTIONS:
        raise unknown("distribution", scheme.distribution, DISTRIBUTIONS)
    SCHEMES[name] = scheme


def get_scheme(name: str) -> Scheme:
    """Return the scheme called `name`; `UnknownName` lists the nearest."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise unknown("scheme", name, [*SCHEMES, PRETRAINED])
    return SCHEMES[name]


register_scheme("signed_kaiming_constant", Scheme("signed_constant"))
register_scheme("unsigned_kaiming_constant", Scheme("unsigned_constant"))
register_scheme("kaiming_normal", Scheme("normal"))
register_scheme("kaiming_uniform", Scheme("uniform"))
register_scheme("lecun_normal", Scheme("normal", gain2=1.0))
register_scheme("lecun_uniform", Scheme("uniform", gain2=1.0))
register_scheme("xavier_normal", Scheme("normal", xavier=True))
register_scheme("xavier_uniform", Scheme("uniform", xavier=True))
register_scheme("signed_xavier_constant", Scheme("signed_constant", xavier=True))


def _take(name: str, found: Any) -> None:
    if isinstance(found, Scheme) and name not in SCHEMES:
        register_scheme(name, found)


load_entry_points("schemes", _take)
