"""Compare an export with its network before it is put in place."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConversionError
from .program import BATCHES, outputs_of, repeated

BOUND = 1e-4
"""The largest difference of a float32 export from its network, as a share of the largest output."""


def check_export(
    model: nn.Module, run: Callable[[Tensor], list[Tensor]], example: Tensor, bound: float = BOUND
) -> float:
    """Run an export and its network on the same inputs, several numbers of them, and return the largest difference.

    Args:
        run: runs the export, and returns all of its outputs.
        example: inputs, the first axis is the batch.

    Raises:
        ConversionError: the export fails for a number of inputs, or the difference is above `bound`.
    """
    worst = 0.0
    for count in BATCHES:
        inputs = repeated(example, count)
        expected = outputs_of(model, inputs)
        try:
            found = run(inputs)
        except Exception as error:  # the runtime's errors have no class of their own
            why = " ".join(str(error).split())[:200]
            raise ConversionError(f"nothing was written: the export does not run on {count} inputs: {why}") from error
        worst = max(worst, difference(found, expected))
    if worst > bound:
        own = _own_error(model, repeated(example, BATCHES[-1]))
        raise ConversionError(
            f"nothing was written: the export's outputs differ from the network's by {worst:.1e} of the largest; "
            f"allowed {bound:g}"
            + (f"; float32 alone changes this network's by {own:.1e}, against float64" if own > bound else "")
        )
    return worst


def check_repeats(model: nn.Module, example: Tensor) -> None:
    """Check, before the work, that a network computes the same each time.

    Raises:
        ConversionError: it does not.
    """
    inputs = repeated(example, 2)
    first = [output.clone() for output in outputs_of(model, inputs)]  # a network may return memory of its own
    if difference(outputs_of(model, inputs), first) > BOUND:
        raise ConversionError(
            f"the {type(model).__name__} cannot be exported: its outputs for the same inputs differ from pass to pass, "
            "because it draws random numbers or changes its own buffers"
        )


def _own_error(model: nn.Module, inputs: Tensor) -> float:
    """Return how far rounding to float32 moves a network's outputs, as a share of the largest; 0 if it is not known."""
    try:
        return difference(outputs_of(model, inputs), outputs_of(copy.deepcopy(model).double(), inputs.double()))
    except Exception:  # a network may not run in float64
        return 0.0


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of outputs, as a share of the largest expected one.

    Raises:
        ConversionError: the expected outputs are not finite, so that nothing can be compared; or the shapes differ.
    """
    if _shapes(found) != _shapes(expected):
        raise ConversionError(
            f"nothing was written: the export's outputs are {_shapes(found)}, and the network's {_shapes(expected)}"
        )
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (torch.view_as_real(t) if t.is_complex() else t for t in (ours.detach(), theirs.detach()))
        ours, theirs = ours.double(), theirs.double().cpu()
        if not bool(torch.isfinite(theirs).all()):
            raise ConversionError("nothing was written: the network's outputs for random inputs are not finite")
        if theirs.numel():
            off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
            worst = max(worst, off if off == off else float("inf"))
    return worst


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{'complex ' * t.is_complex()}{' × '.join(map(str, t.shape)) or 'one number'}" for t in outputs)
