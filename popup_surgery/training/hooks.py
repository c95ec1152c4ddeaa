"""What the loop tells a network's learners: how far the training is, and that a step was made. It rewrites weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..learners.base import Learner, TrainedWeight
from ..masking.k_schedule import KSchedule, scheduled
from ..masking.ranking import parameter_of, score_of
from ..masking.rewrites import Rewrite
from ..masking.state import MaskedParam
from ..masking.walk import masked_weights


class LearnerHooks:
    """The learners of `core`, each with its weights. A plain network has none.

    Args:
        core: the network.
        seed: the run's seed, for `Learner.after_step`.
        schedule: the share of weights that is kept in each epoch; None for that of the conversion.
        rewrites: when weights get other values, in the order in which it is done.
    """

    def __init__(
        self, core: nn.Module, seed: int, schedule: KSchedule | None = None, rewrites: Sequence[Rewrite] = ()
    ) -> None:
        self.core, self.seed, self.schedule, self.rewrites = core, seed, schedule, rewrites
        for rewrite in rewrites:
            rewrite.begin(core)
        self.groups: dict[int, MaskedParam] = {}  # by the group's id, one of its weights
        self.weights: dict[int, tuple[Learner, list[TrainedWeight]]] = {}
        for _, module, name, slot in masked_weights(core):
            group, learner = slot.ranking, slot.ranking.learner
            self.groups[id(group)] = slot
            weight, score = parameter_of(module, name), score_of(module, name)
            mask: Callable[[], Tensor] = partial(slot.mask, module, name)
            trained = TrainedWeight(
                slot.stream, weight, score, mask, slot.distribution, slot.std, slot.seed,
                list(self.groups).index(id(group)), group.kept, 0 if group.floors is None else group.floors[slot.index],
            )  # fmt: skip
            self.weights.setdefault(id(learner), (learner, []))[1].append(trained)

    def at(self, progress: float, epoch: int) -> None:
        """Set the share of the training that is done, 0 … 1, and the epoch, counted from 0.

        Masks read from now on keep the number of weights scheduled for it.
        """
        for slot in self.groups.values():
            slot.ranking.at(progress, scheduled(slot, self.schedule, epoch))

    @property
    def k(self) -> float | None:
        """The share of all weights that the masks keep now, if it is scheduled."""
        groups = [slot.ranking for slot in self.groups.values()]
        if self.schedule is None:
            return None
        return sum(self.in_force()) / sum(group.numel for group in groups)

    def in_force(self) -> list[int]:
        """Return how many weights each group keeps now."""
        return [slot.ranking.in_force for slot in self.groups.values()]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager around a step of the run."""
        with ExitStack() as stack:
            for learner, weights in self.weights.values():
                stack.enter_context(learner.around_step(weights))
            yield

    @torch.no_grad()
    def step_done(self, progress: float, epoch: int, step: int) -> None:
        """Tell the learners that the optimiser has made the `step`-th step of the run, in an epoch counted from 0."""
        self.at(progress, epoch)
        for learner, weights in self.weights.values():
            learner.after_step(weights, self.seed, step)
        for rewrite in self.rewrites:
            rewrite.after_step(self.core, step)

    @torch.no_grad()
    def epoch_done(self, epoch: int, epochs: int) -> None:
        """Tell the learners that an epoch, counted from 1, has ended. The masks keep what they keep at its end."""
        for learner, weights in self.weights.values():
            learner.after_epoch(weights, epoch, epochs)
        self.at(epoch / epochs, epoch - 1)

    def penalty(self) -> Tensor | None:
        """Return what the learners add to the loss; None if they add nothing."""
        each = [learner.penalty(one.score) for learner, weights in self.weights.values() for one in weights]
        found = [penalty for penalty in each if penalty is not None]
        return torch.stack(found).sum() if found else None

    def rewritten(self) -> set[int]:
        """Return the ids of the weights that change although they get no gradient."""
        return {
            id(one.weight)
            for learner, weights in self.weights.values()
            if learner.redraws or self.rewrites
            for one in weights
        }
