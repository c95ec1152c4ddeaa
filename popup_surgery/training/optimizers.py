"""timm's optimisers: made as a recipe says, and tried before the first step."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config.schema import Training
from ..data.seeding import ambient_seed, seed_generators
from ..errors import RunError
from ..torch_compat import CREATE_GRAPH_WARNING
from .checkpoint import pack, unpack


def optimizer_of(parameters: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return timm's optimiser for a recipe's settings.

    Raises:
        RunError: it does not take them, or needs what is not there.
    """
    from timm.optim import create_optimizer_v2

    options = training.optimizer_kwargs.copy()
    if training.optimizer in ("sgd", "momentum"):
        options["nesterov"] = training.nesterov
    try:
        return create_optimizer_v2(
            list(parameters) or [nn.Parameter(torch.empty(0))], training.optimizer, training.lr,
            training.weight_decay, training.momentum, **options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RunError(
            f"training.optimizer {training.optimizer} does not take training.optimizer_kwargs "
            f"{training.optimizer_kwargs}: {error}"
        ) from error
    except Exception as error:  # an optimiser of another package, or one that needs a GPU
        raise _unfit(training, error) from error


def try_optimizer(parameters: Sequence[nn.Parameter], training: Training, accelerator: Accelerator) -> None:
    """Make two steps on small tensors with as many dimensions as `parameters`, from a checkpoint and without one.

    Raises:
        RunError: the optimiser cannot be made, make a step or be stored here; it does not resume exactly; or it needs
            second derivatives, and the run has none.
    """
    if not parameters:
        return
    ranks = sorted({parameter.dim() for parameter in parameters})
    starts = [torch.linspace(-1.0, 1.0, 3**rank).view((3,) * rank) for rank in ranks]
    straight, resumed = ([nn.Parameter(start.to(accelerator.device, copy=True)) for start in starts] for _ in range(2))
    with ambient_seed([training.seed]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run's own optimiser gives them
        optimizer = optimizer_of(straight, training)
        if second_order(optimizer):
            _check_second_order(training, accelerator)
        _try_step(optimizer, straight, training, 0)
        state, tensors = _packed(optimizer, training)
        again = optimizer_of(resumed, training)
        try:
            again.load_state_dict(unpack(state, {key: tensor.clone() for key, tensor in tensors.items()}))
        except Exception as error:
            raise _unfit(training, error) from error
        for parameter, trained in zip(resumed, straight, strict=True):
            parameter.data.copy_(trained.data)
        for one, its in ((optimizer, straight), (again, resumed)):
            _try_step(one, its, training, 1)
        (state, tensors), (other, others) = (_packed(one, training) for one in (optimizer, again))
    if state != other or not all(
        torch.equal(tensor.nan_to_num(), others[key].nan_to_num()) for key, tensor in tensors.items()
    ):
        raise RunError(
            f"training.optimizer is {training.optimizer}, which does not resume exactly with "
            f"{training.optimizer_kwargs or 'its defaults'}: its checkpoint does not hold its whole state"
        )


def _packed(optimizer: torch.optim.Optimizer, training: Training) -> tuple[Any, dict[str, Tensor]]:
    """Return an optimiser's state as a checkpoint stores it, without and with tensors."""
    tensors: dict[str, Tensor] = {}
    try:
        state = pack(optimizer.state_dict(), "optimizer", tensors)
        save(tensors)
    except Exception as error:
        raise _unfit(training, error) from error
    return state, tensors


def _try_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], training: Training, number: int
) -> None:
    try:
        seed_for_step(optimizer, training.seed, number, 2)
        optimizer.zero_grad()
        loss = torch.stack([(parameter**3).sum() for parameter in parameters]).sum()
        with for_derivatives(optimizer):
            loss.backward(create_graph=second_order(optimizer))
        make_step(optimizer, training)
    except Exception as error:  # whatever an optimiser of another package raises
        raise _unfit(training, error) from error


def second_order(optimizer: Any) -> bool:
    """Return whether a timm optimiser needs the graph of the gradients, to derive them again."""
    return bool(getattr(optimizer, "is_second_order", False))


def make_step(optimizer: Any, training: Training) -> None:
    """Let the optimiser change its parameters. One that compiles parts of itself does so with `training.compile`."""
    with nullcontext() if training.compile else torch.compiler.set_stance("force_eager"):
        optimizer.step()


@contextmanager
def for_derivatives(optimizer: Any) -> Iterator[None]:
    """Context manager for forward and backward: if the optimiser derives twice, use what can be derived twice."""
    if not second_order(optimizer):
        yield
        return
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings(
            "ignore", CREATE_GRAPH_WARNING
        )  # the next `zero_grad` breaks the cycle that it is about
        yield


def seed_for_step(optimizer: torch.optim.Optimizer, seed: int, number: int, processes: int) -> None:
    """Make what is random in an optimiser's step a function of (seed, step), the same in all processes."""
    for value in vars(optimizer).values():
        if isinstance(value, torch.Generator):
            value.manual_seed((seed * 1_000_003 + number) % 2**63)
    if processes > 1:  # in one process, the generators are seeded already
        seed_generators([seed, number])


def _check_second_order(training: Training, accelerator: Accelerator) -> None:
    wrong = {
        f"{accelerator.num_processes} processes": accelerator.num_processes > 1,
        f"training.precision={training.precision}": training.precision == "float16",
        f"training.compile={str(training.compile).lower()}": bool(training.compile),
    }
    if found := [what for what, there in wrong.items() if there]:
        raise RunError(
            f"training.optimizer is {training.optimizer}, which needs second derivatives; there are none with "
            f"{found[0]}"
        )


def _unfit(training: Training, error: Exception) -> RunError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return RunError(
        f"training.optimizer is {training.optimizer}, which cannot train here: {reason}; expected another, such as "
        "adamw"
    )
