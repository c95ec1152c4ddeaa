"""The tensor type that reading a masked weight returns."""

from typing import Any

from torch import Tensor, nn

from ..errors import MaskedWeightError


class MaskedWeight(Tensor):
    """The tensor that reading a masked weight returns. For functions it is a plain one; `.data` hides no write."""

    __torch_function__ = nn.Parameter.__torch_function__  # no function sees a Parameter as a type of its own either

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if self.requires_grad:
            raise RuntimeError("a masked weight that has a gradient cannot be copied; detach it first")
        return self.detach().clone()

    @property
    def data(self) -> Tensor:
        return self.detach()  # shares the version counter; `data` of a plain tensor does not

    @data.setter
    def data(self, value: Tensor) -> None:
        raise MaskedWeightError(
            f"the data of a masked weight of shape {tuple(self.shape)} was assigned, and would be lost: it is "
            "computed again from its scores at each read; change the scores, or bake(model) first"
        )
