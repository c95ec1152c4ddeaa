"""The base class of learners, and the product of a weight and its mask, which all learners share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..deprecated import link_methods
from ..selection import Selection
from ..torch_compat import in_func_transform, version_of

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TrainedWeight:
    """One masked weight of a network in training, as passed to the hooks of its learner.

    Attributes:
        name: its stream name.
        weight, score: its parameters. The next step reads what is written into them.
        mask: returns the current mask. It ranks the scores again if they have changed.
        distribution, std, seed: what its values were drawn from. The distribution is `base` for pretrained weights.
        group: a number that it shares with the weights it is ranked with.
        kept: how many weights of its group k keeps; 0 if the learner takes no k.
        floor: how many of its own weights are kept at least.
    """

    name: str
    weight: Tensor
    score: Tensor
    mask: Callable[[], Tensor]
    distribution: str
    std: float
    seed: int
    group: int = 0
    kept: int = 0
    floor: int = 0


class Learner(ABC):
    """A way to learn which weights take part. Stateless: one instance serves every layer.

    A learner draws a layer's first scores, turns the scores of a ranking group into masks, and defines how a gradient
    reaches a score. A learner with options is a frozen dataclass, and the options are its fields.

    Attributes:
        takes_k: whether k sets the share of weights that is kept. Otherwise the scores alone decide how many take part.
        schedules_k: whether the learner itself comes to k in the course of a training. A schedule of k is then refused.
        takes_floor: whether `select` and `select_traced` take `floors`, as `selection.select` does. They get it only
            where `convert` was called with a floor.
        trains: whether the scores are trained. Otherwise they keep their first values.
        samples: whether each read of a mask may give a different one. `masks`, `bake` and `save` then use the network
            that `describe_sample` names.
        ranks_weights: whether the scores are weights, which start as the layer's own and are those of the network.
        learns_weights: whether the network computes with other weights than the seed's, such as scores that are
            weights. A file of a seed and a mask cannot store them.
        rescale: whether `effective` multiplies the kept weights by `scale`. A file stores weights drawn that much
            wider.
        binary: whether `effective` gives all kept weights of a layer one magnitude, with their own signs. A file stores
            that number, which `magnitude` returns, and the seed gives the signs alone.
        redraws: whether `after_step` changes the weights. Checkpoints then store the weights too. Needs
            `learns_weights`.
        starts_whole: whether all weights take part at first, so that training begins with the network as it is. Layers
            of a pretrained network that have no pretrained weights, such as a new head, are then trained, not masked.
        takes_pattern: whether the weights with the largest |score| are kept, so that a pattern such as 2:4 can rank
            neighbours in place of a whole layer. A subclass that selects in its own way, or not always as many, does
            not inherit it.
        takes_fixed: whether `select` and `select_traced` take `fixed`, as `selection.select` does: weights that are
            kept or dropped whatever their scores are. They get it only where `convert` was called with `fixed`. It is
            not inherited where `takes_pattern` is not.
        one_pass: whether a GPU may compute all layers in one pass (`selection.segments`): the weights with the largest
            |score| are kept, `effective` is their product with the mask, and ∂L/∂s = ∂L/∂w_eff · w · sign(s). A
            subclass that selects or computes in its own way does not inherit it.
        planes: what else a file stores about the weights that take part, by the names of `artifact.planes.PLANES`:
            `sign` if their signs are learnt too. `plane` returns the bits.
        ranks_globally: whether `scope="global"` suits it, so that `kept` may be of several weights together.
    """

    takes_k: bool = True
    schedules_k: bool = False
    takes_floor: bool = False
    trains: bool = True
    samples: bool = False
    ranks_weights: bool = False
    learns_weights: bool = False
    rescale: bool = False
    binary: bool = False
    redraws: bool = False
    starts_whole: bool = False
    takes_pattern: bool = False
    takes_fixed: bool = False
    one_pass: bool = False
    planes: tuple[str, ...] = ()
    ranks_globally: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        link_methods(cls)
        bases = [base for base in cls.__bases__ if issubclass(base, Learner)]
        for methods, attributes in (
            (("select", "select_traced", "kept_at"), ("takes_pattern", "takes_fixed")),
            (("select", "select_traced", "effective"), ("one_pass",)),
        ):
            if any(getattr(cls, name) is not getattr(base, name) for base in bases for name in methods):
                for name in attributes:
                    setattr(cls, name, vars(cls).get(name, False))

    @abstractmethod
    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the first scores of the weight with the stream name `name`, in row-major order, in pieces of float32.

        Args:
            numel: number of scores.
            fan_in: inputs summed into one output of the layer.
            seed: the conversion's seed.
            name: the weight's stream name.
            weights: the weight's own values, in pieces of the same form, computed lazily. Where many have the same
                magnitude, the seed has broken the ties: see `weights.streams.untied`.
        """

    @abstractmethod
    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        """Return the masks for scores that are ranked together.

        Args:
            scores: float32 tensors of any shape.
            kept: how many weights of the whole group take part; 0 if the learner takes no k.
            names: the stream names of the scores' weights.
        """

    @abstractmethod
    def select_traced(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        """Return the masks of `select`, computed by operators alone, for compilers and tracers."""

    @abstractmethod
    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Return the weight that the network computes with: shape and dtype of `weight`, differentiable in `score`."""

    def k_error(self, k: Any) -> str:
        """Return what k was expected to be, as a clause for a message, if the learner's options allow only another."""
        return ""

    def plane(self, kind: str, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Return the bits of a plane in `planes`: bool, one for each weight that it is about, in row-major order.

        The effective weights that a file gives back with them must be those of `effective`.

        Args:
            kind: the plane. `sign` is about the weights that take part; a bit is True where the effective weight is
                positive. `coat2` is about the same, `coat3` about those in coat 2, and so on; a bit is True where the
                weight is in that coat too.
            weight, score, mask: as for `effective`.
        """
        raise NotImplementedError(f"{type(self).__name__} names the plane {kind!r} and has no method `plane`")

    def seed_from_mask(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the same scores in other places, so that the weights in `masks` rank above all others and are kept.

        Args:
            scores: ranked together, float32 of any shape.
            masks: bool, of the scores' shapes.
        """
        # Example: |s| = 4 1 3 2 and the mask 0 1 0 1. The largest two, 4 and 3, go to the weights in the mask, in the
        # order of those weights' own scores. 2 and 1 go to the others: |s| = 2 3 1 4.
        flat = torch.cat([score.detach().reshape(-1) for score in scores])
        chosen = torch.cat([mask.reshape(-1) for mask in masks])
        size = flat.abs()
        ranked = size.sort(descending=True).values
        kept = int(chosen.sum())
        for part, values in ((chosen, ranked[:kept]), (~chosen, ranked[kept:])):
            places = part.nonzero().view(-1)
            size[places[size[places].argsort(descending=True, stable=True)]] = values
        if 0 < kept < len(ranked):  # of equal scores the lower index would be kept
            size[chosen & (size == ranked[kept])] = torch.nextafter(ranked[kept], ranked.new_tensor(torch.inf))
        moved = size.copysign(flat).split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(moved, scores, strict=True)]

    def kept_at(self, progress: float, kept: int) -> int:
        """Return how many weights of a ranking group take part at this point of the training. The default is `kept`.

        A result larger than the number of weights means all of them.

        Args:
            progress: the share of the training that is done: 0 before the first step. At 1 the result must be `kept`,
                the number that also applies outside training.
            kept: the number that k gives.
        """
        return kept

    def importance(self, score: Tensor) -> Tensor:
        """Return numbers in whose order weights come to take part: |score| unless the learner ranks them otherwise.

        Args:
            score: float32, of any shape. What it has frozen for good gets −infinity.
        """
        return score.abs()

    def scale(self, weight: Tensor, mask: Tensor) -> float:
        """Return the factor of a layer's kept weights in `effective`: 1 unless the learner sets `rescale`.

        Args:
            weight, mask: the layer's raw weight, and its current mask.
        """
        return self.factor(mask)

    def factor(self, mask: Tensor) -> float:
        """Return the `scale` that depends on the mask alone: n / Σm for n weights if the learner rescales, else 1."""
        return mask.numel() / max(int(mask.sum()), 1) if self.rescale else 1.0

    def magnitude(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the magnitude of a layer's kept weights, for a learner that is `binary`: a float32 scalar.

        Args:
            weight, mask: the layer's raw weight, and its current mask.
        """
        raise NotImplementedError(f"{type(self).__name__} is binary and has no method `magnitude`")

    def values(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the weights that `mask` is of: the raw ones, or their signs with the magnitude of `magnitude`."""
        return self.magnitude(weight, mask).to(weight.dtype).copysign(weight) if self.binary else weight

    def after_step(self, weights: Sequence[TrainedWeight], seed: int, step: int) -> None:  # noqa: B027
        """Hook that the training loop calls after each optimiser step, in every process, without gradients.

        Anything drawn here must depend on `seed`, `step` and `weights` alone.

        Args:
            weights: all masked weights of the network that use this learner.
            seed: the run's seed.
            step: how many steps the run has made, including those before a resume.
        """

    @contextmanager
    def around_step(self, weights: Sequence[TrainedWeight]) -> Iterator[None]:
        """Context manager that the training loop enters before each step, the forward pass included, in every process.

        When it exits, the optimiser has changed the scores, and `after_step` has not been called. All that is kept from
        one step to the next must be in the scores, which checkpoints store.

        Args:
            weights: all masked weights of the network that use this learner.
        """
        yield

    def after_epoch(self, weights: Sequence[TrainedWeight], epoch: int, epochs: int) -> None:  # noqa: B027
        """Hook that the training loop calls at the end of each epoch, before validation, in every process.

        It may write into scores. No gradients are recorded.

        Args:
            weights: all masked weights of the network that use this learner.
            epoch: the epoch that has ended, counted from 1.
            epochs: the epochs of the run.
        """

    def penalty(self, score: Tensor) -> Tensor | None:
        """Return what the loss of each batch gains for the scores of one weight, differentiable; None for nothing.

        Args:
            score: float32, of any shape.
        """
        return None

    def kept_weights(self, score: Tensor, mask: Tensor) -> Tensor:
        """Return how many weights take part: a float32 scalar, differentiable in `score` as the mask is in `effective`.

        It is what `training.density_penalty` lowers. By default it is the sum of `effective` for weights that are all
        1, without the learner's factor.

        Args:
            score: float32, of any shape.
            mask: the current mask of these scores.
        """
        ones = torch.ones_like(score)
        return self.effective(ones, score, mask).sum() / self.scale(ones, mask)

    def describe_sample(self) -> str:
        """Return a human-readable name of the network that `masks`, `bake` and `save` use."""
        return "the only network"


link_methods(Learner)


class StraightThrough(torch.autograd.Function):
    """The masked weight. A subclass has `backward`, which says what gradient the score gets."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return masked(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        weight, score, mask = inputs
        # the mask is needed only if the weight is trained too
        ctx.save_for_backward(weight, score, mask if ctx.needs_input_grad[0] else None)


class Unsaved:
    """Inputs of an autograd function that its backward reads, kept beside the tensors that the graph saves.

    `torch.utils.checkpoint` computes a layer again in the backward, and the graph must then save as many tensors as
    before. But a masked weight comes from `masking.together` at first, and from its own layer the second time.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._versions = [version_of(tensor) for tensor in tensors]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the inputs.

        Raises:
            RuntimeError: one of them was written to since.
        """
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if version_of(tensor) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"scores or raw weights of shape {tuple(tensor.shape)} changed between a forward and its backward"
                )
        return self._tensors


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Return `weight` where `mask` is True and +0.0 elsewhere, never −0.0.

    Args:
        weight: any floating dtype, any shape.
        mask: bool, the same shape.
    """
    plain = not (torch.compiler.is_compiling() or in_func_transform())  # torch 2.11 batches no view of another dtype
    if not plain or weight.device.type != "cpu" or weight.element_size() not in _INTEGERS:
        return torch.where(mask, weight, 0.0)
    # torch.where is not vectorised on the CPU. An integer product with 0 or 1 gives the same bits, 8 times as fast.
    # Example: −0.75 is 0xBF400000 in float32. Times 1 it is the same; times 0 it is 0x00000000 = +0.0, where a product
    # of floats would give −0.0. An infinite weight that is dropped becomes +0.0 too, not NaN.
    integer = _INTEGERS[weight.element_size()]
    return mask.view(torch.int8).to(integer).mul_(weight.detach().view(integer)).view(weight.dtype)
