"""Swapped layers: layers of their original class, except that the weight is read through a mask.

A swapped layer keeps its parameters, its `state_dict` keys and its forward. Its class becomes a subclass, created once
for each original class, with a property in place of the weight. So `layer.weight` is the masked weight, inside the
layer or outside. The raw weight stays in `_parameters`, frozen. The score is stored next to it as `<weight>_score`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskedWeightError
from ..models.layer_types import layer_type_of
from ..models.structure import PLAIN_TYPE
from ..selection.shards import is_shard
from ..torch_compat import ModuleMethods, forget_weight_list, fsdp_calls, is_replica, renew_weight_list
from .masked_weight import MaskedWeight
from .ranking import STATE, origin_name, score_name
from .state import ORIGINS, MaskedParam, ModuleState, slots_of, upgrade


class Masked(ModuleMethods):
    """Mixin of every swapped layer, placed before its original class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in slots_of(self) and is_replica(self):  # type: ignore[arg-type]
            self.__dict__[name] = value
            return
        if isinstance(value, nn.Parameter) and fsdp_calls():
            self._popup_exchange(name, value)
            return
        self._popup_refuse(name, "assigned; change {score}, load_state_dict, or")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._popup_refuse(name, "deleted;")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._popup_refuse(name, "replaced;")
        if isinstance(param, MaskedWeight):  # as torch.nn.utils.prune does
            raise MaskedWeightError(
                f"{name} of {type(self).__name__} would be a parameter with the values of a masked weight, which is "
                "made again from its scores at each read; bake(model) first"
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def _popup_exchange(self, name: str, value: nn.Parameter) -> None:
        """Take the parameter that `fully_shard` puts in the place of another: a shard, or the whole one for a pass."""
        self._parameters[name] = value  # type: ignore[attr-defined]
        self.__dict__[STATE].sharded = True
        for weight, slot in slots_of(self).items():  # type: ignore[arg-type]
            if name not in (weight, score_name(weight)):
                continue
            if is_shard(value):
                slot.give_up()
                continue
            if name != weight and value.dtype != torch.float32:
                raise MaskedWeightError(
                    f"the scores of {type(self).__name__} would be ranked in {value.dtype}, because fully_shard was "
                    "called with a MixedPrecisionPolicy that has a param_dtype; expected none: scores are float32, and "
                    "torch.autocast computes the products in another precision"
                )
            slot.make_again(self, weight)  # type: ignore[arg-type]

    def _popup_refuse(self, name: str, what: str) -> None:
        """Raise `MaskedWeightError` if `name` is a masked weight, unless a `state_dict` is being loaded."""
        slot = slots_of(self).get(name)  # type: ignore[arg-type]
        if slot is not None and not self.__dict__[STATE].loading:
            slot.forget_writes()  # `layer.weight += 1` writes before it assigns: one mistake, one error
            raise MaskedWeightError(
                f"{name} of {type(self).__name__} is masked and cannot be {what.format(score=score_name(name))} "
                "bake(model) first"
            )

    def _popup_cast(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Keep scores float32, whatever dtype the network is cast to."""
        found = (self._parameters.get(score_name(name)) for name in self.__dict__[STATE].masked)  # type: ignore[attr-defined]
        scores = [score for score in found if score is not None]
        scores += [score.grad for score in scores if score.is_leaf and score.grad is not None]

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is score for score in scores):
                applied = torch.empty_like(tensor, device="meta") if applied.is_meta else tensor.to(applied.device)
            return applied

        return apply

    def _popup_save(self, saved: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Add where weights are from, which belongs to them, to a `state_dict`."""
        slots = slots_of(self)  # type: ignore[arg-type]
        return saved | {
            prefix + origin_name(name, what): tensor
            for name, slot in slots.items()
            for what, tensor in slot.origins.items()
        }

    @contextmanager
    def _popup_load(self, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> Iterator[None]:
        """Let loading assign weights. A plain checkpoint without scores leaves the scores unchanged."""
        state = self.__dict__[STATE]
        for (name, slot), (what, dtype) in product(state.masked.items(), ORIGINS.items()):
            key = prefix + origin_name(name, what)
            weight, found = state_dict.get(prefix + name), state_dict.get(key)
            if found is not None and found.shape == self._parameters[name].shape:  # type: ignore[attr-defined]
                del state_dict[key]
                setattr(slot, what, found.to("cpu", dtype, copy=True).contiguous())
            elif found is None and weight is not None:
                setattr(slot, what, None)
        state.loading = True
        try:
            yield
        finally:
            state.loading = False
        for name in state.masked:
            score = self._parameters.get(score_name(name))  # type: ignore[attr-defined]
            if score is not None and score.dtype != torch.float32:  # assigned from a checkpoint of another dtype
                score.data = score.data.float()
            if prefix + name in state_dict and prefix + score_name(name) in missing:
                missing.remove(prefix + score_name(name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2:]
        return (_new, (type(self)._popup_base, tuple(self.__dict__[STATE].masked)), *state)  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        upgrade(state)
        super().__setstate__(state)  # type: ignore[misc]
        _guard(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        shares = ", ".join(
            f"{name} masked" + ("" if slot.k is None else f", {slot.ranking.pattern or f'k={slot.k:g}'}")
            for name, slot in self.__dict__[STATE].masked.items()
        )
        return ", ".join(filter(None, [super().extra_repr(), shares]))  # type: ignore[misc]


class _Guarded(dict[str, Any]):
    """The parameters of a layer. Taking one of `kept` out of them is refused, before anything has changed."""

    kept: tuple[str, ...] = ()
    why = ""  # with a gap for what cannot be done

    def __delitem__(self, name: str) -> None:
        self._check(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._check(name)
        return super().pop(name, *default)

    def _check(self, name: str) -> None:
        if name in self.kept:
            why = self.why.format("and nothing else can take its place (weight_norm and the like)")
            raise MaskedWeightError(f"{name} {why}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (), None, None, iter(self.items())  # copies are guarded by their own layers


def guard(module: nn.Module, names: tuple[str, ...], why: str) -> None:
    """Refuse that the parameters `names` are taken out of `module`; `why` has a gap for what cannot be done."""
    if not isinstance(module._parameters, _Guarded):
        guarded = _Guarded(module._parameters)
        guarded.kept, guarded.why = names, why
        module.__dict__["_parameters"] = guarded


def _guard(module: nn.Module) -> None:
    guard(module, type(module)._popup_masked, "is masked, {}; bake(model) first")  # type: ignore[attr-defined]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def masked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of `base` that reads the parameters `names` through masks; the same class at each call."""
    key = base, names
    if key not in _CLASSES:
        # A tracer that takes the original class as a leaf because of its module takes this one too.
        namespace: dict[str, Any] = {"__module__": base.__module__, PLAIN_TYPE: base, "_popup_masked": names}
        layer_type = layer_type_of(base)
        mixin = None if layer_type is None else layer_type.mixin
        bases = (Masked, base) if mixin is None else (Masked, mixin, base)
        _CLASSES[key] = type(f"Masked{base.__name__}", bases, namespace | {n: _property(n) for n in names})
    return _CLASSES[key]


def _property(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        raw = self._parameters.get(name)  # None in a replica of DataParallel's
        if raw is not None and is_shard(raw) and fsdp_calls():
            return raw
        try:
            return self.__dict__[STATE].masked[name].read(self, name)
        except AttributeError as error:  # nn.Module would give the raw weight in its place
            raise MaskedWeightError(f"{name} of {type(self).__name__} cannot be computed: {error}") from error

    return property(read, doc=f"The masked `{name}`, read-only.")


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = masked_class(base, names)
    return cls.__new__(cls)


def swap(module: nn.Module, slots: dict[str, MaskedParam], scores: dict[str, nn.Parameter]) -> None:
    """Turn `module` into a masked layer, in place. It keeps its parameters, and `scores` are added to them."""
    for name, score in scores.items():
        module.register_parameter(score_name(name), score)
    module.__dict__.setdefault(STATE, ModuleState()).masked = slots
    forget_weight_list(module)
    module.__class__ = masked_class(type(module), tuple(slots))
    _guard(module)


def unswap(module: nn.Module) -> None:
    """Turn a masked layer back into its original class, in place, with its raw weights. Its `ModuleState` stays."""
    state = module.__dict__[STATE]
    module.__dict__[STATE] = replace(state, masked={})
    module.__class__ = type(module)._popup_base  # type: ignore[attr-defined]
    module.__dict__["_parameters"] = dict(module._parameters)
    for name in state.masked:
        module._parameters.pop(score_name(name), None)
    renew_weight_list(module)


def is_masked(module: nn.Module) -> bool:
    """Return whether `module` itself is a swapped layer."""
    return isinstance(module, Masked)


class Tracer(torch.fx.Tracer):
    """A torch.fx tracer that treats masked layers as leaves, so that the graph does not freeze their masks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_masked(m) or super().is_leaf_module(m, module_qualified_name)
