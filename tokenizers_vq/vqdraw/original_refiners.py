"""Refiners of the models that were published with VQ-DRAW (Nichol 2020).

Each is a stack of convolutions: down to a quarter or an eighth of the image, a few layers there, back
up, and one convolution that makes all options. Stage gains scale the channels; most are folded into
the convolution before them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.conv import channels_last
from ..modules.stage_conditioning import StageGain
from .options import ConvOptions, Options


class StagedSequential(nn.ModuleList):
    """Sequence of layers, some of which depend on the stage."""

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Apply the layers at a stage: `b c h w` -> `b c h w`."""
        for layer, following in pairwise([*self, nn.Identity()]):
            if isinstance(following, StageGain):  # applied with its convolution, and skipped below
                x = following.scaled_conv(layer, x, stage)
            elif isinstance(layer, StagedSequential):
                x = layer(x, stage)
            elif not isinstance(layer, StageGain):
                x = layer(x)
        return x


class ResidualSequential(StagedSequential):
    """Sequence of layers whose output is added to its input."""

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Apply the block at a stage: `b c h w` -> `b c h w`."""
        return x + super().forward(x, stage)


Layers = Iterator[nn.Module]
MakeGain = Callable[[int], StageGain]


def down_conv(in_channels: int, out_channels: int, width: int) -> nn.Conv2d:
    """Build a convolution that halves height and width."""
    return nn.Conv2d(in_channels, out_channels, width, stride=2, padding=width // 2)


def up_conv(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Build a transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


def same_conv(in_channels: int, out_channels: int, width: int) -> nn.Conv2d:
    """Build a convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, width, padding=width // 2)


def bottleneck(gain: MakeGain, width: int) -> ResidualSequential:
    """Build the residual block of the larger models: 3x3, then 1x1 to four times the channels and back."""
    convolutions = {
        same_conv(width, width, 3): 8,
        same_conv(width, 4 * width, 1): 8,
        same_conv(4 * width, width, 1): width // 8,
    }  # and the number of groups before each
    layers: list[nn.Module] = []
    for convolution, num_groups in convolutions.items():
        norm = nn.GroupNorm(num_groups, convolution.in_channels)
        layers += [nn.ReLU(), norm, convolution, gain(convolution.out_channels)]
    return ResidualSequential(layers)


def mnist_layers(gain: MakeGain, num_channels: int) -> Layers:
    """Yield the layers for 1x28x28 images, without normalization."""
    convolutions = [
        *(
            down_conv(num_channels, 32, 3),
            down_conv(32, 64, 3),
            same_conv(64, 128, 3),
            same_conv(128, 128, 3),
            same_conv(128, 64, 3),
        ),
        *(up_conv(64, 64), up_conv(64, 64)),
    ]
    for convolution in convolutions:
        yield from (convolution, gain(convolution.out_channels), nn.ReLU())


