"""Between pixels in [0, 1], which the world sees, and the scale that a model computes in."""

from typing import Any

from torch import Tensor


class PixelNormalization:
    """Shifts and scales by `pixel_mean` and `pixel_std` of a config, and refuses pictures that do not fit it."""

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, pixel_values: Tensor, *, finite: bool = False) -> Tensor:
        """`b c h w` in [0, 1] -> normalised `b c h w`, float32.

        Args:
            finite: refuse NaN and infinity too; for where codes are kept, since NaN would code as something.

        Raises:
            ValueError: for another shape, and for what is no floats.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            shape = "b " + " ".join(map(str, expected))
            raise ValueError(f"pixel_values must be `{shape}`, got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floats in [0, 1], got {pixel_values.dtype}")
        if finite and not pixel_values.isfinite().all():
            raise ValueError("pixel_values must be floats in [0, 1], got NaN or infinity")
        return (pixel_values.float() - self.config.pixel_mean) / self.config.pixel_std

    def inverse(self, normalized: Tensor) -> Tensor:
        """Normalised `b c h w` -> pixels, clamped to [0, 1]."""
        return (normalized.float() * self.config.pixel_std + self.config.pixel_mean).clamp(0, 1)

    def squared_error(self, normalized: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of two normalised batches in units of pixels, a detached scalar."""
        return (normalized.detach() - target).square().mean() * self.config.pixel_std**2
