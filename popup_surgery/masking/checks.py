"""What can be found out about a parameter before a plan is carried out: whether it can be written to and trained."""

from torch import Tensor, nn

from ..errors import ConversionError
from ..weights.source import source_of
from .memory import overlapping, overlaps_itself
from .plan import Plan, PlannedRest
from .ranking import score_name
from .walk import Place, places_of


def check_mode(key: str, tensor: Tensor) -> None:
    """Raise `ConversionError` for a tensor that can neither be written to nor get a gradient."""
    if tensor.is_inference():
        raise ConversionError(f"{key} was made under torch.inference_mode; build the network outside it")


def check_writable(key: str, tensor: Tensor) -> None:
    """Raise `ConversionError` unless the values of `tensor` can be replaced."""
    check_mode(key, tensor)
    if overlaps_itself(tensor):
        raise ConversionError(f"{key} is an expanded tensor, whose elements share memory; make it contiguous first")


def check_score_name(place: Place) -> None:
    """Raise `ConversionError` if a weight's module uses the name of the weight's score for something else."""
    if hasattr(place.module, score_name(place.name)):
        raise ConversionError(f"{score_name(place.key)} exists already; the score of {place.key} needs that name")


def check_rest(planned: PlannedRest, tensor: Tensor) -> None:
    """Raise `ConversionError` unless the plan for an unmasked parameter can be carried out."""
    if planned.treatment.action != "left" and not planned.done:
        check_writable(planned.key, tensor)
    elif planned.train:
        check_mode(planned.key, tensor)


def check_memory(core: nn.Module, planned: Plan) -> None:
    """Raise `ConversionError` if conversion or training would change a tensor by writing to another one."""
    written = {weight.key for weight in planned.masked if not source_of(weight.distribution).in_base}
    written |= {o.key for o in planned.rest if o.train or (o.treatment.action != "left" and not o.done)}
    tensors = {place.key: place.tensor for place in places_of(core)} | dict(core.named_buffers())
    named = list({id(tensor): (key, tensor) for key, tensor in reversed(tensors.items())}.values())
    for one, other in overlapping([tensor for _, tensor in named]):
        pair = {named[one][0], named[other][0]}
        if keys := sorted(pair & written):
            (changed,) = pair - {keys[0]}
            raise ConversionError(
                f"{keys[0]} shares memory with {changed} and is not the same Parameter, so writing to one would change "
                "the other; give both the same Parameter, or give one a copy of its own with clone()"
            )
