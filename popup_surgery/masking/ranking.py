"""Groups of weights that are ranked together, and when their masks are computed again."""

from collections.abc import Sequence
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import DynamicInt

from ..errors import ConversionError, some
from ..learners import Learner
from ..selection import Selection, kept_count
from ..selection.fixed import FreeWeights
from ..selection.pattern import Pattern, select_pattern, select_pattern_op
from ..selection.shards import Cut, find_cut, is_shard, whole
from ..torch_compat import has_forward_hooks, in_func_transform, is_func_wrapper, remove_forward_hooks, version_of
from .forwards import begin, end

STATE = "_popup_state"  # key of a module's `ModuleState` in its `__dict__`


def score_name(name: str) -> str:
    """Return the name of the score parameter that belongs to the weight `name`."""
    return f"{name}_score"


def origin_name(name: str, what: str) -> str:
    """Return the `state_dict` name of what a `MaskedParam` says of the weights of `name`: one of `state.ORIGINS`."""
    return f"{name}_{what.removesuffix('s')}"


class _Held(NamedTuple):
    """The members of a group in one network, and their scores when they were last checked together.

    Of scores in shards there is a cut in place of the check, since nothing changes them during a forward.
    """

    members: list[tuple[nn.Module, str]]
    scores: list[Tensor]
    cut: Cut | None = None


