"""A program of torch.export as an ONNX model."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ConversionError
from .needed import check_packages, silence
from .packing import WEIGHTED

if TYPE_CHECKING:
    import onnx_ir

LARGEST = 2**31 - 2**24  # bytes of weights in one protobuf message, beside its graph and metadata


def to_onnx(program: ExportedProgram, inputs: str, outputs: list[str]) -> "onnx_ir.Model":
    """Translate a program to ONNX; its names of inputs and outputs are these.

    Raises:
        ConversionError: an operator of the network has no translation.
    """
    check_packages()
    for spec in program.graph_signature.output_specs:
        other = getattr(spec.arg, "value", spec.arg)  # None is left out
        if spec.kind is OutputKind.USER_OUTPUT and not isinstance(spec.arg, TensorArgument) and other is not None:
            raise ConversionError(
                f"the network returns {getattr(other, 'name', other)!r:.40} beside its tensors; an ONNX file returns "
                "tensors only"
            )
    try:
        with silence(), sdpa_kernel(SDPBackend.MATH):
            translated: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[inputs], output_names=outputs
            )
    except Exception as error:  # errors of the exporter, and of the translations themselves
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConversionError(f"the network cannot be written as ONNX: {' '.join(str(cause).split())[:300]}") from error
    model: onnx_ir.Model = translated.model
    _register_constants(model)
    _name_layers(model)
    strip(model)
    _name_batch(model)
    return model


def _register_constants(model: "onnx_ir.Model") -> None:
    """Let the graph have every constant that its nodes read.

    onnxscript's optimiser forgets one of two with the same name, as it calls the bounds of two clamps of one tensor.
    """
    graph = model.graph
    there = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for value in [value for node in graph for value in node.inputs if value is not None]:
        if value.producer() is None and value.const_value is not None and id(value) not in there:
            there.add(id(value))
            if value.name is None or value.name in graph.initializers:
                value.name = f"{value.name}_{len(there)}"
            graph.register_initializer(value)


def _name_layers(model: "onnx_ir.Model") -> None:
    """Call each node with weights after its layer, as the exporter notes it."""
    taken: set[str] = set()
    for node in model.graph:
        if node.op_type in WEIGHTED and (weight := node.inputs[1]) is not None and weight.const_value is not None:
            scopes = json.loads(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))
            name = scopes[-2] if len(scopes) > 1 and scopes[-2] not in ("", *taken) else f"{node.name}"
            taken.add(name)
            node.name = name


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


def fits(model: "onnx_ir.Model") -> bool:
    """Return whether a model's weights fit into one ONNX file."""
    return _weights(model) <= LARGEST


def check_size(model: nn.Module) -> None:
    """Raise `ConversionError` if a network's weights do not fit into one ONNX file, before it is translated."""
    tensors: Iterable[Tensor] = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    _check_size(sum(each.nbytes for each in tensors), ", or a packed one")


def _check_size(size: int, or_else: str = "") -> None:
    if size > LARGEST:
        raise ConversionError(
            f"the network's weights take {size / 1e9:,.1f} GB, and an ONNX file holds {LARGEST / 1e9:.1f}; write a "
            f".pt2 or .safetensors file{or_else}"
        )


def _weights(model: "onnx_ir.Model") -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def to_proto(model: "onnx_ir.Model") -> Any:
    """Return a model as onnx.ModelProto.

    Raises:
        ConversionError: it has more than 2 GiB, which no ONNX file can hold.
    """
    import onnx_ir

    _check_size(_weights(model))
    return onnx_ir.to_proto(model)


def onnx_bytes(model: Any, metadata: Mapping[str, str]) -> bytes:
    """Return the file of an onnx.ModelProto, with `metadata` as its `metadata_props`."""
    model.producer_name, model.producer_version = "popup-surgery", ""
    del model.metadata_props[:]
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)
