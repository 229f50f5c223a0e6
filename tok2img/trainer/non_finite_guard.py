"""Steps whose loss or gradient is not finite: left out, counted, and after too many in a row the end of the run."""

import logging
from typing import Any

import torch
from torch import Tensor

from tokenizers_vq.distributed import summed_over_ranks

logger = logging.getLogger(__name__)
MOST_IN_A_ROW = 20


class DivergedError(ValueError):
    """Nothing but steps that are not finite."""


class BadSteps:
    """Stands before an optimizer's step, and lets none through that would spoil the weights.

    Attributes:
        skipped: updates left out so far.
        in_a_row: of them, those since the last that was not.
    """

    def __init__(self, device: torch.device, *, most_in_a_row: int = MOST_IN_A_ROW):
        self.most_in_a_row, self.skipped, self.in_a_row = most_in_a_row, 0, 0
        self.bad_loss = torch.tensor(False, device=device)

    def see_loss(self, loss: Tensor) -> None:
        """Remember whether a loss, of a part of a step too, is finite; without a look at the device."""
        self.bad_loss = self.bad_loss | ~loss.detach().isfinite().all()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, look at every step of an optimizer before it is made."""
        optimizer.register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without their gradients the optimizer leaves weights and averages as they are.

        Raises:
            DivergedError: after too many in a row.
        """
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        if not parameters:
            return
        bad = self.bad_loss.to(parameters[0].device) | not_finite([each.grad for each in parameters])
        self.bad_loss = torch.zeros_like(self.bad_loss)
        if not summed_over_ranks(bad.float()):
            self.in_a_row = 0
            return
        for each in parameters:
            each.grad = None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.warning("loss or gradient is not finite: the update was skipped, the %d. so far", self.skipped)
        if self.in_a_row >= self.most_in_a_row:
            raise DivergedError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite; the weights are those before them. "
                "A lower learning_rate or max_grad_norm, or bf16 false, may help"
            )


def not_finite(tensors: list[Tensor]) -> Tensor:
    """Whether any value of the tensors is a NaN or an infinity, as a tensor."""
    norm: Any = torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))
    return ~(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()
