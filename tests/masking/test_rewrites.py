"""What cannot be drawn again or recycled, and how it is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import popup_surgery as ps
from popup_surgery import ConversionError

Verb = Callable[..., int]
both = pytest.mark.parametrize(("verb", "done"), [(ps.redraw, "drawn again"), (ps.recycle, "recycled")])


def conv2(**settings: Any) -> nn.Module:
    net = ps.build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8)
    return ps.convert(net, **{"k": 0.3, "scheme": "kaiming_normal", **settings})


@both
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learner": "random"}, "weights cannot be {}: the learner random never changes its masks, so that another "),
        ({"learner": "dnw"}, "weights cannot be {}: the learner dnw trains the weights themselves"),
        ({"learner": "biprop"}, "the learner biprop gives the weights of a layer one magnitude"),
        ({"learner": "supermask", "k": None, "scaled": False}, "the learner supermask samples the weights that take"),
        ({"scheme": "pretrained"}, r"'features\.0\.weight' cannot be {}: its scheme pretrained has no seed"),
        (
            {"scheme": {"*": "kaiming_normal", "classifier.1": "unsigned_kaiming_constant"}},
            r"'classifier\.1\.weight' cannot be {}: its scheme unsigned_kaiming_constant gives all weights the same",
        ),
    ],
)
def test_networks_that_are_refused(settings: dict[str, Any], says: str, verb: Verb, done: str) -> None:
    net = conv2(**settings)
    with pytest.raises(ConversionError, match=says.format(done)) as caught:
        verb(net, 1)
    assert "\n" not in str(caught.value)
    assert not [name for name in net.state_dict() if name.endswith(("_generation", "_source"))]


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        (ps.redraw, {"every": 0}, "every is 0; expected the steps between two redraws, an integer from 1"),
        (ps.recycle, {"every": 0}, "every is 0; expected the steps between two recyclings, an integer from 1"),
        (ps.recycle, {"share": 0.6}, "share is 0.6; expected a share of a layer's weights above 0 and up to 0.5"),
        (ps.redraw, {"every": 2.5, "share": 0}, "every is 2.5; .*; and share is 0; expected a probability above 0 and"),
        (ps.recycle, {"every": 2.5, "share": 0}, "every is 2.5; .*; and share is 0; expected a share of a layer's"),
        (ps.redraw, {"step": -1}, "step is -1; expected the number of steps made, an integer from 0"),
        (ps.recycle, {"step": -1}, "step is -1; expected the number of steps made, an integer from 0"),
    ],
)
def test_arguments_that_are_refused(verb: Verb, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        verb(conv2(), **{"step": 1, **arguments})


@both
def test_a_plain_network_is_refused(verb: Verb, done: str) -> None:
    with pytest.raises(ConversionError, match="Linear has no masks; convert it first"):
        verb(nn.Linear(3, 2), 1)
