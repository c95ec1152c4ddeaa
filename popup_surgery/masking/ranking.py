"""Groups of weights that are ranked together, and when their masks are computed again."""

from typing import Any

import torch
from torch import Tensor, nn

from ..learners import Learner
from ..selection import Selection
from ..torch_compat import is_func_wrapper, remove_forward_hooks


def score_name(name: str) -> str:
    """Return the name of the score parameter that belongs to the weight `name`."""
    return f"{name}_score"


class RankGroup:
    """The weights that are ranked together: one layer's, or with `scope="global"` all of a network's.

    The mask is cached from one read to the next. Each read checks that it still matches the scores. A tensor's version
    counter would not tell, because a fused optimiser or a write to `.data` does not change it.

    Attributes:
        kept: how many weights take part; 0 if the learner takes no k.
        kept_now: how many take part at this point of the training; None if as many as `kept`.
    """

    kept_now: int | None = None  # on the class, for groups pickled before this attribute existed

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
        """Add the weight `name` of `module` to the group, and return its index."""
        self.members.append((module, name))
        self.streams.append(stream)
        return len(self.members) - 1

    def scores(self) -> list[Tensor]:
        return [parameter_of(module, score_name(name)) for module, name in self.members]

    def at(self, progress: float) -> None:
        """Keep as many weights as the learner says when this share of the training is done, 0 … 1."""
        before, now = self._kept(), self.learner.kept_at(progress, self.kept)
        self.kept_now = None if now == self.kept else min(now, sum(score.numel() for score in self.scores()))
        if self._kept() != before:
            self._selection = None

    def _kept(self) -> int:
        return self.kept if self.kept_now is None else self.kept_now

    def mask(self, index: int) -> Tensor:
        """Return the mask of member `index`: bool, of its weight's shape."""
        scores, kept = self.scores(), self._kept()
        if torch.compiler.is_compiling() or under_transform(scores):
            return self.learner.select_traced([score.detach() for score in scores], kept, self.streams)[index]
        held = self._held is not None and all(a is b for a, b in zip(self._held, scores, strict=True))
        if self._selection is None or not self._selection.holds(scores, index if held else None):
            with torch.inference_mode(False):  # a mask must outlive the mode
                self._selection = self.learner.select(scores, kept, self.streams)
        return self._selection.masks[index]

    def hold_during_forward(self, root: nn.Module) -> None:
        """Check all scores once at the start of each forward of `root`. During it, a read checks its own score only."""
        root.register_forward_pre_hook(_Hold(self, True))
        root.register_forward_hook(_Hold(self, False), always_call=True)


class _Hold:
    """Forward hook that marks the start or the end of a root's forward for a ranking group."""

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
    """Remove the hooks of a ranking from `module`."""
    remove_forward_hooks(module, _Hold)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter `name` of `module` as it is stored; a masked weight raw."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def under_transform(tensors: list[Tensor]) -> bool:
    """Return whether a tensor is not plain: a torch.func wrapper, a fake or another subclass that NumPy cannot read."""
    return any(type(t) not in (Tensor, nn.Parameter) or is_func_wrapper(t) for t in tensors)
