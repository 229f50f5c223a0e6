"""Refiners of VQ-DRAW: networks that propose the next steps from a state and its stage.

`ConvRefiner` is for images, `DilatedConvRefiner` for text, and `SegmentedRefiner` holds one of them
for each segment of stages.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..modules.conv import channels_last, group_norm
from ..modules.dilated_conv import DilatedBlock
from ..modules.stage_conditioning import StageGain, StageNorm
from .options import EmbeddedOptions, LinearOptions, Options

PATCH = 2  # a cell of the half grid makes 2x2 pixels of a step


class StagedBlock(nn.Module):
    """Pre-activation residual block whose two convolutions are scaled by the stage.

    Args:
        num_stages: Number of stages.
        num_channels: Channels of input and output.
        hidden_channels: Channels between the convolutions.
    """

    def __init__(self, num_stages: int, num_channels: int, hidden_channels: int):
        super().__init__()
        self.norm = group_norm(num_channels)
        self.expand = nn.Conv2d(num_channels, hidden_channels, 3, padding=1)
        self.project = nn.Conv2d(hidden_channels, num_channels, 1)
        self.scale_in = StageGain(num_stages, num_channels)
        self.scale_hidden = StageGain(num_stages, hidden_channels)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Apply the block: `b c h w` -> `b c h w`."""
        normed = self.scale_in.scaled_norm(self.norm, x, stage).relu_()
        return x + self.project(self.scale_hidden.scaled_conv(self.expand, normed, stage).relu_())


class ConvRefiner(nn.Module):
    """Proposes steps for images, like a small U-Net.

    Two strided convolutions lead to a quarter of the size, residual blocks follow there, and a
    transposed convolution leads back to half the size. Each stage has a linear head of its own.

    Args:
        num_stages: Number of stages.
        codebook_size: Steps at each stage, k.
        num_channels: Channels of a state.
        hidden_channels: Channels on the quarter grid.
        feature_channels: Channels on the half grid, the head's input.
        num_residual_blocks: Residual blocks on the quarter grid.
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
        # Zeros: at first each step equals its bias, so that `VQDraw.init_from_data` decides what it is.
        self.head = nn.Parameter(torch.zeros(num_stages, codebook_size, pixels, feature_channels + 1))

    def forward(self, state: Tensor, stage: int) -> Options:
        """Return the options of a stage for states `b c h w`."""
        fine = self.half_scale.scaled_conv(self.to_half, channels_last(state), stage).relu_()
        coarse = self.to_quarter(fine)
        for block in self.blocks:
            coarse = block(coarse, stage)
        features = self.refine(fine + channels_last(self.back(F.relu(coarse))), stage)
        features = self.scale_out.scaled_norm(self.norm, features, stage).relu_()
        # A constant feature gives the linear head its bias.
        features = F.pad(rearrange(features, "b f h w -> b h w f"), (0, 1), value=1.0)
        return LinearOptions(features, self.head[stage], PATCH)


class DilatedConvRefiner(nn.Module):
    """Proposes steps for text with bidirectional dilated convolutions.

    Its input is the distribution over symbols at each position. The spans of one text are next to
    each other in the batch, `(b s) t ...`, but the convolutions run over the whole text. So each span
    knows the current state of its neighbors.

    Args:
        num_stages: Number of stages.
        codebook_size: Steps at each stage, k.
        num_symbols: Number of symbols, v.
        num_spans: Spans of a text, s.
        span_length: Positions of a span, t.
        hidden_channels: Channels of the blocks.
        feature_channels: Channels of the head's input.
        embedding_dim: Dimension of the space in which steps are made, see `EmbeddedOptions`.
        dilations: One block for each dilation.
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
        # Zeros: at first each step equals its bias, see `ConvRefiner`.
        self.head = nn.Parameter(torch.zeros(num_stages, codebook_size, embedding_dim, feature_channels))
        self.embedding = nn.Parameter(torch.randn(num_symbols, embedding_dim) * embedding_dim**-0.5)

    def forward(self, state: Tensor, stage: int) -> Options:
        """Return the options of a stage for states `(b s) t v`."""
        probabilities = rearrange(state, "(b s) t v -> b (s t) v", s=self.num_spans).softmax(dim=2)
        # A uniform distribution over v symbols has the norm v^-0.5: the factor makes it one.
        hidden = self.read(probabilities * probabilities.shape[2] ** 0.5) + self.positions
        for block in self.blocks:
            hidden = block(hidden, stage)
        features = self.features(self.norm(hidden, stage).relu_())
        features = rearrange(features, "b (s t) f -> (b s) t f", s=self.num_spans)
        return EmbeddedOptions(features, self.head[stage], self.embedding)


class SegmentedRefiner(nn.Module):
    """Refiner of several segments of stages, with a refiner for each.

    Args:
        refiners: Refiners of the segments, in order.
        segment_length: Stages of a segment.
    """

    def __init__(self, refiners: list[nn.Module], segment_length: int):
        super().__init__()
        self.refiners, self.segment_length = nn.ModuleList(refiners), segment_length

    def forward(self, state: Tensor, stage: int) -> Options:
        """Return the options of a stage, counted over all segments, for states `b ...`."""
        return self.refiners[stage // self.segment_length](state, stage % self.segment_length)


def build_segments(
    build: Callable[..., nn.Module], num_stages: int, segment_length: int, *, active_stages: int = 0
) -> nn.Module:
    """Build one refiner for each segment of stages.

    Args:
        build: Function that builds a refiner from `num_stages`.
        num_stages: Number of stages of all segments together.
        segment_length: Stages of a segment; 0 = one segment.
        active_stages: Stages that are run; 0 = all. Segments after them are frozen.

    Returns:
        A `SegmentedRefiner`, or the only refiner if there is one segment.
    """
    length = segment_length or num_stages
    refiners = [build(num_stages=length) for _ in range(num_stages // length)]
    num_active_segments = -(-(active_stages or num_stages) // length)
    for refiner in refiners[num_active_segments:]:
        refiner.requires_grad_(False)
    return refiners[0] if len(refiners) == 1 else SegmentedRefiner(refiners, length)
