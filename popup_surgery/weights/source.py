"""Where a masked weight's values come from: a seed, or pretrained weights. No other room asks which of the two."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArtifactError
from . import BASE, PRETRAINED, get_scheme
from .fill import equals, fill, pieces_of
from .streams import DISTRIBUTIONS, Floats, draw


@dataclass(frozen=True)
class WeightSource(ABC):
    """What a masked weight's distribution stands for; `source_of` finds it by that word.

    Attributes:
        distribution: the word in a file and in a plan.
        drawn: a seed and a stream name give the values. They have a standard deviation, √(1/k) or a learner's scale may
            widen them, and another seed gives others.
        in_base: a file does not give the values. It names the network that has them, with a digest over them.
    """

    distribution: str

    drawn = False
    in_base = False

    @abstractmethod
    def values(self, numel: int, std: float, seed: int, stream: str, held: Tensor | None) -> Iterator[Floats]:
        """The `numel` values in row-major order, in pieces of float32 [at most CHUNK].

        Args:
            std, seed, stream: what they are drawn from, where they are.
            held: a tensor that has them already, where they are not; float, of any shape.
        """

    @abstractmethod
    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        """Give the weight `tensor` its values at conversion."""

    @abstractmethod
    def check(self, name: str, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        """`ArtifactError` where a file could not give back the values that the weight called `name` has now."""

    @abstractmethod
    def record(self, std: float) -> dict[str, float]:
        """What a file's entry says of the values, beside the distribution."""

    @abstractmethod
    def describe(self, std: float) -> str:
        """A word or a number for a plan's column `std`."""


class Drawn(WeightSource):
    """Values of a distribution, from the stream of the weight's name (docs/artifact-format.md, section 1)."""

    drawn = True

    def values(self, numel: int, std: float, seed: int, stream: str, held: Tensor | None) -> Iterator[Floats]:
        return draw(self.distribution, numel, std, seed, "weight", stream)

    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        fill(tensor, self.values(tensor.numel(), std, seed, stream, None))

    def check(self, name: str, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        if not equals(tensor, self.values(tensor.numel(), std, seed, stream, None)):
            raise ArtifactError(
                f"the weights of {name!r} are not those of seed {seed} any more, so that no file could rebuild them; "
                "they were loaded or changed after conversion"
            )

    def record(self, std: float) -> dict[str, float]:
        return {"std": std}

    def describe(self, std: float) -> str:
        return f"{std:.5g}"


class Pretrained(WeightSource):
    """The values that the weight has already, which stay as they are (Piggyback, ECCV 2018); their `std` is 0."""

    in_base = True

    def values(self, numel: int, std: float, seed: int, stream: str, held: Tensor | None) -> Iterator[Floats]:
        assert held is not None
        return (piece.float().numpy() for piece in pieces_of(held))

    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        """They are there."""

    def check(self, name: str, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        if tensor.dtype == torch.float64:
            raise ArtifactError(
                f"{name!r} is a pretrained weight of float64; cast the network to float32 before it is saved"
            )

    def record(self, std: float) -> dict[str, float]:
        return {}

    def describe(self, std: float) -> str:
        return "pretrained"


def source_of(distribution: str) -> WeightSource:
    """What stands behind a masked weight's `distribution`, one of `distributions()`."""
    return Pretrained(BASE) if distribution == BASE else Drawn(distribution)


def distributions() -> list[str]:
    """All words that a masked weight's distribution may be."""
    return [*DISTRIBUTIONS, BASE]


def source_of_scheme(scheme: str, fan_in: float, fan_out: float, k: float, scaled: bool) -> tuple[WeightSource, float]:
    """Where a scheme's weights come from, and their standard deviation; arguments as for `Scheme.std`."""
    if scheme == PRETRAINED:
        return source_of(BASE), 0.0
    found = get_scheme(scheme)
    return source_of(found.distribution), found.std(fan_in, fan_out, k, scaled)
