"""A plain network as a program of torch.export, whose batch size is free."""

import inspect
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import ConversionError
from ..torch_compat import DATA_DEPENDENT, SPECIALIZED
from .needed import silence

BATCHES = (1, 3)  # the numbers of inputs with which an export is compared with its network


def trace(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Export a plain network in eval mode for inputs like `example`, any number of them at a time.

    Raises:
        ConversionError: it does not take the example, or its Python code decides by the values of tensors, or fixes the
            number of inputs.
    """
    pair = repeated(example, 2)  # torch.export takes a batch of 1 for a constant
    outputs_of(model, pair)
    shapes: tuple[Any, ...] = ({0: Dim.DYNAMIC},)
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    if first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL:  # forward(self, *inputs)
        shapes = (shapes,)
    try:
        # attention by its formula: the result of other kernels has strides that ONNX's translation does not give it
        with torch.no_grad(), silence(), sdpa_kernel(SDPBackend.MATH), _AttentionOnFourAxes():
            program = torch.export.export(model, (pair,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the tracer runs the network's own code, which may raise anything
        name, why = type(model).__name__, " ".join(str(error).split())
        if DATA_DEPENDENT in why.lower():
            raise ConversionError(
                f"the {name} cannot be exported: its code decides by the values of tensors (if, while, int(…)), "
                f"which a graph cannot hold; {why[:200]}"
            ) from error
        if SPECIALIZED in why:
            raise ConversionError(
                f"the {name} cannot be exported: its code works for one number of inputs alone (as `view(2, -1)` or "
                "`if len(x) < 3` do), and an export takes any number at a time"
            ) from error
        raise ConversionError(f"torch.export cannot export the {name}: {why[:300]}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has the paths of this machine
    return program


class _AttentionOnFourAxes(TorchFunctionMode):
    """While it is active, attention gets tensors of four axes, the only ones that ONNX's translation takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args)), **(kwargs or {})}
        return _attention(*(given.pop(name, None) for name in names), *args[4:], **given)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **more: Any) -> Any:
    """Return what `F.scaled_dot_product_attention` does, and call it with four axes."""
    tensors: tuple[Any, ...] = (query, key, value, mask)
    if query.ndim < 4:  # a mask is broadcast
        tensors = (*(tensor[(None,) * (4 - tensor.ndim)] for tensor in tensors[:3]), mask)
    elif query.ndim > 4:
        lead = query.shape[:-3]
        tensors = tuple(
            each if each is None or each.ndim < 4 else each.expand(*lead, *each.shape[-3:]).flatten(0, -4)
            for each in tensors
        )
    found = F.scaled_dot_product_attention(*tensors, *args, **more)
    return found if query.ndim == 4 else found.reshape(*query.shape[:-1], value.shape[-1])


def program_bytes(program: ExportedProgram) -> bytes:
    """Return a program as torch.export.save writes it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def run_program(data: bytes, inputs: Tensor) -> list[Tensor]:
    """Load a program as torch.export.load does, and run it."""
    with torch.no_grad():
        return list(_flat(torch.export.load(io.BytesIO(data)).module()(inputs)))


def outputs_of(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return the tensors that a network returns, in order.

    Raises:
        ConversionError: the network does not take the inputs, or returns no tensor.
    """
    name, shape = type(model).__name__, " × ".join(map(str, inputs.shape))
    try:
        with torch.no_grad():
            outputs = list(_flat(model(inputs)))
    except Exception as error:  # a network may raise anything for an input that does not fit it
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(f"the {name} does not take an input of {shape}: {why}") from error
    if odd := [output.layout for output in outputs if output.layout is not torch.strided]:
        raise ConversionError(f"the {name} returns a tensor of the layout {odd[0]}; expected dense ones")
    if not outputs:
        raise ConversionError(f"the {name} returns no tensor; expected one, or a list or mapping of them")
    return outputs


def repeated(example: Tensor, count: int) -> Tensor:
    """Return `count` inputs: those of `example`, from the beginning again where it has fewer."""
    return torch.cat([example] * -(-count // len(example)))[:count].contiguous()


def _flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _flat(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _flat(part)
