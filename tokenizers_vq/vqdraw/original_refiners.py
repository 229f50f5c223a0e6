"""The refiners of the models that were published with VQ-DRAW (Nichol 2020), and their weights.

Four stacks of convolutions: down to a quarter or an eighth of the image, a few layers there, back up, and one convolution that makes
all options. Channels are scaled by gains that differ from stage to stage; a gain is mostly folded into the convolution before it.
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


class Stack(nn.ModuleList):
    """Layers in a row, some of which look at the stage."""

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b c h w` -> `b c h w`."""
        for layer, following in pairwise([*self, nn.Identity()]):
            if isinstance(following, StageGain):
                x = following.scaled_conv(layer, x, stage)
            elif isinstance(layer, Stack):
                x = layer(x, stage)
            elif not isinstance(layer, StageGain):
                x = layer(x)
        return x


class ResidualStack(Stack):
    """A stack whose output is added to its input."""

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """`b c h w` -> `b c h w`."""
        return x + super().forward(x, stage)


Layers = Iterator[nn.Module]
Gain = Callable[[int], StageGain]


def down(inside: int, outside: int, width: int) -> nn.Conv2d:
    """Half as many rows and columns."""
    return nn.Conv2d(inside, outside, width, stride=2, padding=width // 2)


def up(inside: int, outside: int) -> nn.ConvTranspose2d:
    """Twice as many rows and columns."""
    return nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1)


def same(inside: int, outside: int, width: int) -> nn.Conv2d:
    """As many rows and columns."""
    return nn.Conv2d(inside, outside, width, padding=width // 2)


def bottleneck(gain: Gain, width: int) -> ResidualStack:
    """The residual block of the larger models: a 3x3 convolution, then up to four times the channels and back."""
    convolutions = {same(width, width, 3): 8, same(width, 4 * width, 1): 8, same(4 * width, width, 1): width // 8}
    steps: list[nn.Module] = []
    for convolution, num_groups in convolutions.items():
        norm = nn.GroupNorm(num_groups, convolution.in_channels)
        steps += [nn.ReLU(), norm, convolution, gain(convolution.out_channels)]
    return ResidualStack(steps)


def mnist_layers(gain: Gain, num_channels: int) -> Layers:
    """1 x 28 x 28, no normalisation."""
    convolutions = [
        *(down(num_channels, 32, 3), down(32, 64, 3), same(64, 128, 3), same(128, 128, 3), same(128, 64, 3)),
        *(up(64, 64), up(64, 64)),
    ]
    for convolution in convolutions:
        yield from (convolution, gain(convolution.out_channels), nn.ReLU())


def svhn_layers(gain: Gain, num_channels: int) -> Layers:
    """3 x 32 x 32, normalised after each activation."""
    convolutions = [
        *(down(num_channels, 64, 5), down(64, 128, 5), same(128, 128, 3), same(128, 256, 3), same(256, 128, 3)),
        *(up(128, 128), up(128, 128)),
    ]
    for convolution in convolutions:
        channels = convolution.out_channels
        yield from (convolution, gain(channels), nn.ReLU(), nn.GroupNorm(min(8, channels // 16), channels))
    yield from (same(128, 128, 3), gain(128), nn.ReLU())


def cifar10_layers(gain: Gain, num_channels: int) -> Layers:
    """3 x 32 x 32, six residual blocks of 256 channels."""
    for convolution in (down(num_channels, 64, 5), down(64, 128, 5)):
        yield from (convolution, nn.ReLU(), nn.GroupNorm(8, convolution.out_channels))
    yield from (same(128, 256, 3), gain(256))
    yield from (bottleneck(gain, 256) for _ in range(6))
    for convolution in (up(256, 128), up(128, 128)):
        yield from (convolution, gain(128), nn.ReLU(), nn.GroupNorm(8, 128))
    yield from (same(128, 128, 3), gain(128), nn.ReLU())


def celeba_layers(gain: Gain, num_channels: int) -> Layers:
    """3 x 64 x 64, six residual blocks of 128 channels on an eighth of the size."""
    for convolution, num_groups in ((down(num_channels, 64, 5), 4), (down(64, 128, 5), 8), (down(128, 128, 5), 8)):
        yield from (convolution, nn.ReLU(), nn.GroupNorm(num_groups, convolution.out_channels))
    yield from (bottleneck(gain, 128) for _ in range(6))
    for _ in range(3):
        yield from (up(128, 128), gain(128), nn.ReLU(), nn.GroupNorm(8, 128))


# Layers, width and features of the last convolution, its scale at the start, whether every stage has one of its own, and the settings
# of the model that was trained: stages, stages of a segment, and images.
MNIST = {"image_size": 28, "num_channels": 1, "num_stages": 10, "pixel_mean": 0.1307, "pixel_std": 0.3081}
COLOUR = {"image_size": 32, "num_channels": 3, "pixel_mean": 0.5, "pixel_std": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "mnist": MNIST,
    "svhn": COLOUR | {"num_stages": 20, "segment_length": 5},
    "cifar10": COLOUR | {"num_stages": 100, "segment_length": 10, "checkpoint_stages": True},
    "celeba": COLOUR | {"image_size": 64, "num_stages": 100, "segment_length": 10, "checkpoint_stages": True},
}
LAYERS = {"mnist": mnist_layers, "svhn": svhn_layers, "cifar10": cifar10_layers, "celeba": celeba_layers}
HEAD_WIDTHS = {"mnist": 3, "svhn": 1, "cifar10": 5, "celeba": 5}
HEAD_FEATURES = {"mnist": 64, "svhn": 128, "cifar10": 128, "celeba": 128}
FIRST_SCALES = {"mnist": 0.1, "svhn": 0.1, "cifar10": 0.01, "celeba": 0.01}


def state_channels(name: str, *, gaussian: bool) -> int:
    """Channels of an architecture's states: those of its images, twice where each has a deviation."""
    return PRESETS[name]["num_channels"] * (2 if gaussian else 1)


class OriginalRefiner(nn.Module):
    """One of the published refiners, by the name of its data set: "mnist", "svhn", "cifar10" or "celeba".

    Args:
        gaussian: a state holds means and logarithms of deviations, `GaussianNLLLoss`'s `b 2c h w`; the layers see the deviations themselves.
    """

    def __init__(self, name: str, *, num_stages: int, codebook_size: int, gaussian: bool = False):
        super().__init__()
        num_channels = state_channels(name, gaussian=gaussian)
        self.layers = Stack(LAYERS[name](partial(StageGain, num_stages, init=torch.randn), num_channels))
        num_heads = num_stages if name == "svhn" else 1
        self.heads = nn.ModuleList(
            same(HEAD_FEATURES[name], codebook_size * num_channels, HEAD_WIDTHS[name]) for _ in range(num_heads)
        )
        self.codebook_size, self.gaussian = codebook_size, gaussian
        self.output_scale = nn.Parameter(torch.tensor(FIRST_SCALES[name]))

    def forward(self, state: Tensor, stage: int) -> Options:
        """State `b c h w` -> the options of a stage."""
        head: Any = self.heads[stage if len(self.heads) > 1 else 0]
        weight = head.weight.unflatten(0, (self.codebook_size, -1)) * self.output_scale
        bias = head.bias.unflatten(0, (self.codebook_size, -1)) * self.output_scale
        if self.gaussian:
            mean, log_std = state.chunk(2, dim=1)
            state = torch.cat([mean, log_std.exp()], dim=1)
        return ConvOptions(self.layers(channels_last(state), stage), weight, bias)