class RankGroup:
    """The weights that are ranked together: one layer's, or with `scope="global"` all of a network's.

    A layer's mask is that of the scores which it holds itself. So copies that share a group, such as DataParallel's
    replicas and MAML's clones, have masks of their own.

    The mask is cached from one read to the next. Each read checks that it still matches the scores, unless a version
    counter tells that they were written to. That it does not tell proves nothing: a fused optimiser or a write to
    `.data` does not change it.

    Attributes:
        kept: how many weights take part; 0 if the learner takes no k.
        pattern: if there is one, which of the neighbours in the group's one weight take part.
        kept_now: how many take part at this point of the training; None if as many as `kept`.
        floors: how many weights each member keeps at least; None if there is no floor.
        fixed: which weights of the members the seed has fixed; None if it has fixed none.
    """

    kept_now: int | None = None  # on the class, for groups pickled before these attributes existed
    pattern: Pattern | None = None
    floors: tuple[int, ...] | None = None
    fixed: FreeWeights | None = None
    _versions: Sequence[int] = ()  # of the scores when they were ranked last
    _cut: Cut | None = None  # of the last mask, if it was found over shards
    _in_graphs: int | None = None  # `in_force` as compiled graphs take it; None if it has always been `kept`

    def __init__(
        self, learner: Learner, kept: int, pattern: Pattern | None = None, fixed: FreeWeights | None = None
    ) -> None:
        self.learner = learner
        self.kept = kept
        self.pattern = pattern
        self.fixed = fixed
        self.members: list[tuple[nn.Module, str]] = []
        self.streams: list[str] = []
        self._selection: Selection | None = None
        self._held: dict[int, _Held] = {}  # by thread, while it runs a forward of a root

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"_selection": None, "_cut": None, "_held": {}, "_in_graphs": None, "_versions": ()}
        return self.__dict__ | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_held": {}})  # None in earlier versions
        self._update_compiled()

    def add(self, module: nn.Module, name: str, stream: str) -> int:
        """Add the weight `name` of `module` to the group, and return its index."""
        self.members.append((module, name))
        self.streams.append(stream)
        return len(self.members) - 1

    def scores(self) -> list[Tensor]:
        return [score_of(module, name) for module, name in self.members]

    def scores_here(self) -> list[Tensor]:
        """Return the scores of the members in the network that this thread runs."""
        held = self._held.get(get_ident())
        return self.scores() if held is None else [score_of(*one) for one in held.members]

    def at(self, progress: float, kept: int | None = None) -> None:
        """Keep as many weights as the learner says when this share of the training is done, 0 … 1.

        Args:
            kept: the number that k gives at this point; None for the number that it gives in the end.
        """
        before, now = self.in_force, self.learner.kept_at(progress, self.kept if kept is None else kept)
        self.kept_now = None if now == self.kept else min(now, self.numel)
        self._update_compiled()
        if self.in_force != before:
            self._selection = None

    def _update_compiled(self) -> None:
        """Note what compiled graphs are to keep: a number that they take as an input, once it has changed."""
        if self.kept_now is not None or self._in_graphs is not None:
            self._in_graphs = DynamicInt(self.in_force)

    def _kept_in_graph(self) -> int:
        """Return `in_force` for a compiler, which would take a plain number for a constant."""
        return self.in_force if self._in_graphs is None or torch.compiler.is_exporting() else self._in_graphs

    def count(self, share: float | None) -> int:
        """Return how many weights of the group a share keeps; with None, as many as in the end.

        Raises:
            ConversionError: it keeps none, or fewer than the floor, or another number than the pattern, or not the
                weights that are fixed.
        """
        if self.pattern is not None:
            if share not in (None, self.pattern.keep / self.pattern.of):
                raise ConversionError(
                    f"k={share:g} is not that of the pattern {self.pattern}, which keeps as many all the time"
                )
            return self.kept
        kept = self.kept if share is None else kept_count(self.numel, share)
        least, why = max(1, sum(self.floors or ())), ", which the floor keeps" if self.floors else ""
        most = self.numel
        if self.fixed is not None:
            least, most = max(least, self.fixed.kept), most - self.fixed.dropped
            why = f" and at most {most:,}, as fixed allows"
        if not least <= kept <= most:
            raise ConversionError(
                f"k={share:g} keeps {kept:,} of the {self.numel:,} weights of {some(self.streams)}; expected at least "
                f"{least:,}{why}"
            )
        return kept

    @property
    def in_force(self) -> int:
        """How many weights take part now."""
        return self.kept if self.kept_now is None else self.kept_now

    @property
    def numel(self) -> int:
        """The number of weights in the group."""
        return sum(score.numel() for score in self.scores())

    def mask(self, index: int, score: Tensor | None = None) -> Tensor:
        """Return the mask of member `index`: bool, of its weight's shape.

        Args:
            score: the score of the layer that reads, if it may be another than the member, such as a shallow copy.
        """
        compiling = torch.compiler.is_compiling()
        held = None if compiling else self._held.get(get_ident())
        scores, kept = (
            self.scores() if held is None else [score_of(*one) for one in held.members],
            self._kept_in_graph() if compiling else self.in_force,
        )
        more = self._limits
        if score is not None:
            scores[index] = score
        if any(map(is_shard, scores)):
            return self._over_shards(index, scores, None if held is None else held.cut)
        if self.pattern is not None:
            return self._among_neighbours(scores[index], compiling)
        if compiling or in_func_transform() or under_transform(scores):
            return self.learner.select_traced([score.detach() for score in scores], kept, self.streams, **more)[index]
        self._cut = None
        checked = held is not None and list(map(id, held.scores)) == list(map(id, scores))
        selection = self._selection  # which other threads may replace meanwhile
        versions = [-1 if score.is_inference() else version_of(score) for score in scores]
        if selection is None or versions != self._versions or not selection.holds(scores, index if checked else None):
            with torch.inference_mode(False):  # a mask must outlive the mode
                selection = self._selection = self.learner.select(scores, kept, self.streams, **more)
            self._versions = versions
        return selection.masks[index]

    def free_masks(self) -> None:
        """Free the cached masks; the next read ranks again."""
        self._selection = None

    def mask_again(self, index: int, score: Tensor) -> Tensor:
        """Return the mask of member `index` for the score that the last `mask` was of, without an exchange."""
        return self.mask(index, score) if self._cut is None else self._cut.mask(index, score)

    @property
    def _limits(self) -> dict[str, Any]:
        """What beside the scores and their number decides."""
        return {name: getattr(self, name) for name in ("floors", "fixed") if getattr(self, name) is not None}

    def _over_shards(self, index: int, scores: list[Tensor], cut: Cut | None = None) -> Tensor:
        """Return the whole mask of a member where scores are in shards. All processes must call this.

        Args:
            cut: what decides about the masks, if that is known.
        """
        self._cut = cut or self._find_cut(scores)
        if self._cut is not None:
            return self._cut.mask(index, scores[index])
        if self.pattern is not None:
            return self._among_neighbours(whole(scores[index]), False)
        found = self.learner.select([whole(score) for score in scores], self.in_force, self.streams, **self._limits)
        return found.masks[index]

    def _find_cut(self, scores: list[Tensor]) -> Cut | None:
        """Return what decides about the masks of scores in shards; None if more than the largest |score| counts."""
        plain = self.learner.takes_pattern and self.pattern is None and not self._limits
        return find_cut(scores, self.in_force) if plain else None

    def _among_neighbours(self, score: Tensor, compiling: bool) -> Tensor:
        """Return the mask of the group's one score. To find it costs no more than to tell whether it still holds."""
        pattern = cast(Pattern, self.pattern)
        if compiling or in_func_transform() or under_transform([score]):
            return select_pattern_op(score.detach(), [pattern.keep, pattern.of, pattern.channels, pattern.stride])
        with torch.inference_mode(False):
            return select_pattern(score, pattern)

    def importance(self, index: int, score: Tensor) -> Tensor:
        """Return numbers in whose order weights come to take part: float32, of the score's shape.

        Those that never will have −infinity: what the seed has fixed as dropped, and what the learner has frozen.
        """
        found = self.learner.importance(score.detach())
        if self.fixed is None:
            return found
        free = torch.ones_like(self.fixed.scores(index, score), dtype=torch.bool)
        return found.masked_fill(~self.fixed.mask(index, free, score), -torch.inf)

    def score(self, index: int) -> Tensor:
        """Return the score of member `index` that `mask` ranks."""
        held = self._held.get(get_ident())
        return score_of(*(self.members if held is None else held.members)[index])

    def hold(self, root: nn.Module) -> None:
        """Check the scores of all members in `root` together. Until `release`, a read checks only its own layer's."""
        found: dict[int, tuple[nn.Module, str]] = {}
        for module in root.modules():
            state = module.__dict__.get(STATE)
            for name, slot in state.masked.items() if state is not None else ():
                if slot.ranking is self:
                    found.setdefault(slot.index, (module, name))
        members = [found.get(index, member) for index, member in enumerate(self.members)]
        self._held[get_ident()] = _Held(members, [])
        scores = [score_of(*member) for member in members]
        if len(members) > 1 and any(map(is_shard, scores)):
            self._held[get_ident()] = _Held(members, [], self._find_cut(scores))
        elif len(members) > 1 and all(score.device.type == "cpu" for score in scores):  # elsewhere nothing is checked
            self.mask(0)
            self._held[get_ident()] = _Held(members, [score_of(module, name) for module, name in members])

    def holding(self) -> _Held | None:
        """Return what this thread holds, for `release`."""
        return self._held.get(get_ident())

    def release(self, before: _Held | None = None) -> None:
        """End what `hold` began in this thread, and return to what it held before."""
        self._held.pop(get_ident(), None)
        if before is not None:
            self._held[get_ident()] = before


