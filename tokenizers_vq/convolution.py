"""Convolutions, and stacks of them, that VQ-VAE and the refiners share.

Normalisation is over channel groups of one example, never over the batch: an example codes alone as it does among others.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHANNELS_PER_GROUP = 16


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Groups of 16 channels, one group where the channels do not divide."""
    return nn.GroupNorm(
        num_channels // CHANNELS_PER_GROUP if num_channels % CHANNELS_PER_GROUP == 0 else 1, num_channels
    )


class StageGain(nn.Module):
    """Channel gains that differ from stage to stage, so one network can refine coarse, then fine.

    A gain is folded into the layer before it, wherever that is less work than to scale what comes out.

    Args:
        start: makes the first gains of their two sizes; the original has `torch.randn`.
    """

    def __init__(self, num_stages: int, num_channels: int, *, start: Callable[[int, int], Tensor] = torch.ones):
        super().__init__()
        self.gain = nn.Parameter(start(num_stages, num_channels))

    def after_convolution(self, layer: nn.Module, x: Tensor, stage: int) -> Tensor:
        """Convolve `b c h w` and scale: the weights or the pixels, whichever are fewer."""
        convolution: Any = layer
        gain = self.gain[stage]
        if convolution.weight.numel() > x.numel():
            return convolution(x) * rearrange(gain, "o -> o 1 1")
        bias = convolution.bias * gain
        if isinstance(layer, nn.ConvTranspose2d):
            weight = convolution.weight * rearrange(gain, "o -> 1 o 1 1")
            return F.conv_transpose2d(x, weight, bias, stride=convolution.stride, padding=convolution.padding)
        weight = convolution.weight * rearrange(gain, "o -> o 1 1 1")
        return F.conv2d(x, weight, bias, stride=convolution.stride, padding=convolution.padding)

    def after_norm(self, norm: nn.GroupNorm, x: Tensor, stage: int) -> Tensor:
        """Normalise `b c h w` and scale."""
        gain = self.gain[stage]
        return F.group_norm(x, norm.num_groups, norm.weight * gain, norm.bias * gain, norm.eps)


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
        self.spread = nn.Conv2d(num_channels, hidden_channels, 3, padding=1)
        self.merge = nn.Conv2d(hidden_channels, num_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` -> `b c h w`."""
        return x + steadily(self.merge, F.relu(self.spread(F.relu(self.norm(x)))))


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


def steadily(projection: nn.Conv2d, x: Tensor) -> Tensor:
    """What a 1x1 convolution makes of `b c h w`; on a CPU, but for training, in double precision, so that it is the same in all batches.

    Libraries sum the products of a few places in another order than those of many, and of 100,000 codes the last bit decides one. In
    double precision nothing of that order is left when the sum is rounded: 0 to 4 % more time to encode.
    """
    if projection.training or x.device.type != "cpu":
        return projection(x)
    bias = None if projection.bias is None else projection.bias.double()
    return F.conv2d(x.double(), projection.weight.double(), bias).to(x.dtype)


def in_company(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `encode` makes of examples `b ...`; of one alone, beside a copy of it.

    For the same reason: of larger convolutions libraries take the same sums for two examples as for many, but not for one.
    """
    return encode(x) if len(x) != 1 else encode(torch.cat([x, x]))[:1]
