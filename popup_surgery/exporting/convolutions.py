"""Convolutions of an ONNX model with int8 weights and activations, as ONNX Runtime's own quantisation does it."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConversionError
from .needed import needed
from .packing import PackedLayer, ternary
from .regions import BETWEEN, Regions


def quantise_convolutions(
    model: Any, layers: list[PackedLayer], images: Iterable[Tensor], rounded: bool
) -> tuple[Any, list[PackedLayer]]:
    """Return a model whose convolutions have int8 weights where that is faster, and `layers` with what was done.

    Grouped ones stay. The range of each activation is the one that it has for `images`. Ternary weights stay exact:
    they become −64, 0 and 64 times c / 64. So small integers do not saturate on processors without VNNI either.

    Args:
        model: onnx.ModelProto.
        layers: of the model, by node name.
        images: batches of the network's input.
        rounded: also quantise weights that are not ternary, which changes them.
    """
    onnx = needed("onnx")
    weights = {each.name: each for each in model.graph.initializer}
    chosen = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        values = onnx.numpy_helper.to_array(weights[node.input[1]])
        if any(each.name == "group" and each.i > 1 for each in node.attribute) or values.dtype != np.float32:
            continue
        if rounded or ternary(values.reshape(len(values), -1).T) is not None:
            chosen[node.name] = values
    regions = Regions(model)
    worth = regions.worth(chosen)
    told = [_told(layer, chosen, worth) for layer in layers]
    if not worth:
        return model, told
    chosen = {name: chosen[name] for name in worth}
    quantised = _quantised(model, {*worth, *regions.between(worth)}, images)
    after = {each.name: each for each in quantised.graph.initializer}
    for node in model.graph.node:
        if node.name in chosen and not rounded:
            codes, scales = (
                onnx.numpy_helper.to_array(after[f"{node.input[1]}_{part}"]) for part in ("quantized", "scale")
            )
            back = codes.astype(np.float32) * scales.reshape(-1, *[1] * (codes.ndim - 1))
            if not np.array_equal(back, chosen[node.name]):
                raise ConversionError(f"nothing was written: ONNX Runtime's quantisation changed {node.name}'s weights")
    return quantised, told


def _told(layer: PackedLayer, candidates: Collection[str], worth: Collection[str]) -> PackedLayer:
    if layer.name in worth:
        size = layer.before // 4 + 4 * layer.shape[0]
        return replace(layer, after=size, how="int8, activations too", packed=True)
    if layer.how != "a convolution":
        return layer
    return replace(layer, how="a convolution too small to gain" if layer.name in candidates else "not ternary")


def _quantised(model: Any, nodes: set[str], images: Iterable[Tensor]) -> Any:
    """Run ONNX Runtime's static quantisation of these nodes."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    from onnxruntime import quantization

    name, batches = model.graph.input[0].name, iter(images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch.numpy()}

    level = logging.root.level
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        logging.root.setLevel(logging.ERROR)  # the package logs advice on the root logger
        quiet.callback(logging.root.setLevel, level)
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        path = Path(folder) / "quantised.onnx"
        try:
            quantization.quantize_static(
                model,
                path,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["Conv", *BETWEEN],
                nodes_to_quantize=sorted(nodes),
                extra_options={"ActivationSymmetric": False},
            )
        except Exception as error:  # whatever the package raises
            why = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"ONNX Runtime {runtime.__version__} cannot quantise the convolutions: {why}"
            ) from error
        return onnx.load(path)
