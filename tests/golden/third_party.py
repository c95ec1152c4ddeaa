"""A script of a third party: a learner, a sampling learner, a scheme and a layer type of its own.

It does what docs/extending.md described in version 0.1.0, by the import paths and method names of that version.

    python third_party.py NEW_FOLDER [FILE]

It writes into NEW_FOLDER, reads FILE, an artifact that it wrote before, and prints one JSON object: digests of what is
exact on every processor, and the names of the methods that the package has called.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from popup_surgery.kinds import KINDS, Fans, Kind
from popup_surgery.streams import DISTRIBUTIONS, draw_scores
from torch import Tensor, nn

from popup_surgery import ConversionError, bake, convert, inspect, load, masks, sampled, save, start_from, train, verify
from popup_surgery.learners import LEARNERS, EdgePopup, Learner, get_learner, register_learner
from popup_surgery.learners.base import masked
from popup_surgery.learners.sampling import noise
from popup_surgery.selection import Selection
from popup_surgery.weights import SCHEMES, Scheme, register_scheme

CALLED: set[str] = set()


def largest(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Masks of the `kept` largest scores, by operators alone."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    place = flat.argsort(descending=True, stable=True).argsort()
    parts = (place < kept).split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


@dataclass(frozen=True)
class Remembered(Selection):
    """Masks that hold as long as the scores are equal to the ones they were made of."""

    seen: tuple[Tensor, ...] = ()

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        CALLED.add("holds")
        return all(map(torch.equal, self.seen, scores))


@dataclass(frozen=True)
class Signed(Learner):
    """w_eff = w · h(s), where h is 1 for the k share of a layer's largest s, not |s|, and 0 elsewhere.

    Backward, straight through h: ∂L/∂s = slope · ∂L/∂w_eff · w.
    """

    slope: float = 1.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ConversionError(f"signed_of_mine: slope is {self.slope}; expected a number above 0")

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        CALLED.add("initial_scores")
        return draw_scores(numel, fan_in, seed, name)

    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        CALLED.add("select")
        detached = [score.detach() for score in scores]
        return Remembered(tuple(largest(detached, kept)), -1, -1, tuple(score.clone() for score in detached))

    def trace(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        CALLED.add("trace")
        return largest(scores, kept)

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        CALLED.add("effective")
        return masked(weight, mask) + self.slope * (score - score.detach()) * weight

    def favour(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        CALLED.add("favour")
        size = [score.detach().abs() + 1e-6 for score in scores]
        return [torch.where(mask, part, -part) for mask, part in zip(masks, size, strict=True)]


class Drawn(Selection):
    """Masks of one read."""

    def holds(self, scores: Sequence[Tensor], only: int | None = None) -> bool:
        return False


class Coin(Learner):
    """w_eff = w · m · n / Σm, m ~ Bernoulli(clamp(s + ½)) at each read."""

    takes_k = False
    samples = True
    rescale = True

    def initial_scores(
        self, numel: int, fan_in: float, seed: int, name: str, weights: Iterable[NDArray[np.float32]] = ()
    ) -> Iterator[NDArray[np.float32]]:
        return draw_scores(numel, fan_in, seed, name)

    def select(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Selection:
        return Drawn(tuple(self.trace(scores, kept, names)), -1, -1)

    def trace(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
        return [self._toss(score.detach(), name) for score, name in zip(scores, names, strict=True)]

    def _toss(self, score: Tensor, name: str) -> Tensor:
        thrown = noise(score, name, None)
        return score > 0 if thrown is None else thrown < score + 0.5

    def effective(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        return masked(weight, mask) * self.factor(mask) + (score - score.detach()) * weight

    def shown(self) -> str:
        CALLED.add("shown")
        return "heads"


class Untrained(EdgePopup):
    """edge-popup's first mask, for ever."""

    trains = False


