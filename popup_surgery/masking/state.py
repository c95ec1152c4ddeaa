"""What conversion leaves on a network's modules: one `ModuleState` for each, and in it a `MaskedParam` for each weight.

What `build` knows of a network stands beside it, in an `Origin` of models/architecture.py: a network has that before it
is converted, and models/ imports nothing of masking/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskedWeightError
from ..models.architecture import forget_base, gather
from ..torch_compat import is_fx_tracing, version_of
from .masked_weight import MaskedWeight
from .ranking import RankGroup, parameter_of, score_name, under_transform
from .settings import MaskingSettings
from .unmasked import Generated, UnmaskedRule

STATE = "_popup_state"  # where a module has its `ModuleState`, in its `__dict__`


@dataclass
class MaskedParam:
    """One masked weight of a layer: where it came from, and how it is ranked.

    Attributes:
        stream: the stream name that its weights and scores were drawn under.
        fan_in: inputs summed into one output.
        std: the weights' standard deviation.
        k: the share that was asked for, None where the learner takes none; `scaled` weights were widened by √(1/k).
        ranking, index: the group that it is ranked in, and its place there.
    """

    stream: str
    seed: int
    scheme: str
    scaled: bool
    k: float | None
    distribution: str
    std: float
    fan_in: float
    ranking: RankGroup
    index: int
    _watch: tuple[Tensor, int] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_watch": None}

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The masked weight: a fresh tensor at each read, with the learner's gradient to the score."""
        weight, score = parameter_of(module, name), parameter_of(module, score_name(name))
        learner = self.ranking.learner
        if torch.compiler.is_compiling():
            return learner.effective(weight, score, self.ranking.mask(self.index))
        if torch.jit.is_tracing():
            raise MaskedWeightError(
                f"{name} of {type(module).__name__} was read by torch.jit.trace, which would freeze its mask; trace "
                "bake(model)"
            )
        if is_fx_tracing():
            raise MaskedWeightError(
                f"{name} of {type(module).__name__} was read by a torch.fx tracer, which would freeze its mask; trace "
                "with popup_surgery.Tracer, which takes masked layers as leaves, or trace bake(model)"
            )
        watch, self._watch = self._watch, None
        if watch is not None and version_of(watch[0]) != watch[1]:
            raise MaskedWeightError(
                f"the masked weight {self.stream!r} was written to in place, and the write is lost: a masked weight is "
                f"made anew from its scores at each read; change {score_name(name)}, or bake(model) first"
            )
        effective = learner.effective(weight, score, self.ranking.mask(self.index))
        if effective.is_inference() or under_transform([effective]):
            return effective
        # a tensor without memory that shares the version counter
        witness = effective.detach()
        witness.data = torch.empty(0, dtype=effective.dtype, device=effective.device)
        self._watch = witness, version_of(witness)
        return effective.as_subclass(MaskedWeight)


@dataclass
class ModuleState:
    """What conversion did to one module. Every module of a converted network has one, by which it is known.

    Attributes:
        masked: its masked weights, by parameter name.
        others: what became of its other parameters, by name; one that is not there came into the module later.
        generated: those of the others that were drawn, and from which stream.
        settings: of the module that `convert` was called with alone: how.
        loading: it is reading a `state_dict`, which may assign masked weights.
    """

    masked: dict[str, MaskedParam] = field(default_factory=dict)
    others: dict[str, UnmaskedRule] = field(default_factory=dict)
    generated: dict[str, Generated] = field(default_factory=dict)
    settings: MaskingSettings | None = None
    loading: bool = False


_MARKS = {
    "_popup_slots": "masked", "_popup_converted": "others", "_popup_generated": "generated",
    "_popup_settings": "settings",
}  # fmt: skip


def upgrade(attributes: dict[str, Any]) -> None:
    """Make the marks of version 0.1.0, in a network that was pickled by it, one `ModuleState`."""
    gather(attributes, _MARKS, STATE, _from_marks)


def _from_marks(settings: Mapping[str, Any] | None = None, **marks: Any) -> ModuleState:
    return ModuleState(**marks, settings=None if settings is None else MaskingSettings(**settings))


def state_of(module: nn.Module) -> ModuleState | None:
    """What conversion did to `module`; None if it has not seen it."""
    upgrade(module.__dict__)
    return module.__dict__.get(STATE)


def forget(module: nn.Module) -> None:
    """Take off `module` what conversion left on it, and what is known of its weights, but not how it was built."""
    upgrade(module.__dict__)
    module.__dict__.pop(STATE, None)
    forget_base(module)


def slots_of(module: nn.Module) -> dict[str, MaskedParam]:
    """The masked weights of a swapped layer, by parameter name; empty for any other module."""
    state = module.__dict__.get(STATE)  # a swapped layer is upgraded when it is unpickled
    return {} if state is None else state.masked
