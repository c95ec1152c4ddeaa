"""The recipe section `training.density_penalty`."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo

from ..errors import PopupError
from ..learners import LEARNERS, get_learner
from ..masking.settings import DEFAULT, with_learner
from .sections import STRICT


class DensityPenalty(BaseModel):
    """A penalty on the share of weights that take part, for learners without k: see `masking.density`.

    Attributes:
        weight: the loss gains this times the share of kept weights above the target.
        target: the share of all masked weights at which the penalty ends.
    """

    model_config = STRICT

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0


def for_the_learner(value: Any, info: ValidationInfo) -> Any:
    """Check that the learner takes no k if there is a penalty. `info.context` has the recipe's plain values."""
    surgery = (info.context or {}).get("surgery")
    if value is None:
        return value
    if surgery == "none":
        raise ValueError("expected null; with surgery: none there are no masks")
    if not isinstance(surgery, dict):
        return value
    learner = with_learner(surgery).get("learner", DEFAULT.learner.value)
    try:
        takes_k = get_learner(learner, surgery.get("learner_options")).takes_k
    except PopupError:
        return value  # as the checks of these two keys say
    if takes_k:
        others = " or ".join(name for name, other in LEARNERS.items() if not other.takes_k)
        raise ValueError(f"expected null; {learner} keeps the share surgery.k, and a penalty needs {others}")
    return value


Penalty = Annotated[DensityPenalty | None, BeforeValidator(for_the_learner)]