def mark_forwards(root: nn.Module, ranking: RankGroup | None = None) -> None:
    """Let each forward of `root` be known as one, so that `together` makes its masked weights.

    With the `ranking` of all its weights, all scores are checked at the start of the forward. During it, a read checks
    its own score only.
    """
    if ranking is not None:
        drop_hooks(root)
    elif has_forward_hooks(root, _Hold):
        return
    root.register_forward_pre_hook(_Hold(ranking, True))
    root.register_forward_hook(_Hold(ranking, False), always_call=True)


class _Hold:
    """Forward hook that marks the start or the end of a root's forward."""

    def __init__(self, ranking: RankGroup | None, start: bool) -> None:
        self.ranking, self.start = ranking, start

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.ranking is not None:
            self.ranking.release()
            if self.start:
                self.ranking.hold(module)
        (begin if self.start else end)(module)


def drop_hooks(module: nn.Module) -> None:
    """Remove the hooks of a ranking from `module`."""
    remove_forward_hooks(module, _Hold)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter `name` of `module` as it is stored; a masked weight raw."""
    parameter = module._parameters.get(name)
    return module.__dict__[name] if parameter is None else parameter  # an attribute of DataParallel's replicas


def score_of(module: nn.Module, name: str) -> Tensor:
    """Return the score of the masked weight `name` that `module` holds, in whatever form."""
    score = module._parameters.get(score_name(name))
    return getattr(module, score_name(name)) if score is None else score


def under_transform(tensors: list[Tensor]) -> bool:
    """Return whether a tensor is not plain: a torch.func wrapper, a fake or another subclass that NumPy cannot read."""
    return any(type(t) not in (Tensor, nn.Parameter) or is_func_wrapper(t) for t in tensors)
