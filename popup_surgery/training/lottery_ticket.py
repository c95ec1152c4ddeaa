"""The lottery ticket: train, prune, rewind, repeat (Frankle and Carbin, 2019)."""

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..codecs import bitpack
from ..config.schema import LotteryTicket, Training
from ..data.batches import Batches, Progress
from ..masking.planning import plan
from ..selection import kept_count, select
from .checkpoint import Checkpoint
from .mask_history import packed
from .trainer import Trainer


class TicketTrainer(Trainer):
    """Iterative magnitude pruning of a plain network, with rewinding. Each round is a whole training.

    Source: "The Lottery Ticket Hypothesis", ICLR 2019, section 1; where `rewind_epoch` is above 0, "Stabilizing the
    Lottery Ticket Hypothesis", 2019.

    After round i of n, each weight tensor keeps a share k^(i/n) of its weights: the largest magnitudes among those not
    pruned before. These weights, and everything else that is trained, return to their values at the end of
    `rewind_epoch`. The schedule returns there too, and the optimiser's state is reset. The last pruning is followed by
    one more round.

    Deviations: every layer keeps the same share, while the authors prune output layers at half the rate; rounds see
    the images in different orders.

    Args:
        ticket: what to keep, and how. The other arguments are those of `Trainer`.

    Raises:
        ConversionError: the network has no weights to prune, or a layer would keep none.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        training: Training,
        accelerator: Accelerator,
        progress: Progress,
        ticket: LotteryTicket,
    ) -> None:
        whole = {weight.key: torch.ones(weight.shape, dtype=torch.bool) for weight in plan(model, ticket.k).masked}
        super().__init__(model, data, training, accelerator, progress, whole)
        self.ticket = ticket
        self.fresh = copy.deepcopy(self.optimizer.state_dict()["state"])  # some optimisers have one from the start
        self.epochs = ticket.epochs(self.training.epochs)
        self.start = self._values()  # the values that a round starts from

    def _values(self) -> dict[str, Tensor]:
        return {key: tensor.detach().clone() for key, tensor in self.learned().items()}

    def _begin_epoch(self) -> None:
        if self.epoch == self.ticket.rewind_epoch:
            self.start = self._values()
        pruned, epoch = self._place()
        if pruned and epoch == self.ticket.rewind_epoch:
            self._prune(self.ticket.k ** (pruned / self.ticket.rounds))

    def _scheduled(self) -> int:
        return self._place()[1]

    def _place(self) -> tuple[int, int]:
        """Return the number of prunings so far, including one due now, and the epoch within the current training.

        A training starts at epoch 0, or after a pruning at `rewind_epoch`.
        """
        whole, start = self.training.epochs, self.ticket.rewind_epoch
        if self.epoch < whole:
            return 0, self.epoch
        pruned, epoch = divmod(self.epoch - whole, whole - start)
        return pruned + 1, start + epoch

    @torch.no_grad()
    def _prune(self, share: float) -> None:
        """Keep the share of each weight tensor that is largest in magnitude, and rewind everything that is trained."""
        infinity = torch.tensor(torch.inf, device=self.accelerator.device)
        for weight, mask in self.weight_masks:
            size = torch.where(mask, weight.float().abs().nextafter(infinity), 0.0)  # pruned weights come last
            mask.copy_(select([size], kept_count(weight.numel(), share)).masks[0])
        for key, tensor in self.learned().items():
            tensor.copy_(self.start[key])
        self.weight_masks.zero()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": copy.deepcopy(self.fresh)})

    def _checkpoint(self, sums: list[float], skipped: int) -> Checkpoint:
        taken = super()._checkpoint(sums, skipped)
        taken.tensors.update({f"start.{key}": tensor.cpu().contiguous() for key, tensor in self.start.items()})
        taken.tensors.update({f"ticket.{key}": torch.from_numpy(bits) for key, bits in packed(self.masks()).items()})
        return taken

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        tensors, device = checkpoint.tensors, self.accelerator.device
        self.start = {key: tensors[f"start.{key}"].to(device) for key in self.start}
        for key, mask in self.weight_masks.tensors.items():
            bits = tensors[f"ticket.{key}"].numpy()
            mask.copy_(torch.from_numpy(bitpack.unpack_mask(bits, tuple(mask.shape))))
