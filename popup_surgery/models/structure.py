"""Compare two networks by what they compute: the classes of their modules, and the attributes that are not parameters.

Names and shapes of a `state_dict` say nothing about strides, activations or pooling. Two networks that have the same
module tree and the same attributes compute the same function in eval mode, whatever their weights are.
"""

import functools
import types
from collections.abc import Iterable, Mapping, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..torch_compat import unsaved_buffers

PLAIN_TYPE = "_popup_base"  # attribute of a masked layer's class: the class it was swapped from

# hooks, `training`, what `compile` leaves, and the dictionaries that are compared by themselves
_OWN = {*nn.Module().__dict__, *(name for name, value in vars(nn.Module).items() if not callable(value))}
_IN_TRAINING = ("drop", "checkpoint", "fused", "memory_efficient", "stochastic_depth")  # parts of attributes' names
_BESIDE = frozenset({
    "default_cfg", "pretrained_cfg", "feature_info", "num_classes", "inplace", "momentum", "process_group",
    "exportable", "scriptable", "_model_args",
})  # fmt: skip
_MEMOS = ("cache", "rel_indices", "corr_pyramid")  # parts of the names of what a pass leaves behind for the next one
_TOLERANCE = 2.0**-8  # relative, of bfloat16: buffers may have been cast to another dtype and back

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.memory_format, type, range)
_MISSING = object()
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def difference(model: nn.Module, reference: nn.Module) -> str | None:
    """Return the first difference in what two networks compute in eval mode, as a clause; None if there is none.

    Parameters and persistent buffers are not compared, nor what matters only in training or for speed: dropout and
    drop-path rates, gradient checkpointing, fused attention, hooks. Masked layers count as the layers they were.
    """
    return _Comparison().modules("", model, reference)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module in eval mode: without a mask, and without the synchronisation of statistics."""
    found = getattr(type(module), PLAIN_TYPE, type(module))
    return _without_sync(found) if found.__name__.startswith("SyncBatchNorm") else found


def is_extra_state(name: str) -> bool:
    """Return whether a `state_dict` key is what a module's `get_extra_state` returned."""
    return name.rpartition(".")[2] == "_extra_state"


