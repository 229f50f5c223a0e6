"""Pictures as a tokenizer sees them in training: parts of them, moved, and mirrored.

By numbers that the caller draws, not by chance of its own, so that a run that is taken up again sees the same pictures.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to a picture.

    Attributes:
        flip: mirror half of the pictures.
        crop: least share of the sides that is kept, of squares of any size up to the whole (Krizhevsky et al. 2012; sizes as in Szegedy
            et al. 2015, without their distortion); 1: all of it.
        shift: pixels that a picture is moved by, up and down and to the sides, at most; what comes in at an edge is its mirror image. What
            a tokenizer without crops has seen in one place of its grid of codes it then sees in all.

    Raises:
        ValueError: for a share that is none, or a shift below 0.
    """

    flip: bool = False
    crop: float = 1.0
    shift: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie above 0 and not above 1, got {self.crop}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}")

    def __bool__(self) -> bool:
        return self.flip or self.crop < 1 or self.shift > 0

    def __call__(self, pixel_values: Tensor, draws: Tensor) -> Tensor:
        """Pictures `b c h w` and numbers from 0 to 1 `b 4`, for mirror, size and place, -> `b c h w`."""
        mirrored = (draws[:, 0] < 0.5) & self.flip
        pixel_values = torch.where(rearrange(mirrored, "b -> b 1 1 1"), pixel_values.flip(-1), pixel_values)
        if self.crop == 1 and not self.shift:
            return pixel_values
        place, side = 2 * draws[:, 2:] - 1, (self.crop + (1 - self.crop) * draws[:, 1])[:, None]
        half_size = draws.new_tensor([pixel_values.shape[-1], pixel_values.shape[-2]]) / 2
        moved = ((1 - side) * half_size + self.shift) * place
        if self.crop == 1:
            moved = ((self.shift + 0.5) * place).round()  # by whole pixels, all as often: nothing is blurred
        centre = moved / half_size
        frames = torch.cat([torch.diag_embed(side.expand(-1, 2)), centre[..., None]], dim=-1)
        grid = F.affine_grid(frames.to(pixel_values), list(pixel_values.shape), align_corners=False)
        return F.grid_sample(pixel_values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
