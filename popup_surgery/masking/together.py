"""The masked weights of all layers of a network, made together at the first read in a forward of its root.

`selection.segments` has the kernels. A layer reads what was made here if it holds the very score and weight that it was
made of, and these have not changed. Everything else is made by its own layer: outside a forward of the root, of layers
that are not in it, and where `_suits` refuses the learner, the ranking or the tensors.

A masked weight that is read twice in a forward is one tensor, so its gradients are summed before they reach the score,
under autocast in its dtype, as those of a plain weight are.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..learners.base import Unsaved
from ..learners.edge_popup import straight_through
from ..models.structure import PLAIN_TYPE
from ..selection import segments
from ..selection.segments import Member, OnePass
from ..torch_compat import in_func_transform, is_compiled, torch_layer_reads, version_of
from .forwards import current
from .ranking import STATE, RankGroup, score_name, under_transform

# layers that compute in autocast's dtype, and do nothing else with their weight
_CAST = {
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
}  # fmt: skip
_REMEMBERED = 4  # passes of one network: with autocast and without, or with tensors of `functional_call`

Both = tuple[int, int]  # the identities of a weight and of its score


def made_together(slot: Any, weight: Tensor, score: Tensor) -> Tensor | None:
    """Return the masked weight of a layer, with the gradient to its score; None if its layer has to make it.

    Args:
        slot: the `MaskedParam` of the weight.
        weight, score: what the layer holds.
    """
    running = current()
    if running is None or score.device.type not in segments.DEVICES or in_func_transform():
        return None
    if running.made is None:
        running.made = _make(running.root, score.device)
    found = running.made.get((id(weight), id(score)))
    if found is None:
        return None
    bucket, place, group = found
    made: Tensor = bucket.made[place]
    if not bucket.holds(place) or (len(group) > 1 and not _holds(group, slot.ranking)):
        return None
    if made.dtype != weight.dtype and not (_autocast(made.device) == made.dtype and torch_layer_reads()):
        slot.uncast = True  # it may need its own dtype: made in that the next time
        return None
    if not (torch.is_grad_enabled() and score.requires_grad):
        return made.detach()
    bucket.attach()
    return made if made.requires_grad else None


def _holds(group: Sequence[tuple[Tensor, int]], ranking: RankGroup) -> bool:
    """Return whether the scores that were ranked together are still those of the network that runs."""
    here = ranking.scores_here()
    return all(one is other and version_of(one) == seen for one, (other, seen) in zip(here, group, strict=True))


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast; None without it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _Bucket:
    """Masked weights whose gradients are found together.

    Attributes:
        made: the masked weights. They have gradients once a read has asked for one.
    """

    def __init__(self, one_pass: OnePass, index: int, members: Sequence[Member], made: Sequence[Tensor]) -> None:
        self.one_pass, self.index, self.made = one_pass, index, made
        self.weights, self.scores = [m.weight for m in members], [m.score for m in members]
        self._versions = [self._counted(place) for place in range(len(members))]
        self._attached = False

    def _counted(self, place: int) -> tuple[int, ...]:
        return tuple(map(version_of, (self.weights[place], self.scores[place], self.made[place])))

    def holds(self, place: int) -> bool:
        """Return whether nothing was written to a weight, its score or the masked weight."""
        return self._counted(place) == self._versions[place]

    def attach(self) -> None:
        """Let the masked weights have gradients."""
        if not self._attached:
            self._attached = True
            _StraightThrough.apply(self, *self.scores)


class _Made(NamedTuple):
    """Where a masked weight is, and the scores that were ranked together for it, with their versions."""

    bucket: _Bucket
    place: int
    group: list[tuple[Tensor, int]]


class _StraightThrough(torch.autograd.Function):
    """Takes the masked weights of a bucket as its outputs, and gives the scores their gradients."""

    @staticmethod
    def forward(ctx: Any, bucket: _Bucket, *scores: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.one_pass, ctx.index = bucket.one_pass, bucket.index  # not the bucket, which has the outputs
        ctx.inputs = [Unsaved(*both) for both in zip(bucket.weights, scores, strict=True)]
        return tuple(bucket.made)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [grad if needed else None for grad, needed in zip(given, ctx.needs_input_grad[1:], strict=True)]
        inputs = [None if grad is None else of.tensors() for grad, of in zip(wanted, ctx.inputs, strict=True)]
        if torch.is_grad_enabled() or under_transform([grad for grad in wanted if grad is not None]):
            each = zip(wanted, inputs, strict=True)  # the gradients may be derived again
            return None, *(None if grad is None or of is None else straight_through(grad, *of) for grad, of in each)
        return None, *ctx.one_pass.gradients(ctx.index, wanted)


def _make(root: nn.Module, device: torch.device) -> dict[Both, _Made]:
    """Make the masked weights of `root` that are on `device`; none where the pass is of no use."""
    one_pass, members = _pass_of(root, device)
    found: dict[Both, _Made] = {}
    if one_pass is None:
        return found
    made = one_pass.masked_weights()
    groups: list[list[tuple[Tensor, int]]] = [[] for _ in range(members[-1].group + 1)]
    for member in members:
        groups[member.group].append((member.score, version_of(member.score)))
    for index, indices in enumerate(one_pass.buckets):
        part = slice(indices.start, indices.stop)
        bucket = _Bucket(one_pass, index, members[part], made[part])
        for place, m in enumerate(members[part]):
            found[id(m.weight), id(m.score)] = _Made(bucket, place, groups[m.group])
    return found


class _Passes(threading.local):
    """The passes of this thread's networks, by what the kernels' table holds."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, dict[Any, OnePass]] = WeakKeyDictionary()


