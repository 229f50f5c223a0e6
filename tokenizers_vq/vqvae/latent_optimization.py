"""Better codes from a trained VQ-VAE: for each image its training goes on a little, of the latents alone.

An encoder answers all images by the same weights, and for each of them there are better codes near those it gives (the amortization gap,
Cremer et al. 2018). A few steps down the gradient of the training loss find some of them, as in semi-amortized inference (Kim et al. 2018):
its first term moves latents to where the decoder wants them, its second holds them near codebook entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.reconstruction import ReconstructionLoss

STEP_SIZE = 0.2  # root mean square of a step, as a share of that of what codes leave of the latents
BACKTRACK_FACTOR = 0.3  # by which a step is cut as long as none has made the image better


@dataclass
class QuantizedImages:
    """What becomes of images.

    Attributes:
        normalized: the images, `b c h w`. loss: of the quantizers, a scalar.
        codes: of each grid. rests: what they leave of the latents of each grid that had something added to them, `b d h w`.
    """

    normalized: Tensor
    codes: list[Tensor]
    loss: Tensor
    rests: list[Tensor]


@dataclass
class Attempt:
    """Images whose latents have something added to them.

    Attributes:
        offsets: what was added, `b d h w` for each grid. coded: what becomes of the images. errors: of each of them, `b`.
    """

    offsets: list[Tensor]
    coded: QuantizedImages
    errors: Tensor

    def ways(self) -> list[Tensor]:
        """Down the gradient of the loss from the offsets of each grid, `b d h w`: a step's length is 1. Can be asked once."""
        gradients = torch.autograd.grad(self.errors.mean() + self.coded.loss, self.offsets)
        return [
            -rms(rest) / rms(gradient).clamp_min(1e-30) * gradient
            for rest, gradient in zip(self.coded.rests, gradients, strict=True)
        ]


@torch.enable_grad()
def search(
    code: Callable[[list[Tensor]], QuantizedImages],
    target: Tensor,
    offsets: list[Tensor],
    *,
    measure: ReconstructionLoss,
    num_steps: int,
) -> tuple[list[Tensor], Tensor]:
    """Codes of each grid with which images `b c h w` come out best, of those met on the way, and their errors, `b`.

    Args:
        code: from what is to be added to the latents of each grid to what becomes of the images.
        offsets: zeros like the latents of each grid, `b d h w`.
        measure: the error that training lowers, and that tells which codes are best.
    """
    now = attempt(code, target, offsets, measure)
    codes, start = now.coded.codes, now.errors.detach()
    least, length, first = start, target.new_full((len(target), 1, 1, 1), STEP_SIZE), None
    for _ in range(num_steps):
        ways = now.ways()
        first, stuck = first or ways, least >= start  # from where none helped yet an image begins anew
        steps = zip(now.offsets, ways, first, strict=True)
        offsets = [where(stuck, length * anew, offset + length * way) for offset, way, anew in steps]
        now = attempt(code, target, offsets, measure)
        errors = now.errors.detach()
        codes = [where(errors < least, new, old) for new, old in zip(now.coded.codes, codes, strict=True)]
        least = least.minimum(errors)
        length = where(least >= start, BACKTRACK_FACTOR * length, length)
    return codes, least


def attempt(
    code: Callable[[list[Tensor]], QuantizedImages], target: Tensor, offsets: list[Tensor], measure: ReconstructionLoss
) -> Attempt:
    """What becomes of images `b c h w` with these offsets."""
    offsets = [offset.detach().requires_grad_() for offset in offsets]
    coded = code(offsets)
    return Attempt(offsets, coded, torch.vmap(measure)(coded.normalized, target))


def where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`b ...`, those of `one` where a mask `b` is true."""
    return torch.where(mask.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def rms(x: Tensor) -> Tensor:
    """Root mean square of each example of `b d h w`, `b 1 1 1`."""
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
