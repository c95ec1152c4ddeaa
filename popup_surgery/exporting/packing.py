"""Pack the products of an ONNX model: weights that are −c, 0 or +c at 2 bits or as int8, exactly.

Which products are packed depends on their sizes alone, by a rule that was measured (docs/exports.md), so that the same
network gives the same file on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir

Packing = Literal["small", "fast"]
Weights = NDArray[np.float32]

WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")  # the operators that layers become
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
WIDEST = 64  # a rounded weight's largest magnitude: two products with 8 bits do not saturate 16, without VNNI too
LEAST = {128: 384, 64: 640}  # by block: from which inner size 2 bits are not slower than float32
LEAST_INT8 = 32
LEAST_WORK = 100_000  # multiply-adds for one input; below, rounding the activations takes longer than it saves


@dataclass(frozen=True)
class PackedLayer:
    """What `export` did with one layer.

    Attributes:
        name: the layer's name in the network.
        shape: of its weight, as the graph has it.
        before, after: bytes of its weight.
        how: `2 bits` or `int8`; or why it stays in float32.
        packed: whether it was packed.
    """

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    how: str
    packed: bool


def pack_products(model: "onnx_ir.Model", packing: Packing, rounded: bool) -> list[PackedLayer]:
    """Pack the products of a model in place, and return what was done with each layer that has weights.

    Args:
        packing: `small` for 2 bits in the file and in memory (MatMulNBits) where that is faster than float32, and int8
            elsewhere; `fast` for int8 everywhere (DynamicQuantizeMatMul). Both round the
            activations to 8 bits: the former each row in blocks, the latter a tensor as a whole.
        rounded: also pack weights that are not ternary, as int8, which changes them.
    """
    return [_pack(model, node, weight, packing, rounded) for node, weight in list(_layers(model))]


def _layers(model: "onnx_ir.Model") -> Iterator[tuple["onnx_ir.Node", "onnx_ir.Value"]]:
    """Yield each node that multiplies by a constant weight, and that weight."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in WEIGHTED else None
        if weight is not None and weight.const_value is not None and len(weight.const_value.shape) > 1:
            yield node, weight


def _pack(
    model: "onnx_ir.Model", node: "onnx_ir.Node", weight: "onnx_ir.Value", packing: Packing, rounded: bool
) -> PackedLayer:
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    found: tuple[str, int] | None = None
    if reason := _refusal(node, values):
        how = reason
    else:
        matrix = values.T if _number(node, "transB", 0) else values  # inner size, outputs
        scale = ternary(matrix)
        block = block_of(len(matrix)) if scale is not None and packing == "small" else None
        if scale is None and not rounded:
            how = "not ternary"
        elif block is None and len(matrix) < LEAST_INT8:
            how = f"an inner size below {LEAST_INT8}"
        elif _rows(node) * matrix.size < LEAST_WORK:
            how = "a product too small to gain"
        else:
            how = "2 bits" if block is not None else "int8"
            found = how, block or 0
    after = values.nbytes
    if found is not None:
        after = _replace(model, node, matrix, scale, found[1])
    return PackedLayer(node.name or "", tuple(values.shape), values.nbytes, after, how, found is not None)


def _refusal(node: "onnx_ir.Node", values: NDArray[np.generic]) -> str:
    """Return why a node cannot be packed whatever its values; empty if it can."""
    if node.op_type == "ConvTranspose":
        return "a transposed convolution"
    if node.op_type == "Conv" and _number(node, "group", 1) > 1:
        return "a grouped convolution"
    if node.op_type == "Conv":
        return "a convolution" if values.dtype == np.float32 else f"{values.dtype}"
    if values.dtype != np.float32 or values.ndim != 2:
        return f"{values.dtype} of {values.ndim} axes"
    if _number(node, "alpha", 1.0) != 1 or _number(node, "beta", 1.0) != 1 or _number(node, "transA", 0):
        return "a scaled product"
    return ""


def _rows(node: "onnx_ir.Node") -> int:
    """Return how many rows a product has for one input, as far as the graph says it."""
    given = node.inputs[0]
    sizes = given.shape if given is not None and given.shape is not None else [1]
    return prod(size for size in list(sizes)[:-1] if isinstance(size, int))


def ternary(matrix: Weights) -> Weights | None:
    """Return c of each column, if all of its values are −c, 0 or +c; otherwise None."""
    magnitudes = np.abs(matrix)
    scale = magnitudes.max(axis=0)
    same = (magnitudes == 0) | (magnitudes == scale)
    return scale if bool(same.all()) else None


