"""Convolutions, and stacks of them, that VQ-VAE and the refiners share.

Normalisation is over channel groups of one example, never over the batch: an example codes alone as it does among others.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_invariant import batch_invariant_conv1x1

CHANNELS_PER_GROUP = 16


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Groups of 16 channels, one group where the channels do not divide."""
    return nn.GroupNorm(
        num_channels // CHANNELS_PER_GROUP if num_channels % CHANNELS_PER_GROUP == 0 else 1, num_channels
    )


def channels_last(x: Tensor) -> Tensor:
    """`b c h w` with its channels next to each other in memory, which convolutions then keep: a quarter off the MNIST model's time.

    With one channel both orders are the same, and the strides alone tell convolutions which of them is meant.
    """
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    x = x.contiguous()
    return x.as_strided(x.shape, (x.shape[2] * x.shape[3], 1, x.shape[3], 1))


class ResidualBlock(nn.Module):
    """`b c h w` plus a correction through fewer channels (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, num_channels: int, hidden_channels: int):
        super().__init__()
        self.norm = group_norm(num_channels)
        self.expand = nn.Conv2d(num_channels, hidden_channels, 3, padding=1)
        self.project = nn.Conv2d(hidden_channels, num_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` -> `b c h w`."""
        return x + batch_invariant_conv1x1(self.project, F.relu(self.expand(F.relu(self.norm(x)))))


def downsampling(in_channels: int, widths: list[int]) -> nn.Sequential:
    """`b c h w` -> `b widths[-1] h/2^n w/2^n`: one strided convolution a width."""
    layers: list[nn.Module] = []
    for last, width in pairwise([in_channels, *widths]):
        layers += [nn.Conv2d(last, width, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def upsampling(widths: list[int], out_channels: int) -> nn.Sequential:
    """`b widths[0] h w` -> `b out_channels h*2^n w*2^n`, the way back: one doubling a width.

    A transposed convolution with a stride is 2.4 times cheaper than convolving the doubled grid (one thread, 128 channels).
    """
    layers: list[nn.Module] = []
    for last, width in pairwise([*widths, out_channels]):
        layers += [nn.ReLU(), nn.ConvTranspose2d(last, width, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)
