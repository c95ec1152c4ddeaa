"""What a swapped layer is: the layer's own class, except that its weight is read through a mask.

A swapped layer keeps its parameters, its `state_dict` keys and its forward. Its class becomes a subclass, made once for
each original class, with a property where the weight was: whoever reads `layer.weight` meets the masked weight, inside
the layer or outside. The raw weight stays in `_parameters`, frozen, and the score joins it as `<weight>_score`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskedWeightError
from ..learners import Learner
from ..models.layer_types import kind_of
from ..selection import Selection

SLOTS = "_popup_slots"
LOADING = "_popup_loading"


def score_name(name: str) -> str:
    """The name of the score parameter that belongs to the weight `name`."""
    return f"{name}_score"


class Ranking:
    """The weights that are ranked together: one layer's, or with `scope="global"` all of a network's.

    The mask is kept from one read to the next, and each read makes sure that it still is the scores' own: a tensor's
    version counter would not tell, because a fused optimiser and a write to `.data` leave it alone.
    """

    def __init__(self, learner: Learner, kept: int) -> None:
        self.learner = learner
        self.kept = kept
        self.members: list[tuple[nn.Module, str]] = []
        self.streams: list[str] = []
        self._selection: Selection | None = None
        self._held: list[Tensor] | None = None  # the scores, while a forward of the root runs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_selection": None, "_held": None}

    def add(self, module: nn.Module, name: str, stream: str) -> int:
        """Rank the weight `name` of `module` here too. Returns its place."""
        self.members.append((module, name))
        self.streams.append(stream)
        return len(self.members) - 1

    def scores(self) -> list[Tensor]:
        return [_parameter(module, score_name(name)) for module, name in self.members]

    def mask(self, index: int) -> Tensor:
        """The mask of member `index`: bool, of its weight's shape."""
        scores = self.scores()
        if torch.compiler.is_compiling() or _under_transform(scores):
            return self.learner.trace([score.detach() for score in scores], self.kept, self.streams)[index]
        held = self._held is not None and all(a is b for a, b in zip(self._held, scores, strict=True))
        if self._selection is None or not self._selection.holds(scores, index if held else None):
            with torch.inference_mode(False):  # a mask must outlive the mode
                self._selection = self.learner.select(scores, self.kept, self.streams)
        return self._selection.masks[index]

    def hold_during_forward(self, root: nn.Module) -> None:
        """Check all scores once at the start of each forward of `root`; in it each read checks its own alone."""
        root.register_forward_pre_hook(_Hold(self, True))
        root.register_forward_hook(_Hold(self, False), always_call=True)


class _Hold:
    """Forward hook that starts or ends the holding of a ranking's masks."""

    def __init__(self, ranking: Ranking, start: bool) -> None:
        self.ranking, self.start = ranking, start

    def __call__(self, module: nn.Module, *_: Any) -> None:
        ranking = self.ranking
        if torch.compiler.is_compiling():
            return
        ranking._held = None
        if self.start:
            ranking.mask(0)
            ranking._held = ranking.scores()


def drop_hooks(module: nn.Module) -> None:
    """Take the hooks of a ranking off `module`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for handle in [handle for handle, hook in hooks.items() if isinstance(hook, _Hold)]:
            del hooks[handle]
            module._forward_hooks_always_called.pop(handle, None)


@dataclass
class Slot:
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
    ranking: Ranking
    index: int
    _watch: tuple[Tensor, int] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_watch": None}

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The masked weight: a fresh tensor at each read, with the learner's gradient to the score."""
        weight, score = _parameter(module, name), _parameter(module, score_name(name))
        learner = self.ranking.learner
        if torch.compiler.is_compiling():
            return learner.effective(weight, score, self.ranking.mask(self.index))
        if torch.jit.is_tracing():
            raise MaskedWeightError(
                f"{name} of {type(module).__name__} was read by torch.jit.trace, which would freeze its mask; trace "
                "bake(model)"
            )
        if torch.fx._symbolic_trace.is_fx_symbolic_tracing():
            raise MaskedWeightError(
                f"{name} of {type(module).__name__} was read by a torch.fx tracer, which would freeze its mask; trace "
                "with popup_surgery.Tracer, which takes masked layers as leaves, or trace bake(model)"
            )
        watch, self._watch = self._watch, None
        if watch is not None and watch[0]._version != watch[1]:
            raise MaskedWeightError(
                f"the masked weight {self.stream!r} was written to in place, and the write is lost: a masked weight is "
                f"made anew from its scores at each read; change {score_name(name)}, or bake(model) first"
            )
        effective = learner.effective(weight, score, self.ranking.mask(self.index))
        if effective.is_inference() or _under_transform([effective]):
            return effective
        # a tensor without memory that shares the version counter
        witness = effective.detach()
        witness.data = torch.empty(0, dtype=effective.dtype, device=effective.device)
        self._watch = witness, witness._version
        return effective.as_subclass(MaskedWeight)


