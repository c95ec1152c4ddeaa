"""Pack an ONNX model, and measure what that did: to its outputs, to its time, and to the accuracy on a data set."""

import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..artifact.probe import probe_input
from ..data.batches import VALIDATION, Batches, ProcessShard
from ..exporting.check import check_export
from ..exporting.convolutions import quantise_convolutions
from ..exporting.onnx_file import written
from ..exporting.packing import pack_products
from ..exporting.program import repeated
from ..exporting.to_onnx import fits, onnx_bytes, to_proto

if TYPE_CHECKING:
    import onnx_ir

BOUND = 0.25  # the largest difference of a packed file's outputs for the inputs that set its ranges
CALIBRATION, ROUNDS = 32, 5  # images that set the activations' ranges; rounds of the measurement of time


def pack(
    model: nn.Module,
    graph: "onnx_ir.Model",
    metadata: Mapping[str, str],
    inputs: Tensor,
    images: Batches | None,
    fast: bool,
    rounded: bool,
) -> tuple[bytes, dict[str, Any]]:
    """Pack a network's graph, in place. Return the file's bytes, and the fields of `Exported` that it knows.

    Raises:
        ConversionError: the packed file computes something else, or cannot be made.
    """
    plain = None
    if fits(graph):
        plain = written(onnx_bytes(to_proto(graph), metadata))
        check_export(model, plain.outputs, inputs)
    layers = pack_products(graph, "fast" if fast else "small", rounded)
    shown = list(_calibration(inputs, images))
    proto, layers = quantise_convolutions(to_proto(graph), layers, shown, rounded)
    contents = onnx_bytes(proto, metadata)
    packed = written(contents)
    found: dict[str, Any] = {
        "layers": tuple(layers),
        "difference": check_export(model, packed.outputs, shown[0], BOUND),
    }
    if plain is not None:
        found["time"] = _time(packed, plain, repeated(inputs, 1)) if any(layer.packed for layer in layers) else 1.0
    if images is not None:
        found |= _on_images(model, packed, images)
    return contents, found


def _calibration(inputs: Tensor, images: Batches | None) -> Iterator[Tensor]:
    """Yield inputs by which the ranges of activations are set: of the data set, or random ones."""
    if images is None:
        yield inputs
        if inputs.is_floating_point():
            for seed in range(1, 8):
                yield probe_input(seed, tuple(inputs.shape)).to(inputs.dtype)
        return
    left = CALIBRATION
    every = max(1, (images.counts[VALIDATION] or 0) // left)  # of all classes, though a folder has one after the other
    for batch, _ in images.validation(ProcessShard(0, every)):
        yield batch[:left].cpu()
        left -= len(batch)
        if left <= 0:
            return


def _time(packed: nn.Module, plain: nn.Module, inputs: Tensor) -> float:
    """Return the time of one network as a share of the other's: the median of rounds in which they take turns."""
    ratios = []
    for _ in range(ROUNDS + 1):  # the first warms up
        taken = []
        for network in (packed, plain):
            began = time.perf_counter()
            network(inputs)
            taken.append(time.perf_counter() - began)
        ratios.append(taken[0] / taken[1])
    return statistics.median(islice(ratios, 1, None))


def _on_images(model: nn.Module, packed: nn.Module, images: Batches) -> dict[str, float]:
    """Return the accuracies of a network and its packed file, and the share of images with the same first class."""
    seen, right, packed_right, same = 0, 0, 0, 0
    with torch.inference_mode():
        for batch, labels in images.validation():
            ours, theirs, labels = packed(batch).argmax(1).cpu(), model(batch.cpu()).argmax(1), labels.cpu()
            seen += len(labels)
            right += int((theirs == labels).sum())
            packed_right += int((ours == labels).sum())
            same += int((ours == theirs).sum())
    if not seen:
        return {}
    return {"accuracy": right / seen, "packed_accuracy": packed_right / seen, "same": same / seen}
