"""A write to a masked weight, in whatever idiom: found at the next read, or refused at once, and said once."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from masking.layers import LAYERS, K, layers_of, make, raw, right, sequential
from popup_surgery import MaskedWeightError, bake, convert, masks
from support import slow_except

LOST = r"was written to in place, and the write is lost.*change weight(_hh_l0)?_score"
NEW = torch.linspace(1, 2, 30).view(5, 6)


def fused(layer: Any) -> None:
    weight = layer.weight
    torch._foreach_add_([weight], 1.0)


def optimise(layer: Any, **options: Any) -> None:
    """A step of an optimiser on the tensor that was read."""
    with torch.inference_mode(False), torch.enable_grad():
        held = layer.weight.detach().requires_grad_()
        F.linear(torch.ones(2, 6), held).sum().backward()
    torch.optim.SGD([held], lr=0.1, **options).step()


def of_the_read(layer: Any, write: Callable[[Tensor], Any]) -> None:
    write(layer.weight)


def through_a_loop(layer: Any) -> None:
    for row in layer.weight.detach():
        row.clamp_(-0.01, 0.01)


def in_inference(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def in_inference_by_view(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight[1].fill_(3.0)


def in_inference_by_data(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.data.fill_(3.0)


def read_in_inference_written_outside(layer: Any) -> None:
    with torch.inference_mode():
        held = layer.weight
    held.add_(1)


def by_numbers_of_numpy(layer: Any) -> None:
    layer.weight.copy_(torch.from_numpy(np.zeros((5, 6))))


FOUND: dict[str, Callable[[Any], Any]] = {
    # in-place methods
    "add_": lambda layer: layer.weight.add_(1),
    "copy_": lambda layer: layer.weight.copy_(NEW),
    "copy_ of its own values": lambda layer: layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.5)),
    "copy_ of numbers by NumPy": by_numbers_of_numpy,
    "div_ by its own norm": lambda layer: layer.weight.div_(layer.weight.norm(dim=1, keepdim=True)),
    "clamp_": lambda layer: layer.weight.clamp_(-0.01, 0.01),
    "masked_fill_": lambda layer: layer.weight.masked_fill_(layer.weight > 0, 0.0),
    "index_put_": lambda layer: layer.weight.index_put_((torch.tensor([1]),), torch.tensor(5.0)),
    "index_copy_": lambda layer: layer.weight.index_copy_(0, torch.tensor([1]), NEW[:1]),
    "scatter_": lambda layer: layer.weight.scatter_(0, torch.zeros(1, 6, dtype=torch.long), NEW[:1]),
    "zero_": lambda layer: layer.weight.zero_(),
    "normal_": lambda layer: layer.weight.normal_(),
    "addmm_": lambda layer: layer.weight.addmm_(torch.ones(5, 1), torch.ones(1, 6)),
    "nan_to_num_": lambda layer: torch.nan_to_num_(layer.weight, 0.0),
    "set_": lambda layer: layer.weight.detach().set_(NEW.clone()),
    "resize_": lambda layer: layer.weight.detach().resize_(3, 3),
    # index assignment
    "[0] =": lambda layer: layer.weight.__setitem__(0, 7.0),
    "[mask] =": lambda layer: layer.weight.__setitem__(layer.weight > 0, 7.0),
    "[..., 1:3] +=": lambda layer: layer.weight[..., 1:3].add_(1),
    # out=
    "out=": lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
    "normalize(out=)": lambda layer: F.normalize(layer.weight, out=layer.weight),
    "clamp(out=)": lambda layer: torch.clamp(layer.weight, 0, 1, out=layer.weight),
    # data and detach
    "data.copy_": lambda layer: layer.weight.data.copy_(NEW),
    "data[0] =": lambda layer: layer.weight.data.__setitem__(0, 7.0),
    "data.data.mul_": lambda layer: layer.weight.data.data.mul_(2),
    "detach().mul_": lambda layer: layer.weight.detach().mul_(2),
    "detach().data.mul_": lambda layer: layer.weight.detach().data.mul_(2),
    "[0].data.zero_": lambda layer: layer.weight[0].data.zero_(),
    "view(-1).data.zero_": lambda layer: layer.weight.view(-1).data.zero_(),
    "flatten().data.zero_": lambda layer: layer.weight.flatten().data.zero_(),
    "t().data.zero_": lambda layer: layer.weight.t().data.zero_(),
    "T.data.zero_": lambda layer: layer.weight.T.data.zero_(),
    "mT.data.zero_": lambda layer: layer.weight.mT.data.zero_(),
    "chunk(2)[0].data.zero_": lambda layer: layer.weight.chunk(2)[0].data.zero_(),
    "unbind()[0].data.zero_": lambda layer: layer.weight.unbind()[0].data.zero_(),
    "narrow().data.zero_": lambda layer: layer.weight.narrow(0, 0, 2).data.zero_(),
    "detach().t()[0].data.fill_": lambda layer: layer.weight.detach().t()[0].data.fill_(3.0),
    # views
    "view": lambda layer: layer.weight.view(-1)[3:5].fill_(3.0),
    "t()": lambda layer: layer.weight.t().mul_(2),
    "transpose()": lambda layer: torch.transpose(layer.weight, 0, 1).mul_(2),
    "flatten": lambda layer: torch.flatten(layer.weight).mul_(2),
    "diagonal": lambda layer: layer.weight.diagonal().fill_(1.0),
    "fill_diagonal_": lambda layer: layer.weight.fill_diagonal_(1.0),
    "as_strided": lambda layer: layer.weight.as_strided((2,), (1,)).fill_(1.0),
    "rows": through_a_loop,
    # functions
    "_foreach_": fused,
    "_foreach_copy_": lambda layer: torch._foreach_copy_([layer.weight], [NEW]),
    "relu(inplace)": lambda layer: F.relu(layer.weight, inplace=True),
    "dropout(inplace)": lambda layer: F.dropout(layer.weight, 0.5, True, True),
    "embedding(max_norm)": lambda layer: F.embedding(torch.tensor([1]), layer.weight, max_norm=0.01),
    "clip_grad_by value": lambda layer: torch.clamp_(layer.weight, -0.01, 0.01),
    "nn.init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "nn.init.xavier_uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "nn.init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "nn.init.eye_": lambda layer: nn.init.eye_(layer.weight),
    "nn.init.sparse_": lambda layer: nn.init.sparse_(layer.weight, 0.5),
    "SGD": optimise,
    "SGD(foreach)": lambda layer: optimise(layer, foreach=True),
    # inference mode
    "inference": in_inference,
    "inference view": in_inference_by_view,
    "inference data": in_inference_by_data,
    "inference read": read_in_inference_written_outside,
}


@pytest.mark.parametrize("mode", slow_except(["grad", "no_grad", "inference_mode"], ["grad"]))
@pytest.mark.parametrize("idiom", FOUND)
def test_a_write_is_found_at_the_next_read_however_many_lie_between(idiom: str, mode: str) -> None:
    """Other reads lie between the read that gave the tensor and the write, so that it is to none of the latest."""
    layer, x = make("Linear")
    before = layer.weight.detach().clone()
    weights, score = raw(layer).clone(), layer.weight_score.detach().clone()

    class Between:
        """The layer as the code that writes sees it: each of its reads is followed by others."""

        reads = 0

        @property
        def weight(self) -> Tensor:
            found = layer.weight
            for _ in range(self.reads):
                assert layer.weight.shape == (5, 6)
            return found

    if mode == "grad" and "out=" in idiom:
        mode = "no_grad"  # torch's own rule
    context: Any = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    for reads in (0, 3):
        seen: Any = Between()
        seen.reads = reads
        with context():
            FOUND[idiom](seen)
        with pytest.raises(MaskedWeightError, match=LOST):
            layer(x)
        assert torch.equal(layer.weight, before), "said once, and nothing came of the write"
    assert torch.equal(raw(layer), weights)
    assert torch.equal(layer.weight_score, score)


def set_data(layer: Any) -> None:
    layer.weight.data = NEW


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_data_of_a_view(layer: Any) -> None:
    layer.weight[0].data = NEW[0]


def assign(layer: Any) -> None:
    layer.weight = nn.Parameter(NEW)


def add_to_weight(layer: Any) -> None:
    layer.weight += 1


def to_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[...] = 5


def to_an_array(layer: Any) -> None:
    np.asarray(layer.weight.detach())[0] = 5


def to_numpy_by_data(layer: Any) -> None:
    layer.weight.data.t().numpy().fill(5)


def copy_by_numpy(layer: Any) -> None:
    np.copyto(layer.weight.detach().view(-1).numpy(), 5)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "data =": set_data,
    "data +=": add_to_data,  # as PEFT merges
    "[0].data =": set_data_of_a_view,
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(NEW.view(-1), [layer.weight]),
    "weight =": assign,
    "weight +=": add_to_weight,
    "setattr": lambda layer: setattr(layer, "weight", NEW),
    "del": lambda layer: delattr(layer, "weight"),
    "numpy": to_numpy,
    "asarray": to_an_array,
    "data numpy": to_numpy_by_data,
    "copyto": copy_by_numpy,
    # torch's own tools, which put something else in the weight's place
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "parametrizations.orthogonal": nn.utils.parametrizations.orthogonal,
    "register_parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "prune.identity": lambda layer: prune.identity(layer, "weight"),
    "prune.l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune.random_unstructured": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "prune.ln_structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "prune.custom_from_mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(5, 6)),
    "prune.global_unstructured": lambda layer: prune.global_unstructured(
        [(layer, "weight")], prune.L1Unstructured, amount=0.5
    ),
    "fastai's WeightDropout": lambda layer: layer._parameters.pop("weight"),
    "del _parameters": lambda layer: layer._parameters.__delitem__("weight"),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(NEW)),
}


def everything(layer: nn.Module) -> dict[str, Any]:
    """All that a layer holds, with what is in its dictionaries."""
    held = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(layer).items()}
    held.pop("_popup_state")
    tensors = {key: tensor.detach().clone() for key, tensor in layer.state_dict().items()}
    return {"class": type(layer), "held": str(held), "tensors": str(tensors), "keys": list(layer._parameters)}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("learner", ["edge_popup", "random"])
@pytest.mark.parametrize("idiom", REFUSED)
def test_what_would_take_the_weights_place_is_refused_once_with_the_layer_as_it_was(idiom: str, learner: str) -> None:
    layer, x = make("Linear", learner)
    out, before = layer(x), everything(layer)
    expected = ValueError if "numpy" in idiom or idiom in ("asarray", "copyto") else MaskedWeightError
    with torch.no_grad(), pytest.raises(expected) as caught:
        REFUSED[idiom](layer)
    assert "\n" not in str(caught.value)
    assert everything(layer) == before
    assert torch.equal(layer(x), out), "one error for one mistake"
    assert torch.equal(bake(layer)(x), out)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("tool", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize(
    ("net", "name"),
    [
        (lambda: nn.LSTM(4, 3), "weight_hh_l0"),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (lambda: nn.Conv2d(3, 4, 3), "weight"),
    ],
)
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_tools_are_refused_by_every_kind_of_layer_and_by_copies(
    tool: Callable[..., Any], net: Callable[[], nn.Module], name: str, copied: Any
) -> None:
    layer = convert(net(), K)
    layer = copied(layer) if copied else layer
    before = everything(layer)
    with pytest.raises(MaskedWeightError):
        tool(layer, name)
    assert everything(layer) == before
    assert type(layer._parameters.copy()) is dict
    tool(bake(layer), name)


class Renormed(nn.Linear):
    """A layer that bounds its weight in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
        return F.linear(x, self.weight, self.bias)


