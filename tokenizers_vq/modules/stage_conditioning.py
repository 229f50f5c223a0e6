"""Normalization layers whose scale and shift depend on the stage (FiLM, Perez et al. 2018).

They let a single network refine coarsely at first and finely later.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class StageGain(nn.Module):
    """Scale per stage and channel, folded into the layer before it where that is less work.

    Args:
        num_stages: Number of stages.
        num_channels: Number of channels.
        init: Makes the initial scales from these two sizes; the original VQ-DRAW uses
            `torch.randn`.
    """

    def __init__(self, num_stages: int, num_channels: int, *, init: Callable[[int, int], Tensor] = torch.ones):
        super().__init__()
        self.gain = nn.Parameter(init(num_stages, num_channels))

    def scaled_conv(self, layer: nn.Module, x: Tensor, stage: int) -> Tensor:
        """Convolve and scale.

        Args:
            layer: A `Conv2d` or `ConvTranspose2d`.
            x: Features `b c h w`.
            stage: Index of the stage.

        Returns:
            Features `b o h' w'`, scaled by the gains `o` of the stage.
        """
        conv: Any = layer
        gain = self.gain[stage]
        # Scale the weights or the output, whichever has fewer numbers.
        if conv.weight.numel() > x.numel():
            return conv(x) * rearrange(gain, "o -> o 1 1")
        bias = conv.bias * gain
        if isinstance(layer, nn.ConvTranspose2d):
            weight = conv.weight * rearrange(gain, "o -> 1 o 1 1")
            return F.conv_transpose2d(x, weight, bias, stride=conv.stride, padding=conv.padding)
        weight = conv.weight * rearrange(gain, "o -> o 1 1 1")
        return F.conv2d(x, weight, bias, stride=conv.stride, padding=conv.padding)

    def scaled_norm(self, norm: nn.GroupNorm, x: Tensor, stage: int) -> Tensor:
        """Apply a group norm to `b c h w` and scale it by the gains `c` of a stage."""
        gain = self.gain[stage]
        return F.group_norm(x, norm.num_groups, norm.weight * gain, norm.bias * gain, norm.eps)


class StageNorm(nn.Module):
    """Layer norm over the channels of `b t c`, with a scale and shift per stage and channel.

    Args:
        num_stages: Number of stages.
        num_channels: Number of channels, `c`.
    """

    def __init__(self, num_stages: int, num_channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_stages, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_stages, num_channels))

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Normalize features `b t c` with the scale and shift of a stage."""
        return F.layer_norm(x, x.shape[-1:], self.gain[stage], self.bias[stage])
