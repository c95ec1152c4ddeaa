"""Dense networks made small by plain means: the largest weights, rounded to 8 or 4 bits, without more training."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..atomic import write_atomically
from ..data.batches import quiet
from ..errors import RunError
from ..experiment.opened import open_result
from ..experiment.setup import open_for
from ..sweep import Outcome, Run
from ..training.evaluation import accuracy_of
from ..training.run_folder import Kind

FILE = "rounded.json"  # in a run's folder: what was measured there
_KEYS = [f"{bits} bits, kept {kept}" for bits in (8, 4) for kept in (1.0, 0.5, 0.3, 0.1, 0.05)]


def rounded(outcomes: Sequence[Outcome], output: Path) -> list[Outcome]:
    """Return what the dense networks of a sweep would be, pruned and rounded.

    For each number of bits and each share of weights that is kept there is an outcome. A network is measured once: the
    numbers stay in the folder of its run.
    """
    found, points = list[Outcome](), len(outcomes)
    dense = [o for o in outcomes if o.numbers is not None and o.run.folder(output).kind is Kind.WEIGHTS]
    measured = {outcome.run.name: _measured(outcome.run, output) for outcome in dense}
    for number, key in enumerate(_KEYS, 1):
        for outcome in dense:
            assert outcome.numbers is not None
            run = replace(
                outcome.run,
                label=f"{outcome.run.label}, pruned, {key.partition(' ')[0]} bits",
                values={**outcome.run.values, "kept": float(key.split()[-1])},
                point=number * points + outcome.run.point,
            )
            found.append(replace(outcome, run=run, numbers=replace(outcome.numbers, **measured[outcome.run.name][key])))
    return found


def _measured(run: Run, output: Path) -> dict[str, dict[str, float]]:
    """Return accuracy, kept weights and bytes of a run's network for each key; they are read if they are there."""
    folder = run.folder(output)
    file = folder.path / FILE
    if file.exists():
        try:
            there = json.loads(file.read_text())
            return {key: there[key] for key in _KEYS}
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(f"{file} is damaged; remove it, and it is measured again") from error
    network = open_result(folder.final).network().to("cuda" if torch.cuda.is_available() else "cpu")
    batches = open_for(network, run.recipe.data, quiet, train=False)
    state = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    found = {}
    for key in _KEYS:
        bits, kept = int(key.partition(" ")[0]), float(key.split()[-1])
        with torch.no_grad():
            size, left = _round(network, state, bits, kept)
        accuracy, _ = accuracy_of(network, batches.validation(), nullcontext)
        found[key] = {"accuracy": accuracy, "kept": left, "stored": size, "size": size}
    write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _round(network: nn.Module, state: Mapping[str, Tensor], bits: int, share: float) -> tuple[float, int]:
    """Set a network's weights to `state`, pruned and rounded. Return the bytes that they take, and how many are left.

    The largest weights of the whole network are kept. Those of a layer become integers times one scale of 4 bytes, and
    a mask at its entropy limit, log₂ C(n, kept), says which they are. Vectors stay float32.
    """
    weights = {name: values for name, values in state.items() if values.ndim > 1}
    magnitudes = torch.cat([values.abs().flatten() for values in weights.values()])
    left = max(1, round(share * len(magnitudes)))
    least = magnitudes.topk(left).values[-1]
    size = float(sum(values.nbytes for name, values in state.items() if name not in weights))
    size += sum(buffer.nbytes for buffer in network.buffers())
    for name, parameter in network.named_parameters():
        values = state[name]
        if name in weights:
            mask = values.abs() >= least
            scale = values.abs().max() / (2 ** (bits - 1) - 1)
            values = torch.round(values / scale.clamp_min(1e-30)) * scale * mask
            n, kept = mask.numel(), int(mask.sum())
            size += (
                4
                + kept * bits / 8
                + (math.lgamma(n + 1) - math.lgamma(kept + 1) - math.lgamma(n - kept + 1)) / (8 * math.log(2))
            )
        parameter.copy_(values)
    return size, left
