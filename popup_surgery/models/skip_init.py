"""Build a network without its random initialisation: it takes most of the time, and conversion overwrites it."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM = {
    nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_,
    Tensor.geometric_, Tensor.log_normal_, Tensor.normal_, Tensor.random_, Tensor.uniform_,
}  # fmt: skip
_ADJUST = {Tensor.add_, Tensor.clamp_, Tensor.div_, Tensor.erfinv_, Tensor.mul_, Tensor.sub_}
_SET = {nn.init.constant_, Tensor.fill_, Tensor.zero_}


class Blank(TorchFunctionMode):
    """Context manager: parameters are not filled with random numbers. Their memory is reserved and not touched.

    Everything else is built as usual: buffers, including those that are not in the `state_dict`, constants, and random
    tensors outside the memory of parameters. Afterwards `is_blank` tells which parameters have no values. On the meta
    device nothing is filled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parameters: dict[int, Tensor] = {}  # by address; references keep an address from being reused
        self._blank: set[int] = set()

    def is_blank(self, parameter: Tensor) -> bool:
        """Return whether `parameter` was left without the random values that it should have."""
        return parameter.untyped_storage().data_ptr() in self._blank

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip random fills of parameters, and remember which parameters are blank."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, Tensor) and tensor.is_meta and func in _RANDOM | _ADJUST | _SET:
            return tensor  # there is nothing to write to, and torch takes time to find that out
        if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()):
            if isinstance(tensor, nn.Parameter):
                self._parameters.setdefault(address, tensor)
            if address in self._parameters:
                if func in _RANDOM or (func in _ADJUST and address in self._blank):
                    self._blank.add(address)
                    return tensor
                if func in _SET and tensor.numel() == self._parameters[address].numel():
                    self._blank.discard(address)
        return func(*args, **kwargs)
