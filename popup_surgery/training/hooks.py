"""What the loop tells a network's learners: how much of the training is done, and that a step was made."""

from collections.abc import Callable
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
            trained = TrainedWeight(slot.stream, weight, score, mask, slot.distribution, slot.std, slot.seed)
            self.weights.setdefault(id(learner), (learner, []))[1].append(trained)

    def at(self, progress: float) -> None:
        """Set the share of the training that is done, 0 … 1.

        Masks read from now on keep the number of weights scheduled for it.
        """
        for group in self.groups.values():
            group.at(progress)

    @torch.no_grad()
    def step_done(self, progress: float, step: int) -> None:
        """Tell the learners that the optimiser has made the `step`-th step of the run."""
        self.at(progress)
        for learner, weights in self.weights.values():
            learner.after_step(weights, self.seed, step)

    def redrawn(self) -> set[int]:
        """Return the ids of the weights that a learner changes although they get no gradient."""
        return {id(one.weight) for learner, weights in self.weights.values() if learner.redraws for one in weights}
