"""Every private name of torch that the package uses, and every message of torch that it matches, under a public name.

A release of torch may drop or change any of them; `tests/test_compat.py` then says which. No other module of the
package uses a private name of torch, with one exception: `_parameters`, `_buffers` and `_modules`, the dictionaries of
every `nn.Module`, are read in many places.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

BatchNorm = nn.modules.batchnorm._BatchNorm
"""What every batch norm is an instance of, apex's too, which derives from no public class.

Tried on torch 2.11 and 2.14."""

NormWithStatistics = nn.modules.batchnorm._NormBase
"""What every norm that may keep running statistics is an instance of: batch and instance norms.

There is no public class above them. Tried on torch 2.11 and 2.14."""

BROADCAST_BUFFERS_DEPRECATED = "`broadcast_buffers` is deprecated"
"""How DistributedDataParallel's warning about that argument starts, a regular expression.

Its successor `forward_sync_buffers` is younger than torch 2.11, which gives no such warning; 2.14 does."""

CREATE_GRAPH_WARNING = r"Using backward\(\) with create_graph=True"
"""How torch's warning about a backward whose gradients can be derived again starts, a regular expression.

Tried on torch 2.11 and 2.14."""

NOT_DETERMINISTIC = "deterministic"
"""In the message of every operator that has no deterministic algorithm, and was asked for one.

torch raises a plain RuntimeError. Tried on torch 2.11 and 2.14."""

DATA_DEPENDENT = "data-dependent"
"""In the message of torch.export where a network's code decides by the values of tensors, in small letters.

The classes of these errors are private. Tried on torch 2.11 and 2.14."""

SPECIALIZED = "specialized it to be a constant"
"""In the message of torch.export where a network's code fixes a size that was to be free.

torch raises a UserError, whose class is private. Tried on torch 2.11 and 2.14."""

WORKER_DIED = "DataLoader worker (pid"
"""How a DataLoader's message starts when one of its worker processes died.

torch raises a plain RuntimeError. Tried on torch 2.11 and 2.14."""

DIED_SENDING = r"received \d+ items of ancdata"
"""What it may say first where a worker died as it sent a tensor, a regular expression.

The text is that of Python's multiprocessing, from 3.6 to 3.13, which torch passes on. Tried on torch 2.11 and 2.14."""


SURVIVES_FAILED_CAPTURE = torch.__version__ >= "2.14"  # a comparison of versions, not of texts
"""Whether a process can continue after the capture of a CUDA graph has failed.

torch 2.11 leaves the generator and the allocator of the GPU as if the capture continued."""


def version_of(tensor: Tensor) -> int:
    """Return how often `tensor`, or any alias that shares its counter, was written to in place.

    torch's public `torch.autograd.graph.increment_version` can only increase it. Tried on torch 2.11 and 2.14.
    """
    return tensor._version


