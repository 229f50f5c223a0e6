"""Refiners: networks that look at a state and propose the next steps, knowing the stage they are at."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .convolution import group_norm
from .options import LinearOptions, Options

PATCH = 2  # options are made on a grid half as fine as the pixels, four pixels of each channel at a place


class StageScale(nn.Module):
    """Channel gains that differ from stage to stage, so one network can refine coarse, then fine."""

    def __init__(self, num_stages: int, num_channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_stages, num_channels))

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b c h w` -> `b c h w`."""
        return x * rearrange(self.gain[stage], "c -> c 1 1")


class StagedBlock(nn.Module):
    """A residual block whose two layers are scaled by the stage: `b c h w` -> `b c h w`."""

    def __init__(self, num_stages: int, num_channels: int, hidden_channels: int):
        super().__init__()
        self.norm = group_norm(num_channels)
        self.spread = nn.Conv2d(num_channels, hidden_channels, 3, padding=1)
        self.merge = nn.Conv2d(hidden_channels, num_channels, 1)
        self.scale_in = StageScale(num_stages, num_channels)
        self.scale_hidden = StageScale(num_stages, hidden_channels)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b c h w` -> `b c h w`."""
        hidden = self.spread(F.relu(self.scale_in(self.norm(x), stage)))
        return x + self.merge(F.relu(self.scale_hidden(hidden, stage)))


class ConvRefiner(nn.Module):
    """Proposes steps for pictures: down to a quarter of the size, blocks there, back to half, and a linear head for each stage.

    Args:
        num_channels: of the picture.
        hidden_channels: on the quarter grid.
        feature_channels: on the half grid, and into the head.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        codebook_size: int,
        num_channels: int,
        hidden_channels: int,
        feature_channels: int,
        num_residual_blocks: int,
    ):
        super().__init__()
        self.to_half = nn.Conv2d(num_channels, feature_channels, 4, stride=2, padding=1)
        self.to_quarter = nn.Conv2d(feature_channels, hidden_channels, 4, stride=2, padding=1)
        self.half_scale = StageScale(num_stages, feature_channels)
        self.blocks = nn.ModuleList(
            StagedBlock(num_stages, hidden_channels, hidden_channels) for _ in range(num_residual_blocks)
        )
        self.back = nn.ConvTranspose2d(hidden_channels, feature_channels, 4, stride=2, padding=1)
        self.refine = StagedBlock(num_stages, feature_channels, feature_channels)
        self.norm = group_norm(feature_channels)
        self.scale_out = StageScale(num_stages, feature_channels)
        pixels = num_channels * PATCH * PATCH
        # Zero: at first every step is its bias, or nothing.
        self.head = nn.Parameter(torch.zeros(num_stages, codebook_size, pixels, feature_channels + 1))

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `b c h w` -> the options of a stage."""
        fine = F.relu(self.half_scale(self.to_half(state), stage))
        coarse = self.to_quarter(fine)
        for block in self.blocks:
            coarse = block(coarse, stage)
        features = self.refine(fine + self.back(F.relu(coarse)), stage)
        features = F.relu(self.scale_out(self.norm(features), stage))
        constant = torch.ones_like(features[:, :1])
        return LinearOptions(torch.cat([features, constant], dim=1), self.head[stage], PATCH)


class SegmentedRefiner(nn.Module):
    """Gives each run of `segment_length` stages a refiner of its own."""

    def __init__(self, refiners: list[nn.Module], segment_length: int):
        super().__init__()
        self.refiners, self.segment_length = nn.ModuleList(refiners), segment_length

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `b ...` -> the options of a stage, counted from 0 over all segments."""
        return self.refiners[stage // self.segment_length](state, stage % self.segment_length)
