"""Where a masked weight's values come from: a seed, or pretrained weights. Other folders need not know which."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArtifactError
from . import BASE, PRETRAINED, get_scheme
from .fill import deviation, fill, pieces_of
from .streams import DISTRIBUTIONS, Floats, Origin, draw, draw_again


@dataclass(frozen=True)
class WeightSource(ABC):
    """The source that a masked weight's distribution stands for. `source_of` finds it by that word.

    Attributes:
        distribution: the word in a file and in a plan.
        drawn: whether a seed and a stream name give the values. Such values have a standard deviation, √(1/k) or a
            learner's scale may widen them, and another seed gives other values.
        in_base: whether a file only refers to the values. It names the network that has them, and a digest over them.
    """

    distribution: str

    drawn = False
    in_base = False

    @abstractmethod
    def values(
        self,
        numel: int,
        std: float,
        seed: int,
        stream: str,
        held: Tensor | None,
        origins: Iterable[Origin] | None = None,
    ) -> Iterator[Floats]:
        """Yield the `numel` values in row-major order, in pieces of float32 [at most CHUNK].

        Args:
            std, seed, stream: what the values are drawn from, if they are drawn.
            held: otherwise, a float tensor of any shape that has the values already.
            origins: where each is from, as `streams.origins` yields it; None if all are the first of their places.
        """

    @abstractmethod
    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        """Write the values into the weight `tensor`, in place, at conversion."""

    @abstractmethod
    def check(self, name: str, tensor: Tensor, values: Iterable[Floats], seed: int) -> float:
        """Return the largest difference between the weight called `name` and what a file restores, within rounding.

        Args:
            values: what the file restores, as `values` yields it.
            seed: the seed of the conversion, for the message.

        Raises:
            ArtifactError: a file could not restore the weight's present values, not even within rounding.
        """

    @abstractmethod
    def record(self, std: float) -> dict[str, float]:
        """Return what a file's entry records about the values, besides the distribution."""

    @abstractmethod
    def describe(self, std: float) -> str:
        """Return a word or a number for a plan's column `std`."""


class Drawn(WeightSource):
    """Values drawn from a distribution, by the stream of the weight's name (docs/artifact-format.md, section 1)."""

    drawn = True

    def values(
        self,
        numel: int,
        std: float,
        seed: int,
        stream: str,
        held: Tensor | None,
        origins: Iterable[Origin] | None = None,
    ) -> Iterator[Floats]:
        first = draw(self.distribution, numel, std, seed, "weight", stream)
        return first if origins is None else draw_again(first, origins, self.distribution, std, seed, stream)

    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        fill(tensor, self.values(tensor.numel(), std, seed, stream, None))

    def check(self, name: str, tensor: Tensor, values: Iterable[Floats], seed: int) -> float:
        largest, rounding = deviation(tensor, values)
        if not rounding:
            raise ArtifactError(
                f"the weights of {name!r} are not those of seed {seed} any more, so no file could rebuild them: they "
                f"differ by up to {largest:.3g}. They were loaded or changed after conversion. To keep the masks, "
                "convert a new network with the same settings, load only the entries that end in _score into it "
                "(load_state_dict with strict=False), and save that. To keep these weights, save "
                "bake(model).state_dict()"
            )
        return largest

    def record(self, std: float) -> dict[str, float]:
        return {"std": std}

    def describe(self, std: float) -> str:
        return f"{std:.5g}"


class Pretrained(WeightSource):
    """The values that the weight has already, unchanged (Piggyback, ECCV 2018). Their `std` is 0."""

    in_base = True

    def values(
        self,
        numel: int,
        std: float,
        seed: int,
        stream: str,
        held: Tensor | None,
        origins: Iterable[Origin] | None = None,
    ) -> Iterator[Floats]:
        assert held is not None, "the values are somewhere"
        assert origins is None, "no stream has others"
        return (piece.float().numpy() for piece in pieces_of(held))

    def fill(self, tensor: Tensor, std: float, seed: int, stream: str) -> None:
        """Do nothing: the weight has its values."""

    def check(self, name: str, tensor: Tensor, values: Iterable[Floats], seed: int) -> float:
        if tensor.dtype == torch.float64:
            raise ArtifactError(
                f"{name!r} is a pretrained weight of float64; cast the network to float32 before it is saved"
            )
        return 0.0

    def record(self, std: float) -> dict[str, float]:
        return {}

    def describe(self, std: float) -> str:
        return "pretrained"


def source_of(distribution: str) -> WeightSource:
    """Return the source for a masked weight's `distribution`, one of `distributions()`."""
    return Pretrained(BASE) if distribution == BASE else Drawn(distribution)


def distributions() -> list[str]:
    """Return every possible `distribution` of a masked weight."""
    return [*DISTRIBUTIONS, BASE]


def source_of_scheme(scheme: str, fan_in: float, fan_out: float, k: float, scaled: bool) -> tuple[WeightSource, float]:
    """Return the source of a scheme's weights and their standard deviation. Arguments are as for `Scheme.std`."""
    if scheme == PRETRAINED:
        return source_of(BASE), 0.0
    found = get_scheme(scheme)
    return source_of(found.distribution), found.std(fan_in, fan_out, k, scaled)