def block_of(inner: int) -> int | None:
    """Return how many weights share a scale at 2 bits; None where 2 bits are slower than float32: int8 is not."""
    return next((block for block, least in LEAST.items() if inner % block == 0 and inner >= least), None)


def two_bits(matrix: Weights, scale: Weights, block: int) -> tuple[NDArray[np.uint8], Weights, NDArray[np.uint8]]:
    """Return the weights, scales and zero points of MatMulNBits for a ternary matrix.

    Args:
        matrix: float32 [inner, outputs], −c, 0 and +c in each column.
        scale: float32 [outputs], each column's c.
        block: how many weights share a scale; it divides the inner size.

    Returns:
        uint8 [outputs, blocks, block / 4], four weights a byte, the first in the lowest bits: 0, 1, 2 for −c, 0, +c;
        float32 [outputs, blocks]; uint8 [outputs, ⌈blocks / 4⌉], all 1.
    """
    inner, outputs = matrix.shape
    codes = (np.sign(matrix.T) + 1).astype(np.uint8).reshape(outputs, inner // block, block // 4, 4)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8)
    blocks = inner // block
    zeros = np.full((outputs, -(-blocks // 4)), 0b01010101, np.uint8)
    return packed, np.repeat(scale[:, None], blocks, axis=1), zeros


def eight_bits(matrix: Weights, scale: Weights | None) -> tuple[NDArray[np.int8], Weights]:
    """Return int8 weights [inner, outputs] and each column's scale; exact for ternary weights, others are rounded."""
    if scale is not None:
        return np.sign(matrix).astype(np.int8), scale
    scale = np.abs(matrix).max(axis=0) / np.float32(WIDEST)
    return np.rint(matrix / np.where(scale == 0, 1, scale)).astype(np.int8), scale


def _replace(model: "onnx_ir.Model", node: "onnx_ir.Node", matrix: Weights, scale: Weights | None, block: int) -> int:
    """Put a packed product in a node's place, in 2 bits if there is a `block`. Return the bytes of its weights."""
    import onnx_ir as ir

    inner, outputs = matrix.shape
    name, given, old = node.name or "", node.inputs[0], node.inputs[1]
    last, bias = _bias(node, outputs)
    attributes: dict[str, int] = {}
    parts: dict[str, NDArray[Any]]
    if block:
        assert scale is not None
        parts = dict(zip(("codes", "scales", "zeros"), two_bits(matrix, scale, block), strict=True))
        attributes = {"K": inner, "N": outputs, "bits": 2, "block_size": block, "accuracy_level": 4}
    else:
        parts = dict(zip(("codes", "scales"), eight_bits(matrix, scale), strict=True))
    constants = []
    for suffix, array in parts.items():
        value = ir.Value(name=f"{name}.{suffix}", const_value=ir.tensor(np.ascontiguousarray(array)))
        model.graph.register_initializer(value)
        constants.append(value)
    kind = "MatMulNBits" if block else "DynamicQuantizeMatMul"
    within = not block and bias is not None and bias.shape is not None and tuple(bias.shape) == (outputs,)
    inputs = [given, *constants, None, bias] if within else [given, *constants]
    nodes = [ir.Node(MICROSOFT, kind, inputs, ir.convenience.convert_attributes(attributes), name=name)]
    if bias is not None and not within:
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{name}.bias"))
    result, before = nodes[-1].outputs[0], last.outputs[0]
    result.name, result.shape, result.type = before.name, before.shape, before.type
    replaced = [node] if last is node else [node, last]
    ir.convenience.replace_nodes_and_values(model.graph, last, replaced, nodes, [before], [result])
    if old is not None and old.name and not old.uses():
        model.graph.initializers.pop(old.name, None)
    model.graph.opset_imports[MICROSOFT] = 1
    return sum(array.nbytes for array in parts.values())


def _bias(node: "onnx_ir.Node", outputs: int) -> tuple["onnx_ir.Node", "onnx_ir.Value | None"]:
    """Return a product's bias, if it has one, and the node that adds it: the product's own or an Add after it."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node, node.inputs[2]
    product = node.outputs[0]
    users = [each.node for each in product.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not product.is_graph_output():
        (other,) = [each for each in users[0].inputs if each is not product] or [None]
        if other is not None and other.const_value is not None and tuple(other.const_value.shape) == (outputs,):
            return users[0], other
    return node, None


def _number(node: "onnx_ir.Node", name: str, default: float) -> float:
    """Return a node's attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
