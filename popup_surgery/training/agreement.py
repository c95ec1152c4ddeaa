"""Values that the processes of a run compute together."""

import hashlib
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.reading import warn_of_skipped
from ..errors import RunError
from ..selection.shards import local
from .mask_history import packed


class Agreement:
    """Collective operations: all processes of a run call one at the same time and get the same result."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.told_of_skipped = False

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum of `numbers` over all processes."""
        return self.accelerator.reduce(numbers, "sum")

    def highest(self, number: int) -> int:
        """Return the highest `number` of all processes."""
        if self.accelerator.num_processes == 1:
            return number
        highest = torch.tensor(number, device=self.accelerator.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest)

    def share_statistics(self, model: nn.Module) -> None:
        """Copy the first process's buffers (running statistics) to all processes."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def skipped(self, data: Batches) -> int:
        """Return how many images all processes have skipped in this epoch so far.

        The first time there are any, a warning names one of them.
        """
        skipped = int(self.total(torch.tensor(data.skipped, device=self.accelerator.device)))
        if skipped and not self.told_of_skipped:
            named = [file for file in gather_object([data.left_out]) if file]
            self.told_of_skipped = bool(named)
            if named and self.accelerator.is_main_process:
                warn_of_skipped(skipped, named[0])
        return skipped

    def not_finite(self, model: nn.Module, bad_step: int, step: int) -> tuple[int, str] | None:
        """Return the first step after which something is not finite, and what it is; None if everything is finite.

        Args:
            bad_step: the first step of this process whose loss was not finite, or -1.
            step: how many steps were made.
        """
        bad_step = self.highest(bad_step + 1) - 1
        if bad_step >= 0:
            return bad_step, "the loss"
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        bad = (len(named) - i for i, (_, parameter) in enumerate(named) if not local(parameter).isfinite().all())
        first = self.highest(next(bad, 0))  # of all processes, counted from the end
        return (step - 1, f"{named[-first][0]} after the update") if first else None

    def check_masks(self, masks: Mapping[str, Tensor], step: int) -> None:
        """Check that all processes have the same masks.

        Raises:
            RunError: a process's masks differ from the first process's.
        """
        digest = hashlib.sha256()
        for bits in packed(masks).values():
            digest.update(bits.tobytes())
        digests = gather_object([digest.hexdigest()])
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise RunError(f"after step {step:,}, process {rank} has different masks from process 0")
