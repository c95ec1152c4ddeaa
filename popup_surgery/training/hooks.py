"""What the loop tells a network's learners: how much of the training is done, and that a step was made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..learners.base import Learner, TrainedWeight
from ..masking.ranking import RankGroup, parameter_of, score_of
from ..masking.walk import masked_weights


class LearnerHooks:
    """The learners of `core`, each with its weights. A plain network has none.

    Args:
        core: the network.
        seed: the run's seed, for `Learner.after_step`.
    """

    def __init__(self, core: nn.Module, seed: int) -> None:
        self.seed = seed
        self.groups: dict[int, RankGroup] = {}
        self.weights: dict[int, tuple[Learner, list[TrainedWeight]]] = {}
        for _, module, name, slot in masked_weights(core):
            group, learner = slot.ranking, slot.ranking.learner
            self.groups[id(group)] = group
            weight, score = parameter_of(module, name), score_of(module, name)
            mask: Callable[[], Tensor] = partial(slot.mask, module, name)
            trained = TrainedWeight(
                slot.stream, weight, score, mask, slot.distribution, slot.std, slot.seed,
                list(self.groups).index(id(group)), group.kept,
            )  # fmt: skip
            self.weights.setdefault(id(learner), (learner, []))[1].append(trained)

    def at(self, progress: float) -> None:
        """Set the share of the training that is done, 0 … 1.

        Masks read from now on keep the number of weights scheduled for it.
        """
        for group in self.groups.values():
            group.at(progress)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager around a step of the run."""
        with ExitStack() as stack:
            for learner, weights in self.weights.values():
                stack.enter_context(learner.around_step(weights))
            yield

    @torch.no_grad()
    def step_done(self, progress: float, step: int) -> None:
        """Tell the learners that the optimiser has made the `step`-th step of the run."""
        self.at(progress)
        for learner, weights in self.weights.values():
            learner.after_step(weights, self.seed, step)

    @torch.no_grad()
    def epoch_done(self, epoch: int, epochs: int) -> None:
        """Tell the learners that an epoch, counted from 1, has ended, and let them keep what they keep after it."""
        for learner, weights in self.weights.values():
            learner.after_epoch(weights, epoch, epochs)
        self.at(epoch / epochs)

    def penalty(self) -> Tensor | None:
        """Return what the learners add to the loss; None if they add nothing."""
        each = [learner.penalty(one.score) for learner, weights in self.weights.values() for one in weights]
        found = [penalty for penalty in each if penalty is not None]
        return torch.stack(found).sum() if found else None

    def redrawn(self) -> set[int]:
        """Return the ids of the weights that a learner changes although they get no gradient."""
        return {id(one.weight) for learner, weights in self.weights.values() if learner.redraws for one in weights}
