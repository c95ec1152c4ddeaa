"""k as a function of the epoch, and how to set it from a training loop of your own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from ..errors import ConversionError
from .patterns import check_patterns, last_match, matches
from .ranking import RankGroup
from .settings import from_keys, is_share
from .state import MaskedParam
from .walk import masked_weights, unwrap

KINDS = ("constant", "linear", "cubic", "steps")


@dataclass(frozen=True)
class KSchedule:
    """k as a function of the epoch: from `start` to the k of the conversion, over `epochs` epochs.

    With a = start, z = k, and t = (epoch − begin) / epochs, from 0 to 1:

    - `constant`: z in every epoch; no other key is given.
    - `linear`: z + (a − z)·(1 − t).
    - `cubic`: z + (a − z)·(1 − t)³. Gradual pruning ("To prune, or not to prune", Zhu and Gupta, 2017, equation 1), and
      biprop's ramp with a global ranking (Diffenderfer and Kailkhura, ICLR 2021).
    - `steps`: a·(z/a)^(i/n) after round i of n = epochs / every. Each round keeps the same share of what the round
      before it kept, as in Gem-Miner (Sreenivasan et al., NeurIPS 2022).

    Attributes:
        kind: one of these.
        start: the share kept at first, in (0, 1]. Each layer goes from it to its own k, which may be larger.
        begin: the epoch, counted from 0, in which the ramp begins; until then k is `start`.
        epochs: the number of epochs that the ramp takes. In epoch begin + epochs, and after it, k is that of the
            conversion.
        every: for `steps`, the number of epochs between rounds.

    Raises:
        ConversionError: a value is bad; the message names all of them.
    """

    kind: str
    start: float = 1.0
    begin: int = 0
    epochs: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if mistakes := self._mistakes():
            raise ConversionError("; and ".join(mistakes))

    @classmethod
    def of(cls, values: "Mapping[str, Any] | KSchedule") -> "KSchedule":
        """Return the schedule that plain values describe, such as `{"kind": "cubic", "epochs": 10}`.

        Raises:
            ConversionError: a key or a value is bad; the message names all of them.
        """
        if isinstance(values, KSchedule):
            return values
        if not isinstance(values, Mapping) or "kind" not in values:
            raise ConversionError(f"expected a mapping with kind ({_or(KINDS)}), start, begin, epochs and every")
        return from_keys(cls, values)

    def _mistakes(self) -> list[str]:
        found = []
        if self.kind not in KINDS:
            return [f"kind is {self.kind!r}; expected {_or(KINDS)}"]
        if not is_share(self.start):
            found.append(f"start is {self.start!r}; expected a share above 0 and up to 1")
        if not _whole(self.begin, 0):
            found.append(f"begin is {self.begin!r}; expected an epoch, an integer from 0")
        if self.kind == "constant":
            given = [name for name, value in asdict(self).items() if name != "kind" and value != _DEFAULTS[name]]
            return [f"{name} is given beside kind constant; remove it, or choose {_or(KINDS[1:])}" for name in given]
        if not _whole(self.epochs, 1):
            has = "missing" if self.epochs is None else repr(self.epochs)
            found.append(f"epochs is {has}; expected the length of the ramp, an integer from 1")
        if self.kind == "steps":
            if not _whole(self.every, 1):
                has = "missing" if self.every is None else repr(self.every)
                found.append(f"every is {has}; expected the epochs between two steps, an integer from 1")
            elif _whole(self.epochs, 1) and self.epochs % self.every:  # type: ignore[operator]
                found.append(f"epochs is {self.epochs}; expected a multiple of every, {self.every}")
        elif self.every is not None:
            found.append(f"every is given beside kind {self.kind}; only steps has it")
        return found

    @property
    def end(self) -> int:
        """The first epoch, counted from 0, in which k is that of the conversion."""
        return self.begin + (self.epochs or 0)

    def at(self, epoch: int, k: float) -> float:
        """Return the share that is kept in an epoch, counted from 0, where `k` is kept in the end.

        Raises:
            ConversionError: the epoch or k has a bad value.
        """
        if not _whole(epoch, 0):
            raise ConversionError(f"epoch is {epoch!r}; expected an integer from 0")
        if not is_share(k):
            raise ConversionError(f"k is {k!r}; expected a number above 0 and up to 1, the share of weights kept")
        if self.epochs is None or epoch >= self.end:
            return k
        if epoch <= self.begin:
            return self.start
        done = epoch - self.begin
        if self.kind == "steps":
            assert self.every is not None
            return self.start * (k / self.start) ** ((done // self.every) / (self.epochs // self.every))
        left = 1 - done / self.epochs
        return k + (self.start - k) * (left if self.kind == "linear" else left**3)


def scheduled(slot: MaskedParam, schedule: KSchedule | None, epoch: int) -> int | None:
    """Return how many weights the group of a masked weight keeps in an epoch; None for as many as in the end.

    Raises:
        ConversionError: it would keep none, or fewer than the floor.
    """
    if schedule is None or slot.k is None or epoch >= schedule.end:
        return None
    return slot.ranking.count(schedule.at(epoch, slot.k))


def check_schedule(core: nn.Module, schedule: KSchedule | None) -> None:
    """Raise `ConversionError` if a layer of a converted network could not keep what a schedule starts with."""
    try:
        for _, _, _, slot in masked_weights(core):
            scheduled(slot, schedule, 0)
    except ConversionError as error:
        high = schedule is not None and slot.k is not None and schedule.start > slot.k
        raise ConversionError(f"k_schedule starts too {'high' if high else 'low'}: {error}") from error


_DEFAULTS = {field.name: field.default for field in fields(KSchedule)}


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def set_k(model: nn.Module, k: float | Mapping[str, float] | None) -> None:
    """Set how many weights the masks of a converted network keep from now on, for a training loop of your own.

    The weights stay as they are: those of `scaled` are multiplied by what the k of the conversion asks for. A file that
    is saved now records the share that is kept now. So set k back before you save the result.

    Args:
        model: a converted network.
        k: the share of each layer's weights, or of all weights if they are ranked together, in (0, 1]; or shares by
            pattern on layer names, where layers that no pattern matches stay as they are; or None for the k of the
            conversion. `KSchedule.at` computes shares by epoch.

    Raises:
        ConversionError: the network has no masks, or its learner takes no k; a share is bad; a layer would keep no
            weights, or the network fewer than its floor.
    """
    core = unwrap(model)
    weights = [(key.rpartition(".")[0], slot) for key, _, _, slot in masked_weights(core)]
    if not weights:
        raise ConversionError(f"{type(core).__name__} has no masks; convert it first")
    together = len({id(slot.ranking) for _, slot in weights}) < len(weights)
    if isinstance(k, Mapping):
        if together:
            raise ConversionError("all layers are ranked together and take one k, not one for each pattern")
        check_patterns(list(k), [name for name, _ in weights], "k")
    for share in k.values() if isinstance(k, Mapping) else [k] * (k is not None):
        if not is_share(share):
            raise ConversionError(f"k is {share!r}; expected a number above 0 and up to 1, the share of weights kept")
    counts: dict[int, tuple[RankGroup, int]] = {}
    for name, slot in weights:
        if slot.k is None:
            raise ConversionError(f"{name or 'the layer'} takes no k: its scores decide how many weights are kept")
        by_pattern = k if isinstance(k, Mapping) else {"*": k}
        if any(matches(name, pattern) for pattern in by_pattern):
            counts[id(slot.ranking)] = slot.ranking, slot.ranking.count(by_pattern[last_match(name, by_pattern)])
    for group, kept in counts.values():
        group.at(1.0, kept)
