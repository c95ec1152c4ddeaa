"""Every private name of torch that the package uses, and every text of torch's that it matches, under a public name.

A release of torch may drop or change any of them; `tests/test_compat.py` then says which. Nothing else of the package
reaches for a private name of torch, with one exception: `_parameters`, `_buffers` and `_modules` of `nn.Module`, the
dictionaries that every module keeps, are read in many places.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm
"""What every batch norm is an instance of, apex's too, which derives from no public class.

Tried on torch 2.11 and 2.14."""

NormWithStatistics = nn.modules.batchnorm._NormBase
"""What every norm that may keep running statistics is an instance of: batch and instance norms.

There is no public class above them. Tried on torch 2.11 and 2.14."""

BROADCAST_BUFFERS_DEPRECATED = "`broadcast_buffers` is deprecated"
"""How DistributedDataParallel's warning about that argument starts, a regular expression.

Its successor `forward_sync_buffers` is younger than torch 2.11, which gives no such warning; 2.14 does."""

NOT_DETERMINISTIC = "deterministic"
"""In the message of every operator that has no deterministic algorithm, and was asked for one.

torch raises a plain RuntimeError. Tried on torch 2.11 and 2.14."""

WORKER_DIED = "DataLoader worker (pid"
"""How a DataLoader's message starts when one of its worker processes died.

torch raises a plain RuntimeError. Tried on torch 2.11 and 2.14."""

DIED_SENDING = r"received \d+ items of ancdata"
"""What it may say first where a worker died as it sent a tensor, a regular expression.

The text is that of Python's multiprocessing, from 3.6 to 3.13, which torch passes on. Tried on torch 2.11 and 2.14."""


def version_of(tensor: Tensor) -> int:
    """How often `tensor`, or any alias that shares its counter, was written to in place.

    torch publishes only the other direction, `torch.autograd.graph.increment_version`. Tried on torch 2.11 and 2.14.
    """
    return tensor._version


def is_func_wrapper(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, such as `vmap` or `grad`, has wrapped `tensor`, so that it has no memory.

    Its type is Tensor, and torch.func has no question for it. Tried on torch 2.11 and 2.14.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_fx_tracing() -> bool:
    """Whether a tracer of torch.fx runs in this thread. `torch.compile` and `torch.export` do not count.

    A masked weight is no input of what is traced, so that no `torch.fx.Proxy` would show it. Tried on torch 2.11 and
    2.14.
    """
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module inside what `torch.compile(model)` returned; None where `model` is nothing like it.

    The wrapper's class is private, and so is the name that it keeps the module under. Tried on torch 2.11 and 2.14.
    """
    return model._modules.get("_orig_mod")


def remove_forward_hooks(module: nn.Module, kind: type) -> None:
    """Remove the forward hooks and forward pre-hooks of `module` that are instances of `kind`.

    The public way needs the handles that registering returned, which a copied or unpickled module does not have. Tried
    on torch 2.11 and 2.14.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def renew_reducer(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Let DistributedDataParallel exchange the gradients of whatever requires one now.

    It makes its reducer when it is made, and again only when it is unpickled: that is what happens here, in place and
    in any process group. Tried on torch 2.11 and 2.14.
    """
    group = wrapper.process_group
    wrapper._remove_autograd_hooks()
    wrapper.__setstate__(wrapper.__dict__ | {"process_group": group, "reducer": None, "logger": None})
    wrapper.process_group = group


class ModuleMethods:
    """Mixin in front of a module's class: what nn.Module does by methods of private names, to be overridden.

    There are public hooks for loading, but they are stored on each module and pickled with it; for casting there are
    none. Tried on torch 2.11 and 2.14.
    """

    def _popup_cast(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What `to`, `half`, `cuda` and the like do to each tensor of this module, in place of `fn`."""
        return fn

    def _popup_load(
        self, state_dict: Mapping[str, Any], prefix: str, missing: list[str]
    ) -> AbstractContextManager[None]:
        """Context manager: entered while `load_state_dict` fills this module; `missing` gets the keys that it lacks."""
        return nullcontext()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(self._popup_cast(fn), recurse)  # type: ignore[misc]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        with self._popup_load(state_dict, prefix, missing):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)  # type: ignore[misc]


class RecurrentWeights:
    """Mixin of masked recurrent layers, whose forward takes its weights from a list made beforehand.

    `nn.RNNBase` keeps that list, and weak references that tell when it is old. Tried on torch 2.11 and 2.14.
    """

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for layer in self.all_weights for weight in layer]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        pass  # made again at each read

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state | {"_flat_weight_refs": []})  # type: ignore[arg-type]


def forget_weight_list(module: nn.Module) -> None:
    """Take the list of its weights off a recurrent layer, or it would hold them beside those that are loaded later.

    Does nothing to another module. Tried on torch 2.11 and 2.14.
    """
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def renew_weight_list(module: nn.Module) -> None:
    """Make the list of its weights again for a recurrent layer that had lost it.

    `flatten_parameters` reads the list and makes none. Does nothing to another module. Tried on torch 2.11 and 2.14.
    """
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