class MaskedWeight(Tensor):
    """What a masked weight reads as: a plain tensor to every function, whose `.data` hides no write."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if self.requires_grad:
            raise RuntimeError("a masked weight that has a gradient cannot be copied; detach it first")
        return self.detach().clone()

    @property
    def data(self) -> Tensor:
        return self.detach()  # shares the version counter, which `data` of a plain tensor does not

    @data.setter
    def data(self, value: Tensor) -> None:
        raise MaskedWeightError(
            f"the data of a masked weight of shape {tuple(self.shape)} was assigned, and would be lost: it is made "
            "anew from its scores at each read; change the scores, or bake(model) first"
        )


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _under_transform(tensors: list[Tensor]) -> bool:
    """Whether a tensor is no plain one: a torch.func wrapper, a fake or another subclass that NumPy cannot read."""
    return any(
        type(t) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    )


class Masked:
    """Mixin of every swapped layer, in front of its original class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get(SLOTS, ()) and LOADING not in self.__dict__:
            raise MaskedWeightError(
                f"{name} of {type(self).__name__} is masked and cannot be assigned; change {score_name(name)}, "
                "load_state_dict, or bake(model) first"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get(SLOTS, ()):
            raise MaskedWeightError(
                f"{name} of {type(self).__name__} is masked and cannot be deleted; bake(model) first"
            )
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As nn.Module's, but scores stay float32 whatever dtype the network is cast to."""
        scores = [self._parameters[score_name(name)] for name in self.__dict__[SLOTS]]  # type: ignore[attr-defined]
        scores += [score.grad for score in scores if score.grad is not None]

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is score for score in scores):
                applied = torch.empty_like(tensor, device="meta") if applied.is_meta else tensor.to(applied.device)
            return applied

        return super()._apply(apply, recurse)  # type: ignore[misc]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        """As nn.Module's, which may assign; a plain checkpoint, that has no scores, leaves the scores as they are."""
        self.__dict__[LOADING] = True
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)  # type: ignore[misc]
        finally:
            del self.__dict__[LOADING]
        for name in self.__dict__[SLOTS]:
            score = self._parameters[score_name(name)]  # type: ignore[attr-defined]
            if score.dtype != torch.float32:  # assigned from a checkpoint of another dtype
                score.data = score.data.float()
            if prefix + name in state_dict and prefix + score_name(name) in missing:
                missing.remove(prefix + score_name(name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2:]
        return (_new, (type(self)._popup_base, tuple(self.__dict__[SLOTS])), *state)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        shares = ", ".join(
            f"{name} masked" + ("" if slot.k is None else f", k={slot.k:g}")
            for name, slot in self.__dict__[SLOTS].items()
        )
        return ", ".join(filter(None, [super().extra_repr(), shares]))  # type: ignore[misc]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def masked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` whose parameters `names` are read through their masks; the same one at each call."""
    key = base, names
    if key not in _CLASSES:
        # A tracer that takes the original class as a leaf by its module takes this one too.
        namespace: dict[str, Any] = {"__module__": base.__module__, "_popup_base": base}
        kind = kind_of(base)
        bases = (Masked, kind.mixin, base) if kind is not None and kind.mixin is not None else (Masked, base)
        _CLASSES[key] = type(f"Masked{base.__name__}", bases, namespace | {n: _property(n) for n in names})
    return _CLASSES[key]


def _property(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        return self.__dict__[SLOTS][name].read(self, name)

    return property(read, doc=f"The masked `{name}`, read-only.")


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = masked_class(base, names)
    return cls.__new__(cls)


def swap(module: nn.Module, slots: dict[str, Slot], scores: dict[str, nn.Parameter]) -> None:
    """Turn `module` into a masked layer, in place. It keeps its parameters; `scores` join them."""
    for name, score in scores.items():
        module.register_parameter(score_name(name), score)
    module.__dict__[SLOTS] = slots
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)  # or it would hold the weights beside those that are loaded later
    module.__class__ = masked_class(type(module), tuple(slots))


def unswap(module: nn.Module) -> None:
    """Turn a masked layer back into its original class, in place, with its raw weights."""
    slots = module.__dict__.pop(SLOTS)
    module.__class__ = type(module)._popup_base  # type: ignore[attr-defined]
    for name in slots:
        del module._parameters[score_name(name)]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def is_masked(module: nn.Module) -> bool:
    """Whether `module` itself is a swapped layer."""
    return isinstance(module, Masked)


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The masked weights of a swapped layer, by parameter name; empty for any other module."""
    return module.__dict__.get(SLOTS, {})


class Tracer(torch.fx.Tracer):
    """A torch.fx tracer that takes masked layers as leaves, so that their masks stay alive in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_masked(m) or super().is_leaf_module(m, module_qualified_name)
