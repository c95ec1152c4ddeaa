"""The section `model` of a recipe."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, model_validator

from ..errors import ConversionError, UnknownName
from ..models.libraries import resolve, resolve_with_tag
from ..models.pretrained import with_tag
from .checks import commit, known, recordable
from .keys import Key
from .sections import STRICT


class Model(BaseModel):
    """The network: a name that `build` knows, its arguments, and its weights.

    Attributes:
        name: the network, such as `timm/resnet50`, `torchvision/resnet18` or `popup_surgery/conv4`. The tag in
            `timm/resnet50.a1_in1k` is read as `pretrained`.
        kwargs: its arguments, such as `{num_classes: 10}`.
        pretrained: as for `build`: false for random weights, true for the library's default weights, a tag, or a file
            of weights.
        init_from: a popup artifact to start from, as a file or an address on the Hub such as `hf://user/repo`. The run
            takes its seed, and scores that begin with its mask. With `surgery: none`, it takes the weights and trains
            those that take part.
        init_commit: the commit that an address in `init_from` stands for. A run fills it in when it begins, so that it
            resumes with the same file, whatever is pushed to the Hub meanwhile.
    """

    model_config = STRICT

    name: Annotated[str, known(resolve), Field(examples=["timm/resnet18"])]
    pretrained: bool | str = False
    init_from: str | None = None
    init_commit: Annotated[str | None, AfterValidator(commit), Key(affects_result=False)] = None
    kwargs: Annotated[dict[str, Any], AfterValidator(recordable), Field(examples=[{"num_classes": 10}])] = {}

    @model_validator(mode="before")
    @classmethod
    def _tag(cls, values: Any) -> Any:
        """Move the tag of pretrained weights in the name to `pretrained`."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        try:
            library, name, tag = resolve_with_tag(values["name"])
            if not tag:
                return values
            weights = with_tag(values["name"], tag, values.get("pretrained"))
            return {**values, "name": f"{library}/{name}", "pretrained": weights}
        except ConversionError as error:
            raise ValueError(str(error)) from None
        except UnknownName:
            return values  # as the check of the name says
