"""Build a network without its random initialisation, which takes most of the time and which conversion overwrites."""

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
    """While it is entered, parameters are not filled at random: their memory is reserved and never touched.

    All else is built as ever: buffers, also those that no `state_dict` holds, constants, and random tensors that are
    no parameters' own memory. `is_blank` tells afterwards what has no value. On the meta device nothing is filled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parameters: dict[int, Tensor] = {}  # by address, held so that no address serves twice
        self._blank: set[int] = set()

    def is_blank(self, parameter: Tensor) -> bool:
        """Whether `parameter` was to be filled at random, and was not."""
        return parameter.untyped_storage().data_ptr() in self._blank

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, Tensor) and tensor.is_meta and func in _RANDOM | _ADJUST | _SET:
            return tensor  # there is nothing to write to, and finding that out takes its time
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
