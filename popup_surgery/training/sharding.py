"""FSDP2: each process has a share of the rows of every parameter, as `fully_shard` divides them."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn

from ..config.schema import Training
from ..errors import RunError, listed
from ..learners import name_of
from ..learners.base import Learner
from ..malloc import return_freed_memory
from ..selection.shards import is_shard, spread

_HOOKS = "around_step", "after_step", "after_epoch", "penalty"


def join_shards(accelerator: Accelerator, training: Training) -> None:
    """Check and complete the settings of FSDP, if the processes were started with it.

    Raises:
        RunError: the loop does not support them.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:  # where Accelerate takes no notice of it
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not uses_shards(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RunError(
            "the run was started with version 1 of FSDP; expected version 2: accelerate launch --use_fsdp "
            "--fsdp_version 2"
        )
    wrong = {
        "the offload of parameters to the CPU": _offloads(plugin.cpu_offload),
        "activation checkpointing": plugin.activation_checkpointing,
        "ignored modules": plugin.ignored_modules is not None,
        "training.compile": training.compile,
        "training.channels_last": training.channels_last,
        "training.precision=float16": training.precision == "float16",
        "training.density_penalty": training.density_penalty is not None,
    }
    if found := [what for what, there in wrong.items() if there]:
        raise RunError(f"the run was started with FSDP, which does not work with {listed(found)}")
    if accelerator.device.type == "cpu":
        return_freed_memory()


def uses_shards(accelerator: Accelerator) -> bool:
    """Return whether the processes have shards of the network, by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def _offloads(policy: Any) -> bool:
    """Return whether an offload policy of FSDP2 moves anything."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(policy, CPUOffloadPolicy)


def check_learners(learners: Iterable[Learner], more: dict[str, bool]) -> None:
    """Check that nothing of a run needs whole scores between steps.

    Args:
        more: what else the run may have that does, and whether it has it.

    Raises:
        RunError: something does.
    """
    found = [
        f"the learner {name_of(learner)}"
        for learner in learners
        if learner.redraws or any(getattr(type(learner), name) is not getattr(Learner, name) for name in _HOOKS)
    ]
    if found := sorted({*found, *(what for what, there in more.items() if there)}):
        raise RunError(
            f"the run was started with FSDP, which does not work with {listed(found)}: between steps, no process has "
            "all weights and scores"
        )


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Spread the parameters of `model` over the processes, in place, by the wrap policy that FSDP was started with.

    Raises:
        RunError: the policy wraps no layer, or `fully_shard` does not take the network.
    """
    from torch.distributed.fsdp import fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    try:
        plugin.set_auto_wrap_policy(model)
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
        modules = [module for module in reversed(list(model.modules())) if module is model or wraps(module)]
        if modules == [model]:
            raise RunError(
                "FSDP wraps no layer, so that each process would gather the whole network at once; expected a policy "
                "that does, such as --fsdp_auto_wrap_policy SIZE_BASED_WRAP --fsdp_min_num_params 100000"
            )
        # From the inside out. Accelerate's `fsdp2_prepare_model` would hold all layers whole until the last is spread.
        for module in modules:  # without mixed precision: scores are ranked in float32, and autocast does the rest
            fully_shard(
                module, mesh=mesh, reshard_after_forward=None if module is model else plugin.reshard_after_forward
            )
    except (ValueError, NotImplementedError) as error:
        raise RunError(f"FSDP does not take this network: {' '.join(str(error).split())}") from error
    return model


def spread_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state from a checkpoint, which is whole, spread as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def as_of(parameter: torch.Tensor, value: Any) -> Any:
        alike = is_shard(parameter) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return spread(value, parameter) if alike else value

    each = {
        index: {key: as_of(parameters[index], value) for key, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": each}
