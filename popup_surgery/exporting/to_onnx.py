"""A program of torch.export as an ONNX model."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ConversionError
from .needed import check_packages

if TYPE_CHECKING:
    import onnx_ir

LARGEST = 2**31 - 1  # bytes of one protobuf message


def to_onnx(program: ExportedProgram, inputs: str, outputs: list[str]) -> "onnx_ir.Model":
    """Translate a program to ONNX; its names of inputs and outputs are these.

    Raises:
        ConversionError: an operator of the network has no translation.
    """
    check_packages()
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            translated: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[inputs], output_names=outputs
            )
    except Exception as error:  # errors of the exporter, and of the translations themselves
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConversionError(f"the network cannot be written as ONNX: {' '.join(str(cause).split())[:300]}") from error
    model: onnx_ir.Model = translated.model
    strip(model)
    _name_batch(model)
    return model


def strip(model: "onnx_ir.Model") -> None:
    """Remove what the exporter notes for debugging, such as the paths of this machine."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_batch(model: "onnx_ir.Model") -> None:
    """Call the free first axis `batch` in every shape; torch.export gives it a number."""
    import onnx_ir

    (given,) = model.graph.inputs
    assert given.shape is not None
    old = given.shape[0]
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (given, *values):
        shape = value.shape if value.shape is not None else onnx_ir.Shape(())
        for axis, size in enumerate(shape):
            if size == old:
                shape[axis] = "batch"


def onnx_bytes(model: "onnx_ir.Model", metadata: Mapping[str, str]) -> bytes:
    """Return the file of a model, with `metadata` as its `metadata_props`.

    Raises:
        ConversionError: it has more than 2 GiB, which no ONNX file can hold.
    """
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights > LARGEST:
        raise ConversionError(
            f"the network's weights take {weights / 1e9:.1f} GB, and an ONNX file holds 2.1; write a .pt2 or "
            ".safetensors file, or a packed one"
        )
    model.producer_name, model.producer_version = "popup-surgery", None
    model.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    return onnx_ir.to_proto(model).SerializeToString(deterministic=True)
