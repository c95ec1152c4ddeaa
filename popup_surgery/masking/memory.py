"""Which tensors share memory although they are different ones, such as `encoder.weight` and `encoder.weight.t()`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.exceptions import TooHardError
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

EFFORT = 100_000  # of the exact comparison, after which two tensors count as overlapping


class _Extent(NamedTuple):
    """The bytes from a tensor's first element to its last."""

    space: Any  # where addresses are comparable: a device; on the meta device a storage
    start: int
    end: int
    place: int


def overlapping(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the indices of each two tensors that share an element, whatever their shapes, strides and storages.

    Their values are not read, so they may be on any device. Tensors without memory of their own are passed over.
    """
    extents = sorted((_extent(tensor, i) for i, tensor in enumerate(tensors) if _has_memory(tensor)), key=_order)
    open_: list[_Extent] = []
    for extent in extents:
        open_ = [other for other in open_ if other.space == extent.space and other.end > extent.start]
        for other in open_:
            one, two = sorted((other, extent), key=lambda each: each.place)
            if _share(tensors[one.place], one.start, tensors[two.place], two.start):
                yield one.place, two.place
        open_.append(extent)


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether some elements of `tensor` may be one element in memory, as those of an expanded tensor are."""
    reach: Any = 0  # of the dimensions with smaller strides
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _order(extent: _Extent) -> tuple[str, int]:
    return str(extent.space), extent.start


def _has_memory(tensor: Tensor) -> bool:
    """Return whether the addresses of the elements are known: not so for the wrappers of fake and distributed ones."""
    try:
        return tensor.numel() > 0 and (tensor.is_meta or tensor.data_ptr() != 0)
    except (RuntimeError, NotImplementedError):
        return False


def _extent(tensor: Tensor, index: int) -> _Extent:
    space: Any = tensor.device
    start: Any = tensor.data_ptr()
    if tensor.is_meta:
        space = StorageWeakRef(tensor.untyped_storage()).cdata
        start = tensor.element_size() * (1 + tensor.storage_offset())
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Extent(space, start, start + reach * tensor.element_size(), index)


def _share(one: Tensor, start: int, other: Tensor, start_of_other: int) -> bool:
    try:
        return np.shares_memory(_addresses(one, start), _addresses(other, start_of_other), EFFORT)  # type: ignore[arg-type]
    except TooHardError:
        return True


def _addresses(tensor: Tensor, start: int) -> np.ndarray:
    """Return an array at the tensor's addresses. Nothing may read it."""

    class At:
        __array_interface__ = {  # noqa: RUF012
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "typestr": f"|V{tensor.element_size()}",
            "data": (start, True),
        }

    return np.asarray(At())