class RenormedAtTheEnd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
        return out


class RenormedByData(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [Renormed, RenormedByData])
def test_a_write_in_a_layers_own_forward_is_found_in_it(kind: type[nn.Linear], mode: Any) -> None:
    net = convert(nn.Sequential(nn.Linear(3, 6), kind(6, 5)), K)
    with mode(), pytest.raises(MaskedWeightError):
        net(torch.randn(2, 3))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_write_after_the_last_read_of_a_forward_is_found_in_the_next(mode: Any) -> None:
    net = convert(nn.Sequential(nn.Linear(3, 6), RenormedAtTheEnd(6, 5)), K)
    with mode():
        net(torch.randn(2, 3))
    with pytest.raises(MaskedWeightError, match=r"'1\.weight' was written to"):
        net(torch.randn(2, 3))


def test_a_write_is_found_in_a_layer_whose_bias_is_parametrised() -> None:
    layer, x = make("Linear")
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    out = layer(x)
    layer.weight.data.copy_(torch.renorm(layer.weight, 2, 0, 0.5))
    with pytest.raises(MaskedWeightError, match=LOST):
        layer(x)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0"])
def test_a_write_to_a_recurrent_weight_is_found(name: str) -> None:
    layer: Any = convert(nn.LSTM(4, 3), K)
    with torch.no_grad():
        getattr(layer, name).copy_(torch.renorm(getattr(layer, name), 2, 0, 0.5))
    with pytest.raises(MaskedWeightError, match=f"'{name}' was written to in place"):
        layer(torch.randn(2, 1, 4))


