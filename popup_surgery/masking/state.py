"""The records that conversion leaves: a `ModuleState` on each module, with a `MaskedParam` for each masked weight.

What `build` knows about a network is stored beside it, in an `Origin` (models/architecture.py). A network has its
`Origin` before it is converted, and models/ imports nothing from masking/.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskedWeightError
from ..models.architecture import forget_base, gather
from ..selection.shards import is_shard, whole
from ..torch_compat import is_fx_tracing, torch_layer_reads
from ..weights.fill import pieces_of
from ..weights.source import source_of
from ..weights.streams import Floats, origins
from .masked_weight import Watch, watched
from .ranking import STATE as STATE
from .ranking import RankGroup, parameter_of, score_name, score_of, under_transform
from .settings import MaskingSettings
from .together import made_together
from .unmasked import Generated, UnmaskedRule

ORIGINS = {"generations": torch.int16, "sources": torch.int64}  # what says where a weight's values are from


@dataclass
class MaskedParam:
    """One masked weight of a layer: where it came from, and how it is ranked.

    Attributes:
        stream: the stream name that its weights and scores were drawn under.
        fan_in: inputs summed into one output.
        std: the weights' standard deviation.
        k: the requested share; None if the learner takes no k. `scaled` weights were widened by √(1/k).
        ranking, index: the group that it is ranked in, and its index in the group.
        generations: how often each weight was drawn again: int16 on the CPU, of the weight's shape; None if none was.
            All places of one weight share it.
        sources: whose value each weight has, as an index of the flattened weight: int64 on the CPU, of the weight's
            shape; None if none was copied. All places share it too.
        uncast: whether other code than its layer's own has read it under autocast.
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
    generations: Tensor | None = None
    sources: Tensor | None = None
    uncast: bool = field(default=False, repr=False, compare=False)
    _watches: set[Watch] = field(default_factory=set, repr=False, compare=False)  # of the tensors that were read

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_watches": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_watches": set()})
        self.__dict__.pop("_watch", None)  # of earlier versions

    @property
    def origins(self) -> dict[str, Tensor]:
        """Where the values are from, by the names of `ORIGINS`; empty if all are the first of their places."""
        return {what: tensor for what in ORIGINS if (tensor := getattr(self, what)) is not None}

    def values(self, held: Tensor, factor: float = 1.0) -> Iterator[Floats]:
        """Yield the weight's values as a file restores them, in pieces of float32, times `factor` if they are drawn.

        Args:
            held: the raw weight. Only its number of elements counts, unless it is pretrained.
        """
        of = {what: (piece.numpy() for piece in pieces_of(tensor)) for what, tensor in self.origins.items()}
        found = origins(held.numel(), of.get("generations"), of.get("sources"))
        source = source_of(self.distribution)
        return source.values(held.numel(), self.std * factor, self.seed, self.stream, held, found)

    def mask(self, module: nn.Module, name: str) -> Tensor:
        """Return the mask of the scores that `module` holds: bool, of the weight's shape."""
        return self.ranking.mask(self.index, score_of(module, name))

    def read(self, module: nn.Module, name: str) -> Tensor:
        """Return the masked weight: a new tensor at each read, with the learner's gradient to the score.

        Of a layer in shards it is the whole weight, gathered and without a gradient; all processes must read it.

        Raises:
            MaskedWeightError: an earlier tensor was written to in place, or a tracer that would freeze the mask reads
                it.
        """
        weight, score = parameter_of(module, name), score_of(module, name)
        learner = self.ranking.learner
        if torch.compiler.is_compiling():
            return learner.effective(weight, score, self.ranking.mask(self.index, score))
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
        if is_shard(weight) or is_shard(score):
            with torch.no_grad():
                return learner.effective(whole(weight), whole(score), self.ranking.mask(self.index, score))
        self.check_writes(name)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # tensors of that mode do not count writes
                return self._watched(self._made(weight, score), weight, score)
        effective = self._made(weight, score)
        if module.__dict__[STATE].sharded and torch_layer_reads():
            effective = _autocast(effective)
        return self._watched(effective, weight, score)

    def _made(self, weight: Tensor, score: Tensor) -> Tensor:
        """Return the masked weight, made with those of all layers, or by itself."""
        made = made_together(self, weight, score)
        if made is not None:
            return made
        return self.ranking.learner.effective(weight, score, self.ranking.mask(self.index, score))

    def _watched(self, effective: Tensor, weight: Tensor, score: Tensor) -> Tensor:
        """Return the masked weight as a tensor whose writes the next read finds."""
        if under_transform([effective]) or effective.data_ptr() in (weight.data_ptr(), score.data_ptr()):
            return effective
        watch = Watch(effective)
        self._watches.add(watch)
        return watched(effective, watch)

    def check_writes(self, name: str) -> None:
        """Raise `MaskedWeightError` if a tensor that `read` returned was written to. Each write is reported once."""
        for watch in tuple(self._watches):
            if watch.written():
                self.forget_writes()
                raise MaskedWeightError(
                    f"the masked weight {self.stream!r} was written to in place, and the write is lost: a masked "
                    f"weight is computed again from its scores at each read; change {score_name(name)}, or bake(model) "
                    "first"
                )
            if watch.over():
                self._watches.discard(watch)

    def give_up(self) -> None:
        """Free the mask, and the masked weights that wait for a backward, as `fully_shard` frees their parameters.

        A learner that samples may give another one the next time, so its weights stay.
        """
        if not self.ranking.learner.samples:
            self.ranking.free_masks()
            for watch in self._watches:
                if watch.differentiable:
                    watch.free()

    def make_again(self, module: nn.Module, name: str) -> None:
        """Give the masked weights that wait for a backward their values again, once `module` has its parameters."""
        weight, score = parameter_of(module, name), score_of(module, name)
        freed = [watch for watch in self._watches if watch.freed()]
        if freed and not is_shard(weight) and not is_shard(score):
            with torch.no_grad():
                effective = self.ranking.learner.effective(weight, score, self.ranking.mask_again(self.index, score))
            for watch in freed:
                watch.restore(effective)

    def forget_writes(self) -> None:
        """Forget the writes so far: an error has reported them."""
        for watch in tuple(self._watches):
            watch.reset()


@dataclass
class ModuleState:
    """What conversion did to one module. Every module of a converted network has one, which marks it as converted.

    Attributes:
        masked: its masked weights, by parameter name.
        others: what happened to its other parameters, by name. A parameter that is not listed was added later.
        generated: which of the others were drawn, and from which stream.
        settings: the settings of the conversion, only on the module that `convert` was called with.
        loading: whether it is loading a `state_dict`, which may assign masked weights.
        sharded: whether `fully_shard` exchanges its parameters.
    """

    masked: dict[str, MaskedParam] = field(default_factory=dict)
    others: dict[str, UnmaskedRule] = field(default_factory=dict)
    generated: dict[str, Generated] = field(default_factory=dict)
    settings: MaskingSettings | None = None
    loading: bool = False
    sharded: bool = False


_MARKS = {
    "_popup_slots": "masked", "_popup_converted": "others", "_popup_generated": "generated",
    "_popup_settings": "settings",
}  # fmt: skip


def _autocast(effective: Tensor) -> Tensor:
    """Return what autocast would make of a masked weight, whose copy could not be freed until the backward."""
    device = effective.device.type
    if torch.is_autocast_enabled(device) and effective.dtype == torch.float32:
        return effective.to(torch.get_autocast_dtype(device))
    return effective


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
