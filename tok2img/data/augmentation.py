"""Augmentation of training images: random flips, crops, shifts and warps.

The random numbers come from the caller, so that a resumed run sees the same images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NUM_CONTROL_POINTS = 4  # along a side, of the elastic part of a warp


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Attributes:
        flip: Mirror half of the images.
        crop: Smallest fraction of the sides that a random square crop keeps (Krizhevsky et al. 2012, with the
            sizes of Szegedy et al. 2015 but without their distortion). 1 = no cropping.
        shift: Largest shift in pixels, in both directions; the edges are filled by reflection. Without crops
            a tokenizer then sees everything at every position of its grid.
        warp: Strength of a random warp of half of the images (Simard et al. 2003). The affine matrix differs
            from the identity by at most this much in each entry, and an elastic field from a few control
            points by half as much. The border color continues beyond the edges. 0 = no warp.

    Raises:
        ValueError: If `crop` is not in (0, 1], `shift` is negative, or `warp` is not in [0, 0.25).
    """

    flip: bool = False
    crop: float = 1.0
    shift: int = 0
    warp: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie above 0 and not above 1, got {self.crop}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}")
        if not 0 <= self.warp < 0.25:  # beyond that an image could fold over itself
            raise ValueError(f"warp must be at least 0 and below 0.25, got {self.warp}")

    def __bool__(self) -> bool:
        return self.flip or self.crop < 1 or self.shift > 0 or self.warp > 0

    @property
    def num_draws(self) -> int:
        """Number of random numbers that one image takes."""
        return 4 + (1 + 4 + 2 * NUM_CONTROL_POINTS**2 if self.warp else 0)

    def __call__(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            pixel_values: Images, `b c h w`.
            draws: Random numbers in [0, 1), `b num_draws`: for flip, crop size, position and warp.

        Returns:
            Augmented images, `b c h w`.
        """
        if self.warp:
            warped = rearrange(draws[:, 4] < 0.5, "b -> b 1 1 1")
            pixel_values = torch.where(warped, self._warped(pixel_values, draws[:, 5:]), pixel_values)
        mirrored = (draws[:, 0] < 0.5) & self.flip
        pixel_values = torch.where(rearrange(mirrored, "b -> b 1 1 1"), pixel_values.flip(-1), pixel_values)
        return pixel_values if self.crop == 1 and not self.shift else self._framed(pixel_values, draws[:, 1:4])

    def _framed(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Crop or shift images `b c h w` by random numbers `b 3`, for the size and the position of the crop."""
        place, side = 2 * draws[:, 1:] - 1, (self.crop + (1 - self.crop) * draws[:, 0])[:, None]
        half_size = draws.new_tensor([pixel_values.shape[-1], pixel_values.shape[-2]]) / 2
        moved = ((1 - side) * half_size + self.shift) * place
        if self.crop == 1:
            moved = ((self.shift + 0.5) * place).round()  # whole pixels, uniformly: nothing is blurred
        centre = moved / half_size
        frames = torch.cat([torch.diag_embed(side.expand(-1, 2)), centre[..., None]], dim=-1)
        grid = F.affine_grid(frames.to(pixel_values), list(pixel_values.shape), align_corners=False)
        return F.grid_sample(pixel_values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _warped(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Warp images `b c h w` by random numbers for the affine matrix and the elastic field.

        Bicubic sampling, because bilinear sampling would blur thin strokes.
        """
        size = list(pixel_values.shape)
        moves = self.warp * (2 * draws.to(pixel_values) - 1)
        matrices = torch.eye(2).to(moves) + moves[:, :4].unflatten(1, (2, 2))
        pulls = moves[:, 4:].unflatten(1, (2, NUM_CONTROL_POINTS, NUM_CONTROL_POINTS)) / 2
        bends = F.interpolate(pulls, size[2:], mode="bicubic", align_corners=False)
        grid = F.affine_grid(F.pad(matrices, (0, 1)), size, align_corners=False)
        grid = grid + rearrange(bends, "b c h w -> b h w c")
        warped = F.grid_sample(pixel_values, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return warped.clamp(0, 1)