def test_an_earlier_write_is_found_however_many_tensors_live() -> None:
    layer, x = make("Linear")
    held = [layer.weight for _ in range(5)]
    layer(x)
    held[1].data.zero_()
    layer_of_another, _ = make("Linear")
    layer_of_another(x)
    with pytest.raises(MaskedWeightError, match=LOST):
        layer(x)
    held[3].data.zero_()
    held.clear()
    with pytest.raises(MaskedWeightError, match=LOST):
        layer(x)
    layer(x)


def test_nothing_is_kept_of_tensors_that_are_gone() -> None:
    layer, x = make("Linear")
    slot = layer._popup_state.masked["weight"]
    for _ in range(20):
        layer(x).sum().backward()
    assert len(slot._watches) <= 2
    held = [layer.weight for _ in range(20)]
    assert len(slot._watches) >= 20
    del held
    layer(x)
    assert len(slot._watches) <= 2


# what is no write


def test_reading_is_no_write() -> None:
    layer, x = make("Linear")
    weight = layer.weight
    for read in (
        lambda: weight.detach().numpy().sum(), lambda: weight.detach().numpy() + 1, lambda: weight.tolist(),
        lambda: torch.renorm(weight, 2, 0, 0.5), lambda: weight.clone().zero_(), lambda: weight.half().zero_(),
        lambda: weight.double().data.zero_(), lambda: copy.deepcopy(weight.detach()).zero_(),
        lambda: pickle.loads(pickle.dumps(weight.detach())).zero_(), lambda: weight[:, [0, 2]].data.zero_(),
        lambda: weight.t().reshape(-1).data.zero_(), lambda: torch.from_numpy(weight.detach().numpy().copy()).zero_(),
        lambda: weight.sum().backward(), lambda: [row.norm() for row in weight], lambda: weight.T @ weight,
    ):  # fmt: skip
        read()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.weight, right(layer))


