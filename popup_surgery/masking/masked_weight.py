"""The tensor type that reading a masked weight returns, and the watch that finds writes to it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import MaskedWeightError
from ..torch_compat import ParameterToBe, storage_of, version_of


class Watch:
    """Finds in-place writes to a tensor and to all aliases that share its version counter. It keeps no memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._witness = tensor.detach()  # shares the counter, and gives up the memory
        self._witness.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._seen = version_of(self._witness)
        self.differentiable = tensor.requires_grad

    def written(self) -> bool:
        """Return whether there was a write since the start, or since `reset`."""
        return version_of(self._witness) != self._seen

    def over(self) -> bool:
        """Return whether the last alias is gone, so that nothing can be written any more."""
        return self._storage.expired()

    def reset(self) -> None:
        """Forget the writes so far, which were reported."""
        self._seen = version_of(self._witness)

    def free(self) -> None:
        """Give up the values of the tensor and of its aliases, until `restore`."""
        storage = storage_of(self._storage)
        if storage is not None:
            storage.resize_(0)

    def freed(self) -> bool:
        """Return whether aliases are left whose values were given up."""
        storage = storage_of(self._storage)
        return storage is not None and storage.size() == 0

    def restore(self, tensor: Tensor) -> None:
        """Give the tensor and its aliases their values again: those of `tensor`, of the same strides."""
        storage, values = storage_of(self._storage), tensor.to(self._witness.dtype).untyped_storage()
        if storage is not None:
            storage.resize_(values.size())
            storage.copy_(values)


class MaskedWeight(ParameterToBe, Tensor):
    """The tensor that reading a masked weight returns. For functions it is a plain one.

    Its methods that return a view return this type too. `data` of it hides no write, as `data` of a plain tensor does,
    and its NumPy arrays are read-only. `nn.Parameter` makes a plain Parameter of it, whose writes are its own.
    """

    __torch_function__ = nn.Parameter.__torch_function__  # no function sees a Parameter as a type of its own either
    _popup_watch: Watch | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).clone().__reduce_ex__(protocol)  # its memory may be a part of more

    def __deepcopy__(self, memo: Any) -> Tensor:
        if self.requires_grad and not self.is_leaf:
            raise RuntimeError("a masked weight that has a gradient cannot be copied; detach it first")
        return self.detach().as_subclass(Tensor).clone().requires_grad_(self.requires_grad)

    def numpy(self, *args: Any, **kwargs: Any) -> NDArray[Any]:
        array = self.as_subclass(Tensor).numpy(*args, **kwargs)
        array.flags.writeable = False  # no counter would count the write
        return array

    @property
    def data(self) -> Tensor:
        return self.detach()  # shares the version counter; `data` of a plain tensor does not

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._popup_watch is not None:
            self._popup_watch.reset()  # `weight.data += 1` writes before it assigns: one mistake, one error
        raise MaskedWeightError(
            f"the data of a masked weight of shape {tuple(self.shape)} was assigned, and would be lost: it is "
            "computed again from its scores at each read; change the scores, or bake(model) first"
        )

    def _popup_become_parameter(self) -> None:
        """Become a plain Parameter, with a counter of its own."""
        plain = self.detach().as_subclass(Tensor).data
        torch.utils.swap_tensors(self, nn.Parameter(plain, self.requires_grad))


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of the same memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def watched(tensor: Tensor, watch: Watch) -> MaskedWeight:
    """Return `tensor`, or an alias of it, as a `MaskedWeight` whose writes `watch` finds."""
    found = tensor.as_subclass(MaskedWeight)
    found._popup_watch = watch
    return found


_VIEWS = (
    "__getitem__", "adjoint", "as_strided", "broadcast_to", "chunk", "detach", "diagonal", "dsplit", "expand",
    "expand_as", "flatten", "hsplit", "moveaxis", "movedim", "narrow", "permute", "ravel", "reshape", "reshape_as",
    "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "transpose",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit",
)  # fmt: skip


def _with_views(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        if isinstance(found, tuple | list):
            return type(found)(_of(self, each) for each in found)
        return _of(self, found)

    return call


def _of(weight: MaskedWeight, found: Any) -> Any:
    """Return what a method of `weight` returned, as a `MaskedWeight` if it is a view."""
    watch = weight._popup_watch
    if watch is None or type(found) is not Tensor or not same_memory(found, weight):
        return found
    return watched(found, watch)


for _name in _VIEWS:
    setattr(MaskedWeight, _name, _with_views(getattr(Tensor, _name)))
for _name in ("T", "mT", "H", "mH", "real"):
    setattr(MaskedWeight, _name, property(_with_views(getattr(Tensor, _name).__get__)))
