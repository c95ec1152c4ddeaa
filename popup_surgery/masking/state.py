"""The records that conversion leaves: a `ModuleState` on each module, with a `MaskedParam` for each masked weight.

What `build` knows about a network is stored beside it, in an `Origin` (models/architecture.py). A network has its
`Origin` before it is converted, and models/ imports nothing from masking/.
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

STATE = "_popup_state"  # key of a module's `ModuleState` in its `__dict__`


@dataclass
class MaskedParam:
    """One masked weight of a layer: where it came from, and how it is ranked.

    Attributes:
        stream: the stream name that its weights and scores were drawn under.
        fan_in: inputs summed into one output.
        std: the weights' standard deviation.
        k: the requested share; None if the learner takes no k. `scaled` weights were widened by √(1/k).
        ranking, index: the group that it is ranked in, and its index in the group.
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
        """Return the masked weight: a new tensor at each read, with the learner's gradient to the score.

        Raises:
            MaskedWeightError: the last tensor was written to in place, or a tracer that would freeze the mask reads it.
        """
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
                f"computed again from its scores at each read; change {score_name(name)}, or bake(model) first"
            )
        effective = learner.effective(weight, score, self.ranking.mask(self.index))
        if effective.is_inference() or under_transform([effective]):
            return effective
        # a tensor without memory of its own, which shares the version counter
        witness = effective.detach()
        witness.data = torch.empty(0, dtype=effective.dtype, device=effective.device)
        self._watch = witness, version_of(witness)
        return effective.as_subclass(MaskedWeight)


@dataclass
class ModuleState:
    """What conversion did to one module. Every module of a converted network has one, which marks it as converted.

    Attributes:
        masked: its masked weights, by parameter name.
        others: what happened to its other parameters, by name. A parameter that is not listed was added later.
        generated: which of the others were drawn, and from which stream.
        settings: the settings of the conversion, only on the module that `convert` was called with.
        loading: whether it is loading a `state_dict`, which may assign masked weights.
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
    """Combine the marks in a network that version 0.1.0 pickled into one `ModuleState`."""
    gather(attributes, _MARKS, STATE, _from_marks)


def _from_marks(settings: Mapping[str, Any] | None = None, **marks: Any) -> ModuleState:
    return ModuleState(**marks, settings=None if settings is None else MaskingSettings(**settings))


def state_of(module: nn.Module) -> ModuleState | None:
    """Return what conversion did to `module`; None if it was not converted."""
    upgrade(module.__dict__)
    return module.__dict__.get(STATE)


def forget(module: nn.Module) -> None:
    """Remove what conversion left on `module` and what is recorded of its weights, but not how it was built."""
    upgrade(module.__dict__)
    module.__dict__.pop(STATE, None)
    forget_base(module)


def slots_of(module: nn.Module) -> dict[str, MaskedParam]:
    """Return the masked weights of a swapped layer, by parameter name; empty for any other module."""
    state = module.__dict__.get(STATE)  # a swapped layer is upgraded when it is unpickled
    return {} if state is None else state.masked
