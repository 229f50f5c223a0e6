"""Refiners: networks that look at a state and propose the next steps, knowing the stage they are at; for images, and for text."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..modules.conv import channels_last, group_norm
from ..modules.dilated_conv import DilatedBlock
from ..modules.stage_conditioning import StageGain, StageNorm
from .options import EmbeddedOptions, LinearOptions, Options

PATCH = 2  # options are made on a grid half as fine as the pixels, four pixels of each channel at a place


class StagedBlock(nn.Module):
    """A residual block whose two layers are scaled by the stage: `b c h w` -> `b c h w`."""

    def __init__(self, num_stages: int, num_channels: int, hidden_channels: int):
        super().__init__()
        self.norm = group_norm(num_channels)
        self.expand = nn.Conv2d(num_channels, hidden_channels, 3, padding=1)
        self.project = nn.Conv2d(hidden_channels, num_channels, 1)
        self.scale_in = StageGain(num_stages, num_channels)
        self.scale_hidden = StageGain(num_stages, hidden_channels)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b c h w` -> `b c h w`."""
        normed = self.scale_in.scaled_norm(self.norm, x, stage).relu_()
        return x + self.project(self.scale_hidden.scaled_conv(self.expand, normed, stage).relu_())


class ConvRefiner(nn.Module):
    """Proposes steps for images: down to a quarter of the size, blocks there, back to half, and a linear head for each stage.

    Args:
        num_channels: of the image.
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
        self.half_scale = StageGain(num_stages, feature_channels)
        self.blocks = nn.ModuleList(
            StagedBlock(num_stages, hidden_channels, hidden_channels) for _ in range(num_residual_blocks)
        )
        self.back = nn.ConvTranspose2d(hidden_channels, feature_channels, 4, stride=2, padding=1)
        self.refine = StagedBlock(num_stages, feature_channels, feature_channels)
        self.norm = group_norm(feature_channels)
        self.scale_out = StageGain(num_stages, feature_channels)
        pixels = num_channels * PATCH * PATCH
        # Zero: at first every step is its bias, or nothing.
        self.head = nn.Parameter(torch.zeros(num_stages, codebook_size, pixels, feature_channels + 1))

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `b c h w` -> the options of a stage."""
        fine = self.half_scale.scaled_conv(self.to_half, channels_last(state), stage).relu_()
        coarse = self.to_quarter(fine)
        for block in self.blocks:
            coarse = block(coarse, stage)
        features = self.refine(fine + channels_last(self.back(F.relu(coarse))), stage)
        features = self.scale_out.scaled_norm(self.norm, features, stage).relu_()
        features = F.pad(rearrange(features, "b f h w -> b h w f"), (0, 1), value=1.0)
        return LinearOptions(features, self.head[stage], PATCH)


class DilatedConvRefiner(nn.Module):
    """Proposes steps for text, seen from both sides: dilated convolutions over what each position is believed to hold.

    A code may cover the whole text or a span of it. Spans of one text lie side by side in the batch, `(b s) t ...`; the convolutions run
    over the text as a whole, so each span knows what its neighbours say so far.

    Args:
        num_symbols: logits at each position. num_spans: of one text; span_length: positions of one.
        hidden_channels, dilations: of the blocks. feature_channels: into the head. embedding_dim: of the space that steps are made in.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        codebook_size: int,
        num_symbols: int,
        num_spans: int,
        span_length: int,
        hidden_channels: int,
        feature_channels: int,
        embedding_dim: int,
        dilations: Sequence[int],
    ):
        super().__init__()
        self.num_spans = num_spans
        self.read = nn.Linear(num_symbols, hidden_channels)
        self.positions = nn.Parameter(0.02 * torch.randn(num_spans * span_length, hidden_channels))
        self.blocks = nn.ModuleList(DilatedBlock(num_stages, hidden_channels, dilation) for dilation in dilations)
        self.norm = StageNorm(num_stages, hidden_channels)
        self.features = nn.Linear(hidden_channels, feature_channels)
        # Zero: at first every step is its bias, or nothing.
        self.head = nn.Parameter(torch.zeros(num_stages, codebook_size, embedding_dim, feature_channels))
        self.embedding = nn.Parameter(torch.randn(num_symbols, embedding_dim) * embedding_dim**-0.5)

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `(b s) t v` -> the options of a stage."""
        belief = rearrange(state, "(b s) t v -> b (s t) v", s=self.num_spans).softmax(dim=2)
        hidden = self.read(belief * belief.shape[2] ** 0.5) + self.positions
        for block in self.blocks:
            hidden = block(hidden, stage)
        features = self.features(self.norm(hidden, stage).relu_())
        features = rearrange(features, "b (s t) f -> (b s) t f", s=self.num_spans)
        return EmbeddedOptions(features, self.head[stage], self.embedding)


class SegmentedRefiner(nn.Module):
    """Gives each run of `segment_length` stages a refiner of its own."""

    def __init__(self, refiners: list[nn.Module], segment_length: int):
        super().__init__()
        self.refiners, self.segment_length = nn.ModuleList(refiners), segment_length

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `b ...` -> the options of a stage, counted from 0 over all segments."""
        return self.refiners[stage // self.segment_length](state, stage % self.segment_length)


def in_segments(
    build: Callable[..., nn.Module], num_stages: int, segment_length: int, *, active_stages: int = 0
) -> nn.Module:
    """A refiner for every `segment_length` stages, from `build(num_stages=...)`; 0: one for all.

    Those that none of the first `active_stages` comes to (0: all do) are not trained.
    """
    length = segment_length or num_stages
    refiners = [build(num_stages=length) for _ in range(num_stages // length)]
    for unreached in refiners[-(-(active_stages or num_stages) // length) :]:
        unreached.requires_grad_(False)
    return refiners[0] if len(refiners) == 1 else SegmentedRefiner(refiners, length)
