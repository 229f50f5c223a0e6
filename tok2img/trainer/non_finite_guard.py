"""Skip optimizer steps with a non-finite loss or gradient, and end a run that does nothing else."""

import logging
from typing import Any

import torch
from torch import Tensor

from tokenizers_vq.distributed import all_reduce_sum

logger = logging.getLogger(__name__)
MAX_CONSECUTIVE = 20


class DivergedError(ValueError):
    """Error of a run whose steps are all non-finite."""


class NonFiniteGuard:
    """Skips optimizer steps with a non-finite loss or gradient.

    Args:
        device: Device of the losses.
        max_consecutive: Number of consecutive skipped steps that end the run.

    Attributes:
        skipped: Number of updates skipped so far.
        consecutive: Number of updates skipped since the last good one.
    """

    def __init__(self, device: torch.device, *, max_consecutive: int = MAX_CONSECUTIVE):
        self.max_consecutive, self.skipped, self.consecutive = max_consecutive, 0, 0
        self.found_bad_loss = torch.tensor(False, device=device)

    def observe_loss(self, loss: Tensor) -> None:
        """Remember whether the loss of a batch is finite, without a device synchronization."""
        self.found_bad_loss = self.found_bad_loss | ~loss.detach().isfinite().all()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Check every later step of an optimizer before it is made."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Remove the gradients of a bad step, so that weights and moving averages stay as they are.

        Raises:
            DivergedError: After too many consecutive bad steps.
        """
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        if not parameters:
            return
        # The largest absolute value is finite exactly if all values are, and torch computes it
        # for all tensors together.
        norm: Any = torch.nn.utils.get_total_norm([each.grad for each in parameters], norm_type=float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        is_bad = self.found_bad_loss.to(parameters[0].device) | ~norm.isfinite()
        self.found_bad_loss = torch.zeros_like(self.found_bad_loss)
        if not all_reduce_sum(is_bad.float()):
            self.consecutive = 0
            return
        for each in parameters:
            each.grad = None
        self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
        logger.warning("skipped an update: non-finite loss or gradient (%d skipped so far)", self.skipped)
        if self.consecutive >= self.max_consecutive:
            raise DivergedError(
                f"The last {self.consecutive} steps had a non-finite loss or gradient; the weights are those before them. "
                "Try a lower learning_rate or max_grad_norm, or bf16: false."
            )
