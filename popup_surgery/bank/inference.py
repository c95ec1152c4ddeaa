"""Which task is it? From the entropy of the outputs alone: SupSup (Wortsman et al., NeurIPS 2020, section 3.3)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConversionError, unknown
from ..torch_compat import BatchNorm
from ..weights.streams import CHUNK
from .base import Place
from .heads import Heads
from .parts import Filled, Kept, Packed, Part, Source, Whole, words_of

HOW = ("one_step", "halving", "each")
FEWEST = 32  # images whose statistics are good enough for batch norms

State = Mapping[str, tuple[Part, Tensor]]  # what is to be written where, by `state_dict` key


@dataclass(frozen=True)
class Inference:
    """The result of `MaskBank.infer`.

    Attributes:
        task: the task found.
        how: the way that was taken: `one_step`, `halving` or `each`.
        scores: of each task, the higher the likelier. For `each`, minus the mean entropy of the outputs relative to the
            logarithm of the number of classes, −1 … 0. Otherwise minus the gradient of that entropy in the task's share
            of the average, from the last average that the task was part of.
    """

    task: str
    how: str
    scores: dict[str, float]


class Mixing:
    """A bank's tasks, seen from inference.

    Args:
        network: the network as the user calls it; `core`: without wrappers.
        places: where its tensors are.
        names: the tasks.
        switch: writes a task into the network.
        state: returns a task's heads, and what is to be written where.
    """

    def __init__(
        self,
        network: nn.Module,
        core: nn.Module,
        places: Mapping[str, Place],
        names: Sequence[str],
        switch: Callable[[str], None],
        state: Callable[[str], tuple[Heads, State]],
    ) -> None:
        self.network, self.core, self.places, self.names, self.switch = network, core, places, names, switch
        found = {name: state(name) for name in names}
        self.heads = {name: heads for name, (heads, _) in found.items()}
        self.states = {name: written for name, (_, written) in found.items()}

    def infer(self, images: Tensor, how: str | None) -> Inference:
        """Find the task of a batch of images, as `MaskBank.infer` says. The network is left with other weights."""
        if how is not None and how not in HOW:
            raise unknown("how", how, HOW)
        if not len(images):
            raise ConversionError("there are no images to infer a task from; expected one or more")
        obstacle = self._obstacle()
        if how is None:
            few = len(images) < FEWEST and bool(batch_norms(self.core))
            how = "each" if obstacle or few or len(self.names) == 1 else "halving"
        if how == "each":
            scores = self._each(images)
            return Inference(max(scores, key=scores.__getitem__), how, scores)
        if obstacle:
            raise ConversionError(f"the tasks cannot be averaged: {obstacle}; expected how='each'")
        if len(images) == 1 and batch_norms(self.core):
            raise ConversionError(
                f"how is {how!r} for 1 image; the network has batch norms, which take their statistics from the images "
                "here: expected more images, or how='each'"
            )
        active, scores = list(self.names), dict.fromkeys(self.names, 0.0)
        while True:
            found = self._falls(images, active)
            scores |= found
            ranked = sorted(active, key=found.__getitem__, reverse=True)
            if how == "one_step" or len(active) <= 2:
                return Inference(ranked[0], how, scores)
            active = [name for name in active if name in ranked[: -(-len(active) // 2)]]

    def _obstacle(self) -> str:
        """Return why the tasks cannot be averaged, as a clause; empty if they can."""
        first = self.names[0]
        for name in self.names[1:]:
            if self.heads[name] is not self.heads[first]:
                return f"the heads of {first!r} and {name!r} have other sizes"
        for key, (part, tensor) in self.states[first].items():
            if not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):
                for name in self.names[1:]:
                    if not _same(part, self.states[name][key][0]):
                        return f"{key!r} is of integers, and differs between {first!r} and {name!r}"
        return ""

    def _each(self, images: Tensor) -> dict[str, float]:
        scores = {}
        for name in self.names:
            self.switch(name)
            with torch.no_grad():
                output = _rows(self.network(images), images)
            scores[name] = _number(-_entropy(output) / math.log(output.shape[1]))
        return scores

    def _falls(self, images: Tensor, active: Sequence[str]) -> dict[str, float]:
        """Return by how much a larger share of each task would lower the entropy of the average of all of them."""
        self.switch(active[0])  # and its heads
        parts = {key: [self.states[name][key][0] for name in active] for key in self.places}
        tensors = {key: tensor for key, (_, tensor) in self.states[active[0]].items()}
        differ = [key for key in self.places if any(part is not parts[key][0] for part in parts[key][1:])]
        floating = {key: tensors[key] for key in differ if tensors[key].is_floating_point()}
        with torch.no_grad():
            for key, tensor in floating.items():
                _write_mean(tensor.detach(), parts[key])
        gradients = self._gradients(images, floating)
        falls = np.zeros(len(active))
        for key, gradient in gradients.items():
            falls -= _products(gradient, parts[key], floating[key].dtype)
        return {name: _number(fall) for name, fall in zip(active, falls, strict=True)}

    def _gradients(self, images: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the outputs' entropy in each tensor, as far as it has one."""
        asked = list({id(tensor): tensor for tensor in tensors.values()}.values())
        if not asked:
            return {}
        with torch.inference_mode(False), torch.enable_grad(), _requiring(asked), _own_statistics(self.core):
            images = images.clone() if images.is_inference() else images
            entropy = _entropy(_rows(self.core(images), images))
            if not entropy.requires_grad:
                raise ConversionError("the network's outputs have no gradient; expected how='each'")
            found = torch.autograd.grad(entropy, asked, allow_unused=True)
        by_tensor = {id(tensor): gradient for tensor, gradient in zip(asked, found, strict=True)}
        return {key: by_tensor[id(t)] for key, t in tensors.items() if by_tensor[id(t)] is not None}


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return the batch norms of a network that normalise by running statistics."""
    return [norm for norm in network.modules() if isinstance(norm, BatchNorm) and norm.running_mean is not None]


@contextmanager
def _own_statistics(network: nn.Module) -> Iterator[None]:
    """Context manager: batch norms normalise by the batch itself, as in SupSup's experiments without task labels.

    The mean of the tasks' running statistics is not what the mean of their weights gives. With it, the right one of 20
    permutations of the digits was found in 7 % of batches of 128; with the batch's own, in all.
    """
    norms = batch_norms(network)
    held = [(norm, name, norm._buffers[name]) for norm in norms for name in ("running_mean", "running_var")]
    try:
        for norm, name, _ in held:
            norm._buffers[name] = None
        yield
    finally:
        for norm, name, statistic in held:
            norm._buffers[name] = statistic


@contextmanager
def _requiring(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Context manager: these tensors, and no others that do not already, take part in gradients."""
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, required in zip(tensors, before, strict=True):
            tensor.requires_grad_(required)


