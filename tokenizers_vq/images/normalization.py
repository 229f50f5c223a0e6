"""Between pixels in [0, 1], which the world sees, and the scale that a model computes in."""

import math
from typing import Any

import torch
from torch import Tensor

from ..validation import nearest_multiples, should_validate

OVERSHOOT = 0.5  # more than any resampling of images does


class PixelNormalization:
    """Shifts and scales by `pixel_mean` and `pixel_std` of a config, and refuses images that do not fit it.

    Args:
        stride: take any height and width that it divides; 0: `image_size` of the config alone.
    """

    def __init__(self, config: Any, *, stride: int = 0):
        self.config, self.stride = config, stride

    def __call__(self, pixel_values: Tensor, *, finite: bool = False) -> Tensor:
        """`b c h w` in [0, 1] -> normalised `b c h w`, float32.

        Args:
            finite: refuse NaN, infinity and what is far from [0, 1] too; for where codes are kept, since all of it would code as something.

        Raises:
            ValueError: for another shape, and for what is no floats, or none in [0, 1].
        """
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"pixel_values must be a tensor of floats in [0, 1], got a {type(pixel_values).__name__}")
        self.check_shape(pixel_values)
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floats in [0, 1], got {pixel_values.dtype}")
        if finite:
            check_values(pixel_values)
        return (pixel_values.float() - self.config.pixel_mean) / self.config.pixel_std

    def check_shape(self, pixel_values: Tensor) -> None:
        """ValueError for images of another size or number of channels."""
        channels, side = self.config.num_channels, self.config.image_size
        shape = tuple(pixel_values.shape)
        wanted = (channels, "h", "w") if self.stride else (channels, side, side)
        sides = shape[2:] if self.stride else (side, side)
        if len(shape) != 4 or shape[1:] != (channels, *sides):
            raise ValueError(f"pixel_values must be `b {' '.join(map(str, wanted))}`, got {shape}")
        if self.stride:
            check_sides(shape[2], shape[3], self.stride)

    def inverse(self, normalized: Tensor) -> Tensor:
        """Normalised `b c h w` -> pixels, clamped to [0, 1]."""
        return (normalized.float() * self.config.pixel_std + self.config.pixel_mean).clamp(0, 1)

    def squared_error(self, normalized: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of two normalised batches in units of pixels, a detached scalar."""
        return (normalized.detach() - target).square().mean() * self.config.pixel_std**2


def check_values(pixel_values: Tensor) -> None:
    """Refuse pixels that cannot be meant for [0, 1], where that is `should_validate`; what resampling has left of it can."""
    if not should_validate(pixel_values):
        return
    least, most = torch.stack(pixel_values.detach().aminmax()).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("pixel_values must be floats in [0, 1], got NaN or infinity")
    if least < -OVERSHOOT or most > 1 + OVERSHOOT:
        raise ValueError(f"pixel_values must be floats in [0, 1], got {least:g} to {most:g}")


def check_sides(height: int, width: int, stride: int) -> None:
    """Refuse images that a grid of this stride does not cover, and name the nearest sizes that it does."""
    if height % stride or width % stride or not height * width:
        sizes = zip(nearest_multiples(height, stride), nearest_multiples(width, stride), strict=True)
        nearest = ", ".join(f"{rows} x {columns}" for rows, columns in sizes if rows and columns)
        raise ValueError(
            f"height and width must be multiples of {stride}, got {height} x {width}; the nearest: {nearest}"
        )
