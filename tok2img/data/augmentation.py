"""Images as a tokenizer sees them in training: warped, mirrored, moved, and parts of them.

By numbers that the caller draws, not by chance of its own, so that a run that is taken up again sees the same images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BENDS = 4  # points along a side that a bent image is pulled at


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image.

    Attributes:
        flip: mirror half of the images.
        crop: least share of the sides that is kept, of squares of any size up to the whole (Krizhevsky et al. 2012; sizes as in Szegedy
            et al. 2015, without their distortion); 1: all of it.
        shift: pixels that an image is moved by, up and down and to the sides, at most; what comes in at an edge is its mirror image. What
            a tokenizer without crops has seen in one place of its grid of codes it then sees in all.
        warp: turn, slant and stretch half of the images about their middle, by a matrix whose numbers differ from those of the
            identity by so much at most, and bend them by half as much (Simard et al. 2003, their field from few points); the ground
            goes on beyond the edges.

    Raises:
        ValueError: for a share that is none, a shift below 0, or a warp that is not from 0 to below 0.25.
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
        if not 0 <= self.warp < 0.25:  # beyond, an image could be folded up
            raise ValueError(f"warp must be at least 0 and below 0.25, got {self.warp}")

    def __bool__(self) -> bool:
        return self.flip or self.crop < 1 or self.shift > 0 or self.warp > 0

    @property
    def num_draws(self) -> int:
        """Numbers that decide about one image."""
        return 4 + (1 + 4 + 2 * BENDS**2 if self.warp else 0)

    def __call__(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Images `b c h w` and numbers from 0 to 1 `b num_draws`, for mirror, size, place and warp, -> `b c h w`."""
        if self.warp:
            warped = rearrange(draws[:, 4] < 0.5, "b -> b 1 1 1")
            pixel_values = torch.where(warped, self._warped(pixel_values, draws[:, 5:]), pixel_values)
        mirrored = (draws[:, 0] < 0.5) & self.flip
        pixel_values = torch.where(rearrange(mirrored, "b -> b 1 1 1"), pixel_values.flip(-1), pixel_values)
        return pixel_values if self.crop == 1 and not self.shift else self._framed(pixel_values, draws[:, 1:4])

    def _framed(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Images `b c h w` and `b 3`, for the side of a frame and its place, -> what the frame shows, `b c h w`."""
        place, side = 2 * draws[:, 1:] - 1, (self.crop + (1 - self.crop) * draws[:, 0])[:, None]
        half_size = draws.new_tensor([pixel_values.shape[-1], pixel_values.shape[-2]]) / 2
        moved = ((1 - side) * half_size + self.shift) * place
        if self.crop == 1:
            moved = ((self.shift + 0.5) * place).round()  # by whole pixels, all as often: nothing is blurred
        centre = moved / half_size
        frames = torch.cat([torch.diag_embed(side.expand(-1, 2)), centre[..., None]], dim=-1)
        grid = F.affine_grid(frames.to(pixel_values), list(pixel_values.shape), align_corners=False)
        return F.grid_sample(pixel_values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _warped(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Images `b c h w` and numbers for a matrix and for bends -> `b c h w`; by cubics, for lines would blur what is thin."""
        size = list(pixel_values.shape)
        moves = self.warp * (2 * draws.to(pixel_values) - 1)
        matrices = torch.eye(2).to(moves) + moves[:, :4].unflatten(1, (2, 2))
        pulls = moves[:, 4:].unflatten(1, (2, BENDS, BENDS)) / 2
        bends = F.interpolate(pulls, size[2:], mode="bicubic", align_corners=False)
        grid = F.affine_grid(F.pad(matrices, (0, 1)), size, align_corners=False)
        grid = grid + rearrange(bends, "b c h w -> b h w c")
        warped = F.grid_sample(pixel_values, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return warped.clamp(0, 1)