class Blend(nn.Module):
    """x · kernelᵀ + shift, whose forward takes the kernel from a list that was made beforehand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs))
        self.shift = nn.Parameter(torch.randn(outputs))
        self.parts = [self.kernel]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.parts[0], self.shift)


class BlendWeights:
    """Mixin of masked `Blend` layers: the list is made at each read."""

    kernel: Tensor

    @property
    def parts(self) -> list[Tensor]:
        return [self.kernel]

    @parts.setter
    def parts(self, value: object) -> None:
        pass


def fans(layer: Blend) -> dict[str, Fans]:
    outputs, inputs = layer._parameters["kernel"].shape  # type: ignore[union-attr]
    return {"kernel": Fans(float(inputs), float(outputs))}


register_learner("signed_of_mine", Signed())
register_learner("coin_of_mine", Coin())
register_learner("untrained_of_mine", Untrained())
register_scheme("uniform_of_mine", Scheme("uniform", gain2=3.0))
KINDS.append(Kind((Blend,), fans, biases=lambda layer: ("shift",), mixin=BlendWeights))


def network() -> nn.Module:
    return nn.Sequential(Blend(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(), Blend(16, 5))


def hidden(learner: str = "signed_of_mine", **settings: Any) -> nn.Module:
    return convert(network(), learner=learner, scheme="uniform_of_mine", seed=7, **settings)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors sorted by name: name, dtype, shape, bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def step(net: nn.Module) -> float:
    """One step of training. The loss before it."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 12, generator=generator), torch.arange(8) % 5
    optimizer = torch.optim.SGD([parameter for parameter in net.parameters() if parameter.requires_grad], lr=10.0)
    with sampled(1):
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
    optimizer.step()
    return float(loss.detach())


def round_trip(net: nn.Module, path: Path) -> None:
    """Save a network, and see that the file gives it back."""
    save(net, path, probe=(2, 12))
    plain, read = bake(net).eval(), load(path, network())
    assert digest(plain.state_dict()) == digest(read.state_dict())
    assert torch.equal(plain(torch.ones(2, 12)), read(torch.ones(2, 12)))
    assert verify(path, network())


def main(output: Path, file: Path | None) -> None:
    assert {"signed_of_mine", "coin_of_mine"} <= LEARNERS.keys()
    assert isinstance(get_learner("signed_of_mine", {"slope": 2.0}), Signed)
    assert SCHEMES["uniform_of_mine"].distribution in DISTRIBUTIONS
    output.mkdir()
    told: dict[str, Any] = {}

    net = hidden(k=0.4, learner_options={"slope": 2.0}, norm="train")
    told["converted"] = digest(masks(net)), digest(bake(net).state_dict())
    first = digest(masks(net))
    losses = [step(net) for _ in range(3)]
    assert all(map(np.isfinite, losses))
    assert digest(masks(net)) != first
    round_trip(net, output / "third_party.popup.safetensors")

    def loss(scores: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, scores, torch.ones(2, 12)).square().mean()

    scores = {name: tensor.detach() for name, tensor in net.named_parameters() if name.endswith("_score")}
    assert all(gradient.any() for gradient in torch.func.grad(loss)(scores).values())

    again = hidden(k=0.4)
    start_from(again, output / "third_party.popup.safetensors")
    assert digest(masks(again)) == digest(masks(net))

    together = hidden(k=0.4, scope="global")
    told["together"] = digest(masks(together))
    step(together)
    round_trip(together, output / "together.popup.safetensors")

    coin = hidden("coin_of_mine")
    told["coin"] = digest(masks(coin)), digest(bake(coin).state_dict())
    step(coin)
    round_trip(coin, output / "coin.popup.safetensors")
    assert inspect(output / "coin.popup.safetensors").provenance["mask"] == "heads"

    untrained = hidden("untrained_of_mine", k=0.4)
    assert not any(parameter.requires_grad for parameter in untrained.parameters())
    assert digest(masks(untrained)) == digest(masks(convert(network(), seed=7, k=0.4)))

    surgery = {"learner": "signed_of_mine", "learner_options": {"slope": 2.0}, "k": 0.5, "scaled": False}
    recipe = {
        "model": {"name": "popup_surgery/conv2", "kwargs": {"width": 0.05, "in_chans": 1, "img_size": 8}},
        "surgery": surgery | {"scheme": "uniform_of_mine"},
        "data": {"max_train": 64, "max_validation": 64, "batch_size": 32, "mean": [0.3], "std": [0.4]},
        "training": {"epochs": 1, "lr": 0.1},
    }
    result = train(recipe, output=output / "run")
    assert digest(load(result.file).state_dict()) == digest(result.model.state_dict())

    if file is not None:
        told["read"] = digest(load(file, network()).state_dict())
        start_from(hidden(k=0.4), file)
    print(json.dumps(told | {"called": sorted(CALLED)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