def svhn_layers(gain: MakeGain, num_channels: int) -> Layers:
    """Yield the layers for 3x32x32 images, normalized after each activation."""
    convolutions = [
        *(
            down_conv(num_channels, 64, 5),
            down_conv(64, 128, 5),
            same_conv(128, 128, 3),
            same_conv(128, 256, 3),
            same_conv(256, 128, 3),
        ),
        *(up_conv(128, 128), up_conv(128, 128)),
    ]
    for convolution in convolutions:
        channels = convolution.out_channels
        yield from (convolution, gain(channels), nn.ReLU(), nn.GroupNorm(min(8, channels // 16), channels))
    yield from (same_conv(128, 128, 3), gain(128), nn.ReLU())


def cifar10_layers(gain: MakeGain, num_channels: int) -> Layers:
    """Yield the layers for 3x32x32 images: six residual blocks of 256 channels."""
    for convolution in (down_conv(num_channels, 64, 5), down_conv(64, 128, 5)):
        yield from (convolution, nn.ReLU(), nn.GroupNorm(8, convolution.out_channels))
    yield from (same_conv(128, 256, 3), gain(256))
    yield from (bottleneck(gain, 256) for _ in range(6))
    for convolution in (up_conv(256, 128), up_conv(128, 128)):
        yield from (convolution, gain(128), nn.ReLU(), nn.GroupNorm(8, 128))
    yield from (same_conv(128, 128, 3), gain(128), nn.ReLU())


def celeba_layers(gain: MakeGain, num_channels: int) -> Layers:
    """Yield the layers for 3x64x64 images: six residual blocks of 128 channels at an eighth of the size."""
    for convolution, num_groups in (
        (down_conv(num_channels, 64, 5), 4),
        (down_conv(64, 128, 5), 8),
        (down_conv(128, 128, 5), 8),
    ):
        yield from (convolution, nn.ReLU(), nn.GroupNorm(num_groups, convolution.out_channels))
    yield from (bottleneck(gain, 128) for _ in range(6))
    for _ in range(3):
        yield from (up_conv(128, 128), gain(128), nn.ReLU(), nn.GroupNorm(8, 128))


# Settings of the trained models of the paper.
MNIST = {"image_size": 28, "num_channels": 1, "num_stages": 10, "pixel_mean": 0.1307, "pixel_std": 0.3081}
RGB = {"image_size": 32, "num_channels": 3, "pixel_mean": 0.5, "pixel_std": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "mnist": MNIST,
    "svhn": RGB | {"num_stages": 20, "segment_length": 5},
    "cifar10": RGB | {"num_stages": 100, "segment_length": 10, "checkpoint_stages": True},
    "celeba": RGB | {"image_size": 64, "num_stages": 100, "segment_length": 10, "checkpoint_stages": True},
}
LAYERS = {"mnist": mnist_layers, "svhn": svhn_layers, "cifar10": cifar10_layers, "celeba": celeba_layers}
# The head, the last convolution: kernel width, input channels, and scale of its output at the start.
HEAD_WIDTHS = {"mnist": 3, "svhn": 1, "cifar10": 5, "celeba": 5}
HEAD_FEATURES = {"mnist": 64, "svhn": 128, "cifar10": 128, "celeba": 128}
INITIAL_OUTPUT_SCALES = {"mnist": 0.1, "svhn": 0.1, "cifar10": 0.01, "celeba": 0.01}


def state_channels(name: str, *, gaussian: bool) -> int:
    """Return the channels of an architecture's states, doubled if each value has a deviation."""
    return PRESETS[name]["num_channels"] * (2 if gaussian else 1)


class OriginalRefiner(nn.Module):
    """One of the refiners of the paper.

    Args:
        name: Its data set: "mnist", "svhn", "cifar10" or "celeba".
        num_stages: Number of stages.
        codebook_size: Options at each stage, k.
        gaussian: True if states hold means and log standard deviations, `b (2 c) h w`, as those of
            `GaussianNLLLoss`. The layers see standard deviations.
    """

    def __init__(self, name: str, *, num_stages: int, codebook_size: int, gaussian: bool = False):
        super().__init__()
        num_channels = state_channels(name, gaussian=gaussian)
        self.layers = StagedSequential(LAYERS[name](partial(StageGain, num_stages, init=torch.randn), num_channels))
        # SVHN has a 1x1 head for each stage, the others share one head between stages.
        num_heads = num_stages if name == "svhn" else 1
        self.heads = nn.ModuleList(
            same_conv(HEAD_FEATURES[name], codebook_size * num_channels, HEAD_WIDTHS[name]) for _ in range(num_heads)
        )
        self.codebook_size, self.gaussian = codebook_size, gaussian
        self.output_scale = nn.Parameter(torch.tensor(INITIAL_OUTPUT_SCALES[name]))

    def forward(self, state: Tensor, stage: int) -> Options:
        """Return the options of a stage for states `b c h w`."""
        head: Any = self.heads[stage if len(self.heads) > 1 else 0]
        weight = head.weight.unflatten(0, (self.codebook_size, -1)) * self.output_scale
        bias = head.bias.unflatten(0, (self.codebook_size, -1)) * self.output_scale
        if self.gaussian:
            mean, log_std = state.chunk(2, dim=1)
            state = torch.cat([mean, log_std.exp()], dim=1)
        return ConvOptions(self.layers(channels_last(state), stage), weight, bias)
