"""Steps whose loss or gradient is not finite: left out, counted, and after too many in a row the end of the run."""

import logging
from typing import Any

import torch
from torch import Tensor

from tokenizers_vq.distributed import all_reduce_sum

logger = logging.getLogger(__name__)
MAX_CONSECUTIVE = 20


class DivergedError(ValueError):
    """Nothing but steps that are not finite."""


class NonFiniteGuard:
    """Stands before an optimizer's step, and lets none through that would spoil the weights.

    Attributes:
        skipped: updates left out so far.
        consecutive: of them, those since the last that was not.
    """

    def __init__(self, device: torch.device, *, most_in_a_row: int = MAX_CONSECUTIVE):
        self.most_in_a_row, self.skipped, self.consecutive = most_in_a_row, 0, 0
        self.bad_loss = torch.tensor(False, device=device)

    def observe_loss(self, loss: Tensor) -> None:
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
        bad = self.bad_loss.to(parameters[0].device) | any_non_finite([each.grad for each in parameters])
        self.bad_loss = torch.zeros_like(self.bad_loss)
        if not all_reduce_sum(bad.float()):
            self.consecutive = 0
            return
        for each in parameters:
            each.grad = None
        self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
        logger.warning("loss or gradient is not finite: the update was skipped, the %d. so far", self.skipped)
        if self.consecutive >= self.most_in_a_row:
            raise DivergedError(
                f"{self.consecutive} steps in a row had a loss or gradient that is not finite; the weights are those before them. "
                "A lower learning_rate or max_grad_norm, or bf16 false, may help"
            )


def any_non_finite(tensors: list[Tensor]) -> Tensor:
    """Whether any value of the tensors is a NaN or an infinity, as a tensor."""
    norm: Any = torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))
    return ~(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()
