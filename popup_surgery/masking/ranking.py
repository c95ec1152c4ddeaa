"""The weights that are ranked together, and when their mask is made again."""

from typing import Any

import torch
from torch import Tensor, nn

from ..learners import Learner
from ..selection import Selection
from ..torch_compat import is_func_wrapper, remove_forward_hooks


def score_name(name: str) -> str:
    """The name of the score parameter that belongs to the weight `name`."""
    return f"{name}_score"


class RankGroup:
    """The weights that are ranked together: one layer's, or with `scope="global"` all of a network's.

    The mask is kept from one read to the next, and each read makes sure that it still is the scores' own: a tensor's
    version counter would not tell, because a fused optimiser and a write to `.data` leave it alone.

    Attributes:
        kept: how many of them take part, 0 where the learner takes no k.
        kept_now: how many do at this point of a training, None where it is `kept`.
    """

    kept_now: int | None = None  # on the class, for groups that were pickled before there was one

    def __init__(self, learner: Learner, kept: int) -> None:
        self.learner = learner
        self.kept = kept
        self.members: list[tuple[nn.Module, str]] = []
        self.streams: list[str] = []
        self._selection: Selection | None = None
        self._held: list[Tensor] | None = None  # the scores, while a forward of the root runs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_selection": None, "_held": None}

    def add(self, module: nn.Module, name: str, stream: str) -> int:
        """Rank the weight `name` of `module` here too. Returns its place."""
        self.members.append((module, name))
        self.streams.append(stream)
        return len(self.members) - 1

    def scores(self) -> list[Tensor]:
        return [parameter_of(module, score_name(name)) for module, name in self.members]

    def at(self, progress: float) -> None:
        """Keep as many as the learner says where this share of a training is done, 0 … 1."""
        before, now = self._kept(), self.learner.kept_at(progress, self.kept)
        self.kept_now = None if now == self.kept else min(now, sum(score.numel() for score in self.scores()))
        if self._kept() != before:
            self._selection = None

    def _kept(self) -> int:
        return self.kept if self.kept_now is None else self.kept_now

    def mask(self, index: int) -> Tensor:
        """The mask of member `index`: bool, of its weight's shape."""
        scores, kept = self.scores(), self._kept()
        if torch.compiler.is_compiling() or under_transform(scores):
            return self.learner.select_traced([score.detach() for score in scores], kept, self.streams)[index]
        held = self._held is not None and all(a is b for a, b in zip(self._held, scores, strict=True))
        if self._selection is None or not self._selection.holds(scores, index if held else None):
            with torch.inference_mode(False):  # a mask must outlive the mode
                self._selection = self.learner.select(scores, kept, self.streams)
        return self._selection.masks[index]

    def hold_during_forward(self, root: nn.Module) -> None:
        """Check all scores once at the start of each forward of `root`; in it each read checks its own alone."""
        root.register_forward_pre_hook(_Hold(self, True))
        root.register_forward_hook(_Hold(self, False), always_call=True)


class _Hold:
    """Forward hook that starts or ends the holding of a ranking's masks."""

    def __init__(self, ranking: RankGroup, start: bool) -> None:
        self.ranking, self.start = ranking, start

    def __call__(self, module: nn.Module, *_: Any) -> None:
        ranking = self.ranking
        if torch.compiler.is_compiling():
            return
        ranking._held = None
        if self.start:
            ranking.mask(0)
            ranking._held = ranking.scores()


def drop_hooks(module: nn.Module) -> None:
    """Take the hooks of a ranking off `module`."""
    remove_forward_hooks(module, _Hold)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of `module`, as it is stored: a masked weight raw."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def under_transform(tensors: list[Tensor]) -> bool:
    """Whether a tensor is no plain one: a torch.func wrapper, a fake or another subclass that NumPy cannot read."""
    return any(type(t) not in (Tensor, nn.Parameter) or is_func_wrapper(t) for t in tensors)