def _rows(output: object, images: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images) or output.shape[1] < 2:
        shown = f"a tensor of {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConversionError(
            f"the network returned {shown} for {len(images)} images; to infer a task it must return a row of two "
            "scores or more for each"
        )
    return output


def _entropy(output: Tensor) -> Tensor:
    """Return the mean entropy of rows of scores, in nats."""
    logs = (output.float() if output.dtype.itemsize < 4 else output).log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


def _number(value: Tensor | float) -> float:
    number = float(value)
    return number if math.isfinite(number) else -math.inf


def _same(one: Part, other: Part) -> bool:
    """Return whether two parts have the same values, which are not masked."""
    if isinstance(one, Filled) and isinstance(other, Filled):
        return one.value == other.value
    if isinstance(one, Whole) and isinstance(other, Whole):
        return torch.equal(one.values, other.values)
    return one is other  # otherwise one is a constant and the other is not


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def _by_source(parts: Sequence[Part]) -> tuple[dict[int, tuple[Source, list[int]]], list[int]]:
    """Return the masked parts together that have one source, and the others; by their places in `parts`."""
    together: dict[int, tuple[Source, list[int]]] = {}
    others = []
    for place, part in enumerate(parts):
        if isinstance(part, Kept) and part.negative is None:
            together.setdefault(id(part.source), (part.source, []))[1].append(place)
        else:
            others.append(place)
    return together, others


def _bits(part: Part, start: int, stop: int) -> Packed:
    assert isinstance(part, Kept)
    return np.unpackbits(part.mask[start // 8 : -(-stop // 8)], count=stop - start, bitorder="little")


def _floats(part: Part, start: int, stop: int, dtype: torch.dtype) -> np.ndarray:
    """Return a piece of a part as float32, or as float64 if it is."""
    piece = torch.empty(stop - start, dtype=dtype)
    part.piece(start, stop, words_of(piece))
    return (piece if dtype == torch.float64 else piece.float()).numpy()


def _unmasked(source: Source, numel: int) -> Kept:
    """Return a masked weight as it is where every weight is kept."""
    return Kept(source, np.full(-(-numel // 8), 255, np.uint8))


def _write_mean(tensor: Tensor, parts: Sequence[Part]) -> None:
    """Write the mean of the parts into `tensor`, in place."""
    together, others = _by_source(parts)
    n = tensor.numel()
    groups = [(_unmasked(source, n), places) for source, places in together.values()]
    mean = tensor.view(-1) if tensor.is_contiguous() else torch.empty_like(tensor.reshape(-1))
    for start, stop in _pieces(n):
        total: np.ndarray = np.zeros(stop - start, np.float64 if tensor.dtype == torch.float64 else np.float32)
        for whole, places in groups:
            kept = np.zeros(stop - start, np.float32)
            for place in places:
                kept += _bits(parts[place], start, stop)
            total += _floats(whole, start, stop, tensor.dtype) * kept.astype(total.dtype, copy=False)
        for place in others:
            total += _floats(parts[place], start, stop, tensor.dtype)
        mean[start:stop] = torch.from_numpy(total / len(parts))
    if not tensor.is_contiguous():
        tensor.copy_(mean.view(tensor.shape))


def _products(gradient: Tensor, parts: Sequence[Part], dtype: torch.dtype) -> np.ndarray:
    """Return the scalar product of a gradient with each part, whose tensors have `dtype`: float64 [parts]."""
    together, others = _by_source(parts)
    flat = gradient.detach().reshape(-1)
    groups = [(_unmasked(source, flat.numel()), places) for source, places in together.values()]
    products = np.zeros(len(parts))
    for start, stop in _pieces(flat.numel()):
        piece = (flat[start:stop] if dtype == torch.float64 else flat[start:stop].float()).cpu().numpy()
        for whole, places in groups:
            weighted = _floats(whole, start, stop, dtype) * piece
            for place in places:
                products[place] += float(np.dot(weighted, _bits(parts[place], start, stop).astype(weighted.dtype)))
        for place in others:
            products[place] += float(np.dot(_floats(parts[place], start, stop, dtype), piece))
    return products
