"""Better codes from a trained VQ-VAE: for each picture its training goes on a little, of the latents alone.

An encoder answers all pictures by the same weights, and for each of them there are better codes near those it gives (the amortization gap,
Cremer et al. 2018). A few steps down the gradient of the training loss find some of them, as in semi-amortized inference (Kim et al. 2018):
its first term moves latents to where the decoder wants them, its second holds them near codebook entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reconstruction import ReconstructionLoss

STEP = 0.2  # root mean square of a step, as a share of that of what codes leave of the latents
SHORTER = 0.3  # by which a step is cut as long as none has made the picture better


@dataclass
class Coded:
    """What becomes of pictures.

    Attributes:
        normalized: the pictures, `b c h w`. loss: of the quantizers, a scalar.
        codes: of each grid. rests: what they leave of the latents of each grid that had something added to them, `b d h w`.
    """

    normalized: Tensor
    codes: list[Tensor]
    loss: Tensor
    rests: list[Tensor]


@dataclass
class Attempt:
    """Pictures whose latents have something added to them.

    Attributes:
        errors: of each picture, `b`. codes: of each grid.
        offsets: what was added, `b d h w` for each grid. ways: in which to go on from there, a step's length 1.
    """

    errors: Tensor
    codes: list[Tensor]
    offsets: list[Tensor]
    ways: list[Tensor]


def search(
    code: Callable[[list[Tensor]], Coded],
    target: Tensor,
    offsets: list[Tensor],
    *,
    measure: ReconstructionLoss,
    num_steps: int,
) -> Attempt:
    """For each picture `b c h w` the best of the attempts on the way, the first of which adds nothing.

    Args:
        code: from what is to be added to the latents of each grid to what becomes of the pictures.
        offsets: zeros like the latents of each grid, `b d h w`.
        measure: the error that training lowers, and that tells which codes are best.
    """
    start = best = now = attempt(code, target, offsets, measure)
    length = target.new_full((len(target), 1, 1, 1), STEP)
    for _ in range(num_steps):
        offsets = [offset + length * way for offset, way in zip(now.offsets, now.ways, strict=True)]
        now = attempt(code, target, offsets, measure)
        best = either(now.errors < best.errors, now, best)
        stuck = best.errors >= start.errors
        now, length = either(stuck, start, now), where(stuck, SHORTER * length, length)
    return best


@torch.enable_grad()
def attempt(
    code: Callable[[list[Tensor]], Coded], target: Tensor, offsets: list[Tensor], measure: ReconstructionLoss
) -> Attempt:
    """What becomes of pictures `b c h w` with these offsets, and the way down the gradient of their loss."""
    offsets = [offset.detach().requires_grad_() for offset in offsets]
    coded = code(offsets)
    errors = torch.vmap(measure)(coded.normalized, target)
    gradients = torch.autograd.grad(errors.mean() + coded.loss, offsets)
    ways = [
        -size_of(rest) / size_of(gradient).clamp_min(1e-30) * gradient
        for rest, gradient in zip(coded.rests, gradients, strict=True)
    ]
    return Attempt(errors.detach(), coded.codes, [offset.detach() for offset in offsets], ways)


def either(mask: Tensor, one: Attempt, other: Attempt) -> Attempt:
    """Of each picture one attempt where a mask `b` is true, and the other where it is not."""
    pairs = [
        [where(mask, *pair) for pair in zip(getattr(one, name), getattr(other, name), strict=True)]
        for name in ("codes", "offsets", "ways")
    ]
    return Attempt(where(mask, one.errors, other.errors), *pairs)


def where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`b ...`, those of `one` where a mask `b` is true."""
    return torch.where(mask.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def size_of(x: Tensor) -> Tensor:
    """Root mean square of each example of `b d h w`, `b 1 1 1`."""
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
