"""Residual blocks of dilated 1-D convolutions that see both sides."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stage_conditioning import StageNorm


def concat_neighbors(x: Tensor, dilation: int) -> Tensor:
    """Each position between those `dilation` before and after it, zero outside: `b t c` -> `b t (3 c)`."""
    padded, length = F.pad(x, (0, 0, dilation, dilation)), x.shape[1]
    return torch.cat([padded[:, start : start + length] for start in (0, dilation, 2 * dilation)], dim=2)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of `b t i`, `b t o`, and where it is negative zero: in place, which only rows can be, for the rest are views."""
    return F.linear(x.flatten(0, 1), weight, bias).relu_().unflatten(0, x.shape[:2])


class DilatedBlock(nn.Module):
    """A residual block that looks `dilation` positions back and ahead: `b t c` -> `b t c`.

    With channels last, a convolution of width 3 is one matrix product of three shifted copies.
    """

    def __init__(self, num_stages: int, num_channels: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.norm = StageNorm(num_stages, num_channels)
        self.expand = nn.Linear(3 * num_channels, 2 * num_channels)
        self.project = nn.Linear(2 * num_channels, num_channels)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b t c` -> `b t c`."""
        near = concat_neighbors(self.norm(x, stage), self.dilation)
        return x + self.project(linear_relu(near, self.expand.weight, self.expand.bias))
