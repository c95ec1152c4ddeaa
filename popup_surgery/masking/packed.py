"""Packed layers: layers of their original class whose weights are held as bits, and made at each read.

The class becomes a subclass with a property in place of the weight, as that of a masked layer does (`layer.py`). A read
gives a new parameter, which lives only as long as someone uses it. So two weights in use at once never share memory,
and what stays is a uint8 buffer of two bits a weight and the constant. A write to such a parameter would be lost; the
next read refuses it. `state_dict` has the plain weights under their keys.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskedWeightError, PopupError
from ..models.layer_types import layer_type_of
from ..models.structure import PLAIN_TYPE
from ..torch_compat import ModuleMethods, forget_weight_list, is_func_wrapper, is_replica
from .layer import guard
from .masked_weight import Watch
from .ternary import unpack

_SHAPES = "_popup_packed"  # in a packed layer's __dict__: the shapes of its packed weights, by parameter name
_ORDER = "_popup_order"  # whether channels are last in memory, by parameter name: torch.save pickles no memory format
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_TRAINED = "_popup_requires_grad"  # the names of those that would require a gradient in the plain layer
_WATCHES = "_popup_watches"  # of the parameters that were read last, by name
_INSTEAD = "load the file without packed"


class Packed(ModuleMethods):
    """Mixin of every packed layer, placed before its original class."""

    def __setattr__(self, name: str, value: Any) -> None:
        self._popup_refuse(name, "assigned")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._popup_refuse(name, "deleted")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._popup_refuse(name, "replaced")
        super().register_parameter(name, param)  # type: ignore[misc]

    def _popup_refuse(self, name: str, what: str) -> None:
        if name in self.__dict__.get(_SHAPES, ()) and not is_replica(self):  # type: ignore[arg-type]
            raise MaskedWeightError(f"{name} of {type(self).__name__} is held as bits and cannot be {what}; {_INSTEAD}")

    def _popup_cast(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Note the order in memory that `to(memory_format=…)` gives weights of four and five dimensions."""
        order = self.__dict__[_ORDER]
        for name, shape in self.__dict__[_SHAPES].items():
            if len(shape) in _LAST:
                value = self._buffers[_value_name(name)]  # type: ignore[attr-defined]
                example = value.new_empty([2] * len(shape)).contiguous(memory_format=_format(order[name], shape))
                order[name] = fn(example).is_contiguous(memory_format=_LAST[len(shape)])
        return fn

    def _popup_save(self, saved: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Put the plain weights where the original layer has them."""
        found: dict[str, Any] = {}
        for name, parameter in self._parameters.items():  # type: ignore[attr-defined]
            if name in self.__dict__[_SHAPES] and parameter is None:
                found[prefix + name] = read(self, name)  # type: ignore[arg-type]
            elif parameter is not None:
                found[prefix + name] = saved[prefix + name]
        return found | saved

    @contextmanager
    def _popup_load(self, state_dict: Any, prefix: str, missing: list[str]) -> Iterator[None]:
        """Take the weights that it has already out of a `state_dict`, and refuse others."""
        for name in self.__dict__[_SHAPES]:
            weight = read(self, name)  # type: ignore[arg-type]
            if (given := state_dict.get(prefix + name)) is None:
                missing.append(prefix + name)
            elif not _are(given, weight):
                raise MaskedWeightError(
                    f"{prefix + name} is held as bits, and the state_dict has other values, which it cannot take; "
                    f"{_INSTEAD}"
                )
            else:
                del state_dict[prefix + name]
        yield

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2:]
        return (_new, (type(self)._popup_base, tuple(self.__dict__[_SHAPES])), *state)  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _guard(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        packed = ", ".join(f"{name} packed" for name in self.__dict__[_SHAPES])
        plain = super().extra_repr()  # type: ignore[misc]
        return f"{plain}, {packed}" if plain else packed


def _are(given: Any, weight: Tensor) -> bool:
    """Return whether a `state_dict` has these values, in whatever dtype a plain network would take them."""
    if not isinstance(given, Tensor) or given.shape != weight.shape:
        return False
    if given.is_meta or weight.is_meta:
        return weight.is_meta  # which has no values, and takes any
    return torch.equal(given.to(weight.device, weight.dtype), weight)


def _format(last: bool, shape: tuple[int, ...]) -> torch.memory_format:
    return _LAST[len(shape)] if last else torch.contiguous_format


def _codes_name(name: str) -> str:
    return f"_popup_codes_{name}"


def _value_name(name: str) -> str:
    return f"_popup_value_{name}"


def read(module: nn.Module, name: str) -> Tensor:
    """Return the values of a packed weight: a new tensor at each read."""
    buffers = module._buffers
    codes, value = buffers[_codes_name(name)], buffers[_value_name(name)]
    assert codes is not None
    assert value is not None
    shape = module.__dict__[_SHAPES][name]
    return unpack(codes, value, shape).to(memory_format=_format(module.__dict__[_ORDER][name], shape))


class _Watches(dict[str, Watch]):
    """The watches of a layer, by parameter name. Copies begin with none."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Watches, ()


def _watched(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter:
    """Return a weight whose writes the next read finds. Raise `MaskedWeightError` if the one before was written to."""
    watches = module.__dict__[_WATCHES]
    if (before := watches.pop(name, None)) is not None and before.written():
        raise MaskedWeightError(
            f"{name} of {type(module).__name__} was written to, and the write is lost: it is held as bits, and made of "
            f"them at each read; {_INSTEAD}"
        )
    if not torch.jit.is_tracing() and not is_func_wrapper(weight):
        watches[name] = Watch(weight)
    return weight


def _property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        try:
            if (given := self._parameters[name]) is not None:  # by torch.func.functional_call, for the time of a call
                return given
            if torch.compiler.is_compiling():
                return read(self, name)
            # PyTorch multiplies by other kernels if a weight is a tensor of inference mode, or requires a gradient,
            # even where no gradient is computed
            trained = name in self.__dict__[_TRAINED] and not torch.is_grad_enabled()
            with torch.inference_mode(False), torch.no_grad():
                return _watched(self, name, nn.Parameter(read(self, name), trained))
        except AttributeError as error:  # nn.Module would give None in its place
            raise MaskedWeightError(f"{name} of {type(self).__name__} cannot be computed: {error}") from error

    return property(get, doc=f"The `{name}`, made of its bits at each read; read-only.")


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of `base` that makes the parameters `names` of bits; the same class at each call."""
    key = base, names
    if key not in _CLASSES:
        layer_type = layer_type_of(base)
        mixin = None if layer_type is None else layer_type.mixin
        bases = (Packed, base) if mixin is None else (Packed, mixin, base)
        namespace: dict[str, Any] = {"__module__": base.__module__, PLAIN_TYPE: base}
        _CLASSES[key] = type(f"Packed{base.__name__}", bases, namespace | {n: _property(n) for n in names})
    return _CLASSES[key]


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = packed_class(base, names)
    return cls.__new__(cls)


def _guard(module: nn.Module) -> None:
    guard(module, tuple(module.__dict__[_SHAPES]), f"is held as bits, {{}}; {_INSTEAD}")


def pack(module: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Turn `module` into a packed layer, in place. Its weights are given up.

    Args:
        weights: for each parameter, by name, the codes and the constant that `ternary.unpack` takes.
    """
    cls = packed_class(type(module), tuple(weights))
    forget_weight_list(module)
    shapes, trained = {}, []
    for name, (codes, value) in weights.items():
        weight = module._parameters[name]
        assert weight is not None
        shapes[name] = tuple(weight.shape)
        trained += [name] * weight.requires_grad
        module._parameters[name] = None  # keeps its place in the state_dict
        module.register_buffer(_codes_name(name), codes, persistent=False)
        module.register_buffer(_value_name(name), value, persistent=False)
    order = dict.fromkeys(shapes, False)
    module.__dict__ |= {_SHAPES: shapes, _TRAINED: tuple(trained), _ORDER: order, _WATCHES: _Watches()}
    module.__class__ = cls
    _guard(module)


def is_packed(core: nn.Module) -> bool:
    """Return whether a network holds weights as bits."""
    return any(isinstance(module, Packed) for module in core.modules())


def refuse_packed(core: nn.Module, what: str, error: type[PopupError]) -> None:
    """Raise `error` if a network holds weights as bits. `what` cannot be done with it, such as `be converted`."""
    if is_packed(core):
        raise error(f"the {type(core).__name__} holds its weights as bits and cannot {what}; {_INSTEAD}")
