"""What the processes of a run find out together."""

import hashlib
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.reading import warn_of_skipped
from ..errors import RunError
from .mask_history import packed


class Agreement:
    """Questions that all processes of a run ask at the same time, and get the same answer to."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.told_of_skipped = False

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' `numbers`."""
        return self.accelerator.reduce(numbers, "sum")

    def highest(self, number: int) -> int:
        """The highest of all processes' `number`."""
        if self.accelerator.num_processes == 1:
            return number
        highest = torch.tensor(number, device=self.accelerator.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest)

    def share_statistics(self, model: nn.Module) -> None:
        """Give the first process's running statistics to all of them."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def skipped(self, data: Batches) -> int:
        """Images that all have left out in this epoch so far; when there are any, a warning names one, once."""
        skipped = int(self.total(torch.tensor(data.skipped, device=self.accelerator.device)))
        if skipped and not self.told_of_skipped:
            named = [file for file in gather_object([data.left_out]) if file]
            self.told_of_skipped = bool(named)
            if named and self.accelerator.is_main_process:
                warn_of_skipped(skipped, named[0])
        return skipped

    def not_finite(self, model: nn.Module, bad_step: int, step: int) -> tuple[int, str] | None:
        """The first step after which something is not finite, and what; None where all is.

        Args:
            bad_step: the first step of this process whose loss was not finite, or -1.
            step: how many steps there were.
        """
        bad_step = self.highest(bad_step + 1) - 1
        if bad_step >= 0:
            return bad_step, "the loss"
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                return step - 1, f"{name} after the update"
        return None

    def check_masks(self, masks: Mapping[str, Tensor], step: int) -> None:
        """`RunError` where a process has other masks than the first."""
        digest = hashlib.sha256()
        for bits in packed(masks).values():
            digest.update(bits.tobytes())
        digests = gather_object([digest.hexdigest()])
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise RunError(f"process {rank} has other masks than process 0 after step {step:,}")