def is_func_wrapper(tensor: Tensor) -> bool:
    """Return whether a transform of torch.func, such as `vmap` or `grad`, has wrapped `tensor`: it then has no memory.

    A wrapped tensor has the type Tensor, and no public function recognises it. Tried on torch 2.11 and 2.14.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_func_transform() -> bool:
    """Return whether a transform of torch.func runs in this thread, whatever it has wrapped.

    It refuses autograd functions that do not say how they are transformed. Tried on torch 2.11 and 2.14.
    """
    return torch._C._are_functorch_transforms_active()


def is_fx_tracing() -> bool:
    """Return whether a torch.fx tracer runs in this thread. `torch.compile` and `torch.export` do not count.

    A masked weight is not an input of the traced function, so no `torch.fx.Proxy` would show the tracer. Tried on torch
    2.11 and 2.14.
    """
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def is_replica(module: nn.Module) -> bool:
    """Return whether `module` is a replica of DataParallel's. Its parameters are plain attributes.

    torch marks replicas with a private attribute. Tried on torch 2.11 and 2.14.
    """
    return "_is_replica" in module.__dict__


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside the wrapper that `torch.compile` returns; None if `model` is not such a wrapper.

    The wrapper's class is private, and so is the name of the module inside it. Tried on torch 2.11 and 2.14.
    """
    return model._modules.get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module` was compiled: by `module.compile()`, or wrapped by `torch.compile`.

    What `compile` leaves on the module is private. Tried on torch 2.11 and 2.14.
    """
    return getattr(module, "_compiled_call_impl", None) is not None or compiled_module(module) is not None


def unsaved_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers that are not in its `state_dict`, by name. Tried on torch 2.11 and 2.14."""
    return {name: module._buffers[name] for name in module._non_persistent_buffers_set}


def has_forward_hooks(module: nn.Module, kind: type) -> bool:
    """Return whether a forward pre-hook of `module` is an instance of `kind`. Tried on torch 2.11 and 2.14."""
    return any(isinstance(hook, kind) for hook in module._forward_pre_hooks.values())


def remove_forward_hooks(module: nn.Module, kind: type) -> None:
    """Remove the forward hooks and forward pre-hooks of `module` that are instances of `kind`.

    The public way needs the handles that registration returned. A copied or unpickled module does not have them. Tried
    on torch 2.11 and 2.14.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def renew_reducer(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Let DistributedDataParallel exchange the gradients of all parameters that require one now.

    It creates its reducer when it is constructed, and again only when it is unpickled. This function does what
    unpickling does, in place and in any process group. Tried on torch 2.11 and 2.14.
    """
    group = wrapper.process_group
    wrapper._remove_autograd_hooks()
    wrapper.__setstate__(wrapper.__dict__ | {"process_group": group, "reducer": None, "logger": None})
    wrapper.process_group = group


def fsdp_calls() -> bool:
    """Return whether `fully_shard` called the function that calls this one.

    It exchanges a parameter for its shard and back by `setattr` on the module, and reads the shard by `getattr`. There
    is no public way to tell its parameters from those that a user assigns. Tried on torch 2.11 and 2.14.
    """
    return _module_of(sys._getframe(2)).startswith(_FSDP)


_FSDP = "torch.distributed.fsdp._fully_shard."


def torch_layer_reads() -> bool:
    """Return whether the package was called by torch's own code of linear layers or convolutions.

    Under autocast, that casts the weight that it reads before it does anything else with it. Tried on torch 2.11 and
    2.14.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module_of(frame).startswith("popup_surgery."):
        frame = frame.f_back
    return frame is not None and _module_of(frame) in ("torch.nn.modules.linear", "torch.nn.modules.conv")


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def of_fsdp(model: nn.Module) -> bool:
    """Return whether `fully_shard` was called with `model` or a module in it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


@contextmanager
def without_fsdp(model: nn.Module) -> Iterator[None]:
    """Context manager: the modules of `model` have their own classes and hooks, without what `fully_shard` added.

    So they can be copied, which `fully_shard` refuses. Their parameters stay in shards. Does nothing to other networks.
    Tried on torch 2.11 and 2.14.
    """
    if not of_fsdp(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    before = [(module, type(module), module.__dict__.copy()) for module in model.modules()]
    try:
        for module, cls, attributes in before:
            own_class: type[Any] = next(one for one in cls.__mro__ if not issubclass(one, FSDPModule))
            module.__class__ = own_class
            for name, value in attributes.items():
                if name.startswith("_") and ("fsdp" in name or "composable" in name):
                    del module.__dict__[name]
                elif name.endswith("hooks") and isinstance(value, dict):
                    own = [(number, hook) for number, hook in value.items() if not _of_fsdp(hook)]
                    module.__dict__[name] = type(value)(own)
        yield
    finally:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.update(attributes)


def _of_fsdp(hook: Any) -> bool:
    """Return whether `fully_shard` made a hook: a function, a method or a partial one."""
    hook = getattr(hook, "hook", hook)  # torch's wrapper of some hooks
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def storage_of(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """Return the storage of a weak reference; None if it is gone. Tried on torch 2.11 and 2.14.

    torch has a public name neither for weak references to storages nor for this.
    """
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


class ModuleMethods:
    """Mixin in front of a module's class, with methods to override what nn.Module does in private methods.

    There are public hooks for loading and saving, but they are stored on each module and pickled with it. There are
    none for casting. Tried on torch 2.11 and 2.14.
    """

    def _popup_cast(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return what `to`, `half`, `cuda` and the like apply to each tensor of this module, in place of `fn`."""
        return fn

    def _popup_load(self, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> AbstractContextManager[None]:
        """Context manager: entered while `load_state_dict` fills this module. `missing` collects the missing keys.

        What is taken out of `state_dict` counts as known to the module.
        """
        return nullcontext()

    def _popup_save(self, saved: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return what this module puts into a `state_dict`, in place of the entries `saved`."""
        return saved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        saved: dict[str, Any] = {}
        super()._save_to_state_dict(saved, prefix, keep_vars)  # type: ignore[misc]
        destination.update(self._popup_save(saved, prefix))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(self._popup_cast(fn), recurse)  # type: ignore[misc]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        with self._popup_load(state_dict, prefix, missing):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)  # type: ignore[misc]


class ParameterToBe:
    """Mixin of a tensor's class. `nn.Parameter` does not return such a tensor, but what it makes itself into.

    `nn.Parameter` marks a tensor of another type than its own with a private attribute, and returns it. Tried on torch
    2.11 and 2.14.
    """

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self._popup_become_parameter()

    def _popup_become_parameter(self) -> None:
        """Become a plain Parameter, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it becomes a Parameter")


class RecurrentWeights:
    """Mixin of masked recurrent layers. It replaces the list of weights that their forward uses, at each read.

    `nn.RNNBase` stores that list, and weak references that tell when it is outdated. Tried on torch 2.11 and 2.14.
    """

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for layer in self.all_weights for weight in layer]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        pass  # the list is made again at each read

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> nn.Module:
        return nn.Module._replicate_for_data_parallel(self)  # type: ignore[arg-type]

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state | {"_flat_weight_refs": []})  # type: ignore[arg-type]


def forget_weight_list(module: nn.Module) -> None:
    """Remove a recurrent layer's list of its weights.

    The list would keep them in memory beside the weights that are loaded later. Does nothing to other modules. Tried on
    torch 2.11 and 2.14.
    """
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def renew_weight_list(module: nn.Module) -> None:
    """Rebuild a recurrent layer's list of its weights after it was removed.

    `flatten_parameters` only reads the list. Does nothing to other modules. Tried on torch 2.11 and 2.14.
    """
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