def _without_sync(found: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a synchronised BatchNorm equals in eval mode."""
    if issubclass(found, nn.SyncBatchNorm) and found is not nn.SyncBatchNorm:
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d
    return nn.BatchNorm2d


def _passes(module: nn.Module | None) -> bool:
    """Return whether a module returns its input in eval mode: an identity, or a library's dropout."""
    if module is None or type(module) is nn.Identity:
        return True
    library = type(module).__module__.partition(".")[0]
    name = type(module).__name__
    drops = library in ("torch", "timm", "torchvision") and ("Drop" in name or name == "StochasticDepth")
    return drops and next(module.parameters(), None) is None and not module._modules


class _Comparison:
    """One walk over two networks. Each method returns the first difference that it finds, or None."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        self._held: list[Any] = []  # what was compared stays alive, so that no identity is used twice

    def _is_new(self, ours: Any, theirs: Any) -> bool:
        pair = id(ours), id(theirs)
        known = pair in self._seen
        self._seen.add(pair)
        self._held += [ours, theirs]
        return not known

    def modules(self, path: str, ours: nn.Module, theirs: nn.Module) -> str | None:
        """Compare two modules and everything inside them."""
        if not self._is_new(ours, theirs) or (_passes(ours) and _passes(theirs)):
            return None
        where = path or "the network"
        mine, other = plain_type(ours), plain_type(theirs)
        if mine is not other and not (
            mine in _NORMS and other in _NORMS and nn.SyncBatchNorm in map(type, (ours, theirs))
        ):
            if mine.__name__ == other.__name__:
                return f"{where} is {mine.__module__}.{mine.__name__}, not {other.__module__}.{other.__name__}"
            return f"{where} is {_article(mine)}, not {_article(other)}"
        if isinstance(ours, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            order = [[name for name, child in m._modules.items() if not _passes(child)] for m in (ours, theirs)]
            if order[0] != order[1] and sorted(order[0]) == sorted(order[1]):
                return f"the layers of {where} are in another order"
        for name in [*theirs._modules, *(name for name in ours._modules if name not in theirs._modules)]:
            inner, child, counterpart = (
                f"{path}.{name}" if path else name,
                ours._modules.get(name),
                theirs._modules.get(name),
            )
            if child is None or counterpart is None:
                if not (_passes(child) and _passes(counterpart)):
                    return f"{inner} is {_described(child)}, not {_described(counterpart)}"
            elif found := self.modules(inner, child, counterpart):
                return found
        return self._attributes(path, ours, theirs)

    def _attributes(self, path: str, ours: nn.Module, theirs: nn.Module) -> str | None:
        """Compare what two modules of one class hold besides modules and parameters."""
        mine, other = _kept(ours), _kept(theirs)
        for name in sorted(mine.keys() | other.keys()):
            one, two = (held.get(name, getattr(plain_type(theirs), name, _MISSING)) for held in (mine, other))
            # what neither the other network nor the class has is a note from outside, which no forward reads
            if one is not _MISSING and two is not _MISSING and not _wraps(one, two) and not self.values(one, two):
                return f"{path}.{name}".lstrip(".") + f" is {_short(one)}, not {_short(two)}"
        return None

    def values(self, ours: Any, theirs: Any) -> bool:
        """Return whether two attributes are the same, whatever objects they are made of."""
        if ours is theirs or isinstance(ours, torch.device):
            return True
        if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
            return self.modules("", ours, theirs) is None
        if isinstance(ours, Tensor | np.ndarray) or isinstance(theirs, Tensor | np.ndarray):
            return _same_tensors(ours, theirs)
        if isinstance(ours, _SIMPLE):
            return bool(ours == theirs) or (ours != ours and theirs != theirs)
        if not self._is_new(ours, theirs):
            return True
        if isinstance(ours, Mapping):
            return isinstance(theirs, Mapping) and ours.keys() == theirs.keys() and self._all(ours, theirs, ours.keys())
        if isinstance(ours, list | tuple):
            return (
                isinstance(theirs, list | tuple)
                and len(ours) == len(theirs)
                and self._all(ours, theirs, range(len(ours)))
            )
        if type(ours) is not type(theirs):
            return False
        if isinstance(ours, Set):
            return ours == theirs
        if parts := _PARTS.get(type(ours)):
            return all(self.values(getattr(ours, part), getattr(theirs, part)) for part in parts)
        if isinstance(ours, types.BuiltinFunctionType | type(Tensor.add)):
            return ours == theirs
        return self._all(_inside(ours), _inside(theirs), _inside(ours).keys() | _inside(theirs).keys())

    def _all(self, ours: Any, theirs: Any, keys: Iterable[Any]) -> bool:
        return all(self.values(_item(ours, key), _item(theirs, key)) for key in keys)


_PARTS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
    types.FunctionType: ("__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    types.CodeType: ("co_code", "co_consts", "co_names"),
    types.CellType: ("cell_contents",),
}


def _item(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError):
        return None


def _inside(value: Any) -> dict[str, Any]:
    """Return the attributes of an object of any other class."""
    slots = {name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())}
    return {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})


def _kept(module: nn.Module) -> dict[str, Any]:
    """Return what `module` holds that matters in eval mode, by name: attributes and unsaved buffers."""
    return {
        name: value
        for name, value in (module.__dict__ | unsaved_buffers(module)).items()
        if name not in _OWN | _BESIDE
        and not name.startswith("_popup")
        and not any(part in name for part in (*_IN_TRAINING, *_MEMOS))
    }


def _wraps(assigned: Any, method: Any) -> bool:
    """Return whether what was assigned to a module is its class's method in wrappers of Accelerate's alone."""
    if not isinstance(method, types.FunctionType):
        return False
    allowed: tuple[str, ...] = ("accelerate.",)
    while assigned is not method:
        if isinstance(assigned, types.MethodType):
            assigned = assigned.__func__
            continue
        if not hasattr(assigned, "__wrapped__") or not _home(assigned).startswith(allowed):
            return False
        assigned, allowed = assigned.__wrapped__, ("accelerate.", "torch.amp.")  # within, Accelerate casts by torch's
    return True


def _home(wrapper: Any) -> str:
    """Return the module in which a wrapper was written, whatever it says of itself."""
    function = wrapper.func if isinstance(wrapper, functools.partial) else wrapper
    return getattr(function, "__globals__", {}).get("__name__", type(wrapper).__module__)


def _same_tensors(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, nn.Parameter) and isinstance(theirs, nn.Parameter):
        return ours.shape == theirs.shape  # its values are in the state_dict
    if not isinstance(ours, Tensor | np.ndarray) or not isinstance(theirs, Tensor | np.ndarray):
        return False
    ours, theirs = torch.as_tensor(ours).detach().cpu(), torch.as_tensor(theirs).detach().cpu()
    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
        return False
    if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
        return True
    if not ours.is_floating_point():
        return False
    return torch.allclose(ours.double(), theirs.double(), rtol=_TOLERANCE, atol=2.0**-24, equal_nan=True)


def _described(module: nn.Module | None) -> str:
    return "missing" if module is None else _article(plain_type(module))


def _article(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"another tensor of shape {tuple(value.shape)}"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
