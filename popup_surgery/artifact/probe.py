"""The probe: the first values of a network's output for an input drawn from the seed."""

import numpy as np
import torch
from torch import nn

from ..weights.fill import fill
from ..weights.streams import draw
from .manifest import Probe

VALUES = 16
RTOL = 1e-3  # float32 sums in a different order stay well within it, even through a hundred layers


def probe_input(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the input of a probe: standard normal numbers drawn from the seed, float32."""
    return fill(torch.empty(shape), draw("normal", int(np.prod(shape)), 1.0, seed, "other", "probe"))


def take_probe(model: nn.Module, seed: int, shape: tuple[int, ...]) -> Probe | None:
    """Return a plain network's probe for an input of `shape`; None if the output is not finite or not a tensor."""
    output = _first_outputs(model, seed, shape, VALUES)
    return Probe(shape, tuple(map(float, output)), RTOL) if output is not None else None


def check_probe(model: nn.Module, seed: int, probe: Probe) -> tuple[bool, str]:
    """Return whether a plain network's outputs match the probe, and a short description of the outcome."""
    try:
        output = _first_outputs(model, seed, probe.shape, len(probe.output))
    except Exception as error:  # a network may raise anything for an input that does not fit it
        return False, f"the network does not take the probe's input {probe.shape}: {error}"
    if output is None or len(output) != len(probe.output):
        return False, f"the network's outputs are not {len(probe.output)} finite numbers"
    expected = np.array(probe.output, np.float64)
    off = float(np.abs(output - expected).max() / (np.abs(expected).max() or 1.0))
    return off <= probe.rtol, f"output differs by {off:.1e} of its largest value; allowed {probe.rtol:g}"


def _first_outputs(model: nn.Module, seed: int, shape: tuple[int, ...], count: int) -> np.ndarray | None:
    parameter = next(model.parameters())
    with torch.no_grad():
        output = model.eval()(probe_input(seed, shape).to(parameter.device, parameter.dtype))
    if not isinstance(output, torch.Tensor):
        return None
    first = output.float().cpu().reshape(-1)[:count].double().numpy()
    return first if len(first) and np.isfinite(first).all() else None
