"""Convert between pixels in [0, 1] and the normalized range that a model computes in."""

import math
from typing import Any

import torch
from torch import Tensor

from ..validation import nearest_multiples, should_validate

# Bicubic and Lanczos resampling ring at edges: pixels may leave [0, 1] by less than this.
OVERSHOOT = 0.5


class PixelNormalization:
    """Normalize pixels with the constants of a config, and check that images fit it.

    Args:
        config: A config with `pixel_mean`, `pixel_std`, `num_channels` and `image_size` (pixels).
        stride: Accept any height and width that it divides; 0 accepts only `image_size`.
    """

    def __init__(self, config: Any, *, stride: int = 0):
        self.config, self.stride = config, stride

    def __call__(self, pixel_values: Tensor, *, check_range: bool = False) -> Tensor:
        """Normalize images.

        Args:
            pixel_values: Images `b c h w`, floats in [0, 1].
            check_range: Raise an error for NaN, infinity and values far from [0, 1]. For inputs
                whose codes are kept: a model encodes anything, and nothing in the codes would show
                the mistake.

        Returns:
            Normalized images `b c h w`, float32.

        Raises:
            ValueError: For another shape or dtype, and with `check_range` for pixels that cannot be
                in [0, 1].
        """
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"pixel_values must be a tensor of floats in [0, 1], got a {type(pixel_values).__name__}")
        self.check_shape(pixel_values)
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floats in [0, 1], got {pixel_values.dtype}")
        if check_range:
            check_pixel_range(pixel_values)
        return (pixel_values.float() - self.config.pixel_mean) / self.config.pixel_std

    def check_shape(self, pixel_values: Tensor) -> None:
        """Raise a ValueError unless images `b c h w` have the channels and a size of the config."""
        channels, side = self.config.num_channels, self.config.image_size
        shape = tuple(pixel_values.shape)
        expected = (channels, "h", "w") if self.stride else (channels, side, side)
        sides = shape[2:] if self.stride else (side, side)
        if len(shape) != 4 or shape[1:] != (channels, *sides):
            raise ValueError(f"pixel_values must be `b {' '.join(map(str, expected))}`, got {shape}")
        if self.stride:
            check_divisible(shape[2], shape[3], self.stride)

    def inverse(self, normalized: Tensor) -> Tensor:
        """Convert normalized images `b c h w` to pixels, clamped to [0, 1]."""
        return (normalized.float() * self.config.pixel_std + self.config.pixel_mean).clamp(0, 1)

    def squared_error(self, normalized: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of normalized `b c h w` in pixel units, detached."""
        return (normalized.detach() - target).square().mean() * self.config.pixel_std**2


def check_pixel_range(pixel_values: Tensor) -> None:
    """Raise a ValueError for NaN, infinity, or values that cannot be meant for [0, 1].

    Those are pixels in 0..255 or -1..1, for example. Resampling may leave [0, 1] a little. Values
    are read only where `should_validate` allows it.
    """
    if not should_validate(pixel_values):
        return
    # Both extremes in one tensor: a GPU is synchronized once.
    least, most = torch.stack(pixel_values.detach().aminmax()).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("pixel_values must be floats in [0, 1], got NaN or infinity")
    if least < -OVERSHOOT or most > 1 + OVERSHOOT:
        raise ValueError(f"pixel_values must be floats in [0, 1], got {least:g} to {most:g}")


def check_divisible(height: int, width: int, stride: int) -> None:
    """Raise a ValueError with the nearest sizes unless `stride` divides height and width."""
    if height % stride or width % stride or not height * width:
        sizes = zip(nearest_multiples(height, stride), nearest_multiples(width, stride), strict=True)
        nearest = ", ".join(f"{rows} x {columns}" for rows, columns in sizes if rows and columns)
        raise ValueError(
            f"height and width must be multiples of {stride}, got {height} x {width}; the nearest: {nearest}"
        )
