"""The recipe section `training.density_penalty`."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo

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
    learner = with_learner(surgery).get("learner", DEFAULT.learner.value) if isinstance(surgery, dict) else None
    if isinstance(learner, str) and learner in LEARNERS and get_learner(learner).takes_k:
        others = " or ".join(name for name, other in LEARNERS.items() if not other.takes_k)
        raise ValueError(f"expected null; {learner} keeps the share surgery.k, and a penalty needs {others}")
    return value


Penalty = Annotated[DensityPenalty | None, BeforeValidator(for_the_learner)]
