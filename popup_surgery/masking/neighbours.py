"""The pattern of a weight: which of its elements are neighbours, for `pattern="2:4"`."""

from ..errors import ConversionError
from ..models.layer_types import Fans
from ..selection.pattern import Pattern, parse_pattern


def pattern_of(key: str, numel: int, fans: Fans, text: str | None) -> Pattern | None:
    """Return the pattern of a weight of `numel` elements; None if the settings have none.

    Args:
        key: what a message calls the weight.
        fans: of the weight, from its type of layer.
        text: the setting, such as `2:4`.

    Raises:
        ConversionError: its type of layer does not say which elements are neighbours.
    """
    if text is None:
        return None
    if fans.channels is not None:
        found = Pattern(*parse_pattern(text), fans.channels, fans.stride)
        if found.fits(numel):
            return found
    raise ConversionError(
        f"pattern is {text!r}, and the type of the layer of {key} does not say which elements are neighbours, as "
        "channels and stride of Fans; leave the layer out with exclude"
    )