def test_a_parameter_made_of_it_is_a_plain_one_whose_training_is_its_own() -> None:
    layer, x = make("Linear")
    for make_one in (
        lambda: nn.Parameter(layer.weight), lambda: nn.Parameter(layer.weight.detach()),
        lambda: nn.Parameter(layer.weight.data), lambda: nn.Parameter(layer.weight[1:].detach(), requires_grad=False),
        lambda: nn.Parameter(layer.weight.detach().clone()),
    ):  # fmt: skip
        found = make_one()
        assert type(found) is nn.Parameter
        assert found.is_leaf
        assert torch.equal(found, right(layer)[-len(found) :])
        assert type(copy.deepcopy(found)) is type(pickle.loads(pickle.dumps(found))) is nn.Parameter
        plain: Any = nn.Linear(6, len(found), bias=False)
        plain.weight = found
        before = layer(x)
        found.requires_grad_()
        plain(x).sum().backward()
        torch.optim.SGD([found], lr=0.1).step()
        plain.weight.data.mul_(2)
        assert torch.equal(layer(x), before)
        assert torch.equal(layer.weight, right(layer))


def test_a_network_that_loads_and_moves_reports_no_write() -> None:
    net, x = convert(sequential(), K), torch.randn(2, 3, 6, 6)
    held = [layer.weight for layer in layers_of(net)]
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    net.double().float()
    net.load_state_dict(state, assign=True)
    net(x).sum().backward()
    assert all(torch.equal(mask, weight != 0) for mask, weight in zip(masks(net).values(), held, strict=True))
    assert net(x).shape == (2, 5)


def test_every_layer_of_every_kind_is_watched() -> None:
    for kind in LAYERS:
        layer, x = make(kind)
        with torch.no_grad():
            layer.weight.copy_(layer.weight * 2)
        with pytest.raises(MaskedWeightError, match=LOST):
            layer(x)