_passes = _Passes()


def _pass_of(root: nn.Module, device: torch.device) -> tuple[OnePass | None, list[Member]]:
    """Return the pass over the weights of `root`, and these. While a CUDA graph is captured, only one that is known."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _passes.of.setdefault(root, {})
    if not known and (capturing or not segments.works_on(device)):
        return None, []
    members = list(_members(root, device))
    if not members or not segments.takes(members):
        return None, []
    key = device, *((s.data_ptr(), w.data_ptr(), s.shape, s.stride(), w.dtype, *rest) for s, w, *rest in members)
    if key not in known:
        if capturing:
            return None, []
        if len(known) >= _REMEMBERED:
            _passes.of[root] = known = {other: one for other, one in known.items() if one.captured}
        known[key] = OnePass(members)
    known[key].captured |= capturing  # the graph reads the table at each replay
    return known[key], members


def _members(root: nn.Module, device: torch.device) -> Iterator[Member]:
    """Yield the weights of `root` that can be made together, group by group."""
    groups: dict[Any, tuple[int, dict[int, Member | None]]] = {}
    for module in root.modules():
        state = module.__dict__.get(STATE)
        if is_compiled(module) or (state is not None and state.sharded):  # which make their weights otherwise
            return
        for name, slot in () if state is None else state.masked.items():
            weight, score = module._parameters.get(name), module._parameters.get(score_name(name))
            if weight is None or score is None:  # a replica of DataParallel's, or parametrised
                continue
            ranking: RankGroup = slot.ranking
            member = Member(score, weight, 0, ranking.in_force, weight.dtype if slot.uncast else _dtype(module, weight))
            size = len(ranking.members)  # a copy of a layer that is ranked alone is too
            key = (id(weight), id(score)) if size == 1 else id(ranking)
            found = member if _suits(ranking, weight, score, device) else None
            groups.setdefault(key, (size, {}))[1].setdefault(slot.index, found)
    whole = [of for size, of in groups.values() if len(of) == size and None not in of.values()]
    for number, of in enumerate(whole):
        for _, one in sorted(of.items()):
            assert one is not None
            yield Member(one.score, one.weight, number, one.kept, one.dtype)


def _suits(ranking: RankGroup, weight: Tensor, score: Tensor, device: torch.device) -> bool:
    """Return whether the pass makes the same masked weight as the layer itself."""
    plain = ranking.pattern is None and ranking.floors is None and ranking.fixed is None
    return (
        ranking.learner.one_pass
        and plain
        and ranking.in_force > 0
        and not under_transform([weight, score])
        and not (weight.requires_grad or weight.is_inference() or score.is_inference())
        and score.device == device
        and segments.suits(score, weight)
    )


def _dtype(module: nn.Module, weight: Tensor) -> torch.dtype:
    """Return the dtype that a layer computes in."""
    cast = _autocast(weight.device)
    casts = getattr(type(module), PLAIN_TYPE, None) in _CAST and "forward" not in module.__dict__
    return cast if casts and cast in segments.KINDS else weight.dtype
