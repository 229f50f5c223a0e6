"""Layers whose scale and shift depend on the stage (FiLM)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class StageGain(nn.Module):
    """Channel gains that differ from stage to stage, so one network can refine coarse, then fine.

    A gain is folded into the layer before it, wherever that is less work than to scale what comes out.

    Args:
        init: makes the first gains of their two sizes; the original has `torch.randn`.
    """

    def __init__(self, num_stages: int, num_channels: int, *, init: Callable[[int, int], Tensor] = torch.ones):
        super().__init__()
        self.gain = nn.Parameter(init(num_stages, num_channels))

    def scaled_conv(self, layer: nn.Module, x: Tensor, stage: int) -> Tensor:
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

    def scaled_norm(self, norm: nn.GroupNorm, x: Tensor, stage: int) -> Tensor:
        """Normalise `b c h w` and scale."""
        gain = self.gain[stage]
        return F.group_norm(x, norm.num_groups, norm.weight * gain, norm.bias * gain, norm.eps)


class StageNorm(nn.Module):
    """Layer normalisation over channels, `b t c`, with gains and biases that differ from stage to stage."""

    def __init__(self, num_stages: int, num_channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_stages, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_stages, num_channels))

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b t c` -> `b t c`."""
        return F.layer_norm(x, x.shape[-1:], self.gain[stage], self.bias[stage])
