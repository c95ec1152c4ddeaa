"""The state of a trainer, as a checkpoint stores it."""

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..data.batches import TRAIN
from ..errors import RunError, listed
from ..selection.shards import spread
from .checkpoint import Checkpoint, pack, unpack
from .metrics import Epoch
from .sharding import spread_state

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger("popup_surgery")


def checkpoint_of(trainer: "Trainer", sums: list[float], skipped: int) -> Checkpoint:
    """Return the state of a trainer. `sums` and `skipped` are totals over all processes.

    Under FSDP, all processes must call this, and the first gets the tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    kept = tensors if trainer.accelerator.is_main_process else None
    for key, tensor in trainer.learned().items():
        pack(tensor, f"model.{key}", kept)
    tensors |= {f"before.{key}": torch.from_numpy(mask) for key, mask in trainer.mask_history.latest.items()}
    scaler = trainer.accelerator.scaler
    return Checkpoint(
        tensors,
        {
            "step": trainer.step,
            "batch": trainer.batch,
            "seconds": trainer.seconds,
            "sums": sums,
            "logged": trainer.logged,
            "images": trainer.data.counts[TRAIN],
            "skipped": skipped,
            "history": [asdict(epoch) for epoch in trainer.history],
            "optimizer": pack(trainer.optimizer.state_dict(), "optimizer", kept),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "processes": trainer.part.processes,
            "threads": torch.get_num_threads(),
            "classes": trainer.data.classes,
        },
    )


def restore(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Set the state of a trainer to that of a checkpoint. `RunError` if its labels have other meanings."""
    state, tensors, accelerator = checkpoint.state, checkpoint.tensors, trainer.accelerator
    _check_classes(state.get("classes"), trainer.data.classes)
    if accelerator.is_main_process:
        _warn_of_differences(trainer, checkpoint)
    with torch.no_grad():
        for key, tensor in trainer.learned().items():
            tensor.copy_(spread(tensors[f"model.{key}"], tensor))
    of_optimizer = spread_state(trainer.optimizer, unpack(state["optimizer"], tensors))
    for group, own in zip(of_optimizer["param_groups"], trainer.optimizer.param_groups, strict=True):
        if "capturable" in own:  # which a step as a graph sets, and not every resume makes one
            group["capturable"] = own["capturable"]
    trainer.optimizer.load_state_dict(of_optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    trainer.history = [Epoch(**epoch) for epoch in state["history"]]
    trainer.step = trainer.checkpoint_step = state["step"]
    trainer.batch, trainer.seconds = state["batch"], state["seconds"]
    trainer.logged = state.get("logged", trainer.logged)  # absent before version 0.2
    if accelerator.is_main_process:  # the sums include the other processes' share
        trainer.update.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        trainer.data.skipped = state["skipped"]
    history = trainer.mask_history
    history.latest = {key: tensors[f"before.{key}"].numpy() for key in history.latest}


def _check_classes(before: list[str] | None, now: list[str]) -> None:
    """Raise `RunError` if the data set has other classes than a checkpoint's; earlier versions did not record them."""
    if not before or not now or before == now:
        return
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    what = [f"it lacks {listed(gone)}"] * bool(gone) + [f"{listed(new)} is new"] * bool(new)
    raise RunError(
        f"the data set has other classes than at the checkpoint: {' and '.join(what) or 'they are in another order'}; "
        "give the classes their names again, or start a new run in another folder with --output"
    )


def _warn_of_differences(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Warn if the checkpoint was taken with another number of processes or training images."""
    processes, images = checkpoint.state["processes"], checkpoint.state["images"]
    if processes != trainer.part.processes:
        log.warning(
            "the checkpoint was written by %d process%s and resumes with %d; from here on, random layers such as "
            "dropout, and the statistics of batch norms, differ",
            processes,
            "es" * (processes != 1),
            trainer.part.processes,
        )
    if images != trainer.data.counts[TRAIN]:
        log.warning(
            "the checkpoint was written with %s training images and resumes with %s; from here on, their order differs",
            images,
            trainer.data.counts[TRAIN],
        )
