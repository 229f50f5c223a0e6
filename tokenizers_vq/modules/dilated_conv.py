"""Residual blocks of dilated 1-D convolutions that look in both directions, for text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stage_conditioning import StageNorm


def concat_neighbors(x: Tensor, dilation: int) -> Tensor:
    """Concatenate each position with its two neighbors, `b t c` -> `b t (3 c)`; zeros outside.

    A linear layer on the result is a convolution of width 3 with this dilation.

    Args:
        x: Features `b t c`.
        dilation: Distance of the neighbors before and after, in positions.
    """
    padded, length = F.pad(x, (0, 0, dilation, dilation)), x.shape[1]
    return torch.cat([padded[:, start : start + length] for start in (0, dilation, 2 * dilation)], dim=2)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer and ReLU, `b t i` -> `b t o`.

    Batch and time are flattened first. For a 3-D input torch returns a view of the 2-D product, and
    an in-place ReLU on a view makes autograd copy slices.
    """
    return F.linear(x.flatten(0, 1), weight, bias).relu_().unflatten(0, x.shape[:2])


class DilatedBlock(nn.Module):
    """Residual block that sees `dilation` positions back and ahead, `b t c` -> `b t c`.

    With channels last, a convolution of width 3 is a matrix product with three shifted copies of
    the input.

    Args:
        num_stages: Number of stages, each with a scale and shift of the norm.
        num_channels: Channels of input and output, `c`.
        dilation: Distance of the neighbors, in positions.
    """

    def __init__(self, num_stages: int, num_channels: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.norm = StageNorm(num_stages, num_channels)
        self.expand = nn.Linear(3 * num_channels, 2 * num_channels)
        self.project = nn.Linear(2 * num_channels, num_channels)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Add the block's output at a stage to features `b t c`."""
        neighbors = concat_neighbors(self.norm(x, stage), self.dilation)
        return x + self.project(linear_relu(neighbors, self.expand.weight, self.expand.bias))
