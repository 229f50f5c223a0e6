"""Finds better codes for an image by a few gradient steps on its latents, with the network frozen.

An encoder maps all images by the same weights, and near its codes there are better ones for each
single image: the amortization gap (Cremer et al. 2018). Some are found by descending the training
loss, as in semi-amortized inference (Kim et al. 2018). Its reconstruction term moves the latents to
where the decoder wants them; its commitment term keeps them near codebook entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.reconstruction import ReconstructionLoss

STEP_SIZE = 0.2  # length of a step in units of the quantization error (root mean squares)
BACKTRACK_FACTOR = 0.3  # shortens an image's step until one has lowered its error


@dataclass
class QuantizedImages:
    """Codes of a batch of images, and what training and search need of them.

    Attributes:
        reconstruction: Normalized reconstructions, `b c h w`; None if they were not asked for.
        codes: Codes of each grid, `b h w` or `b h w n`.
        loss: Sum of the quantizers' losses, a scalar.
        residuals: Latents minus quantized latents of each grid that got an offset, `b d h w`.
    """

    reconstruction: Tensor | None
    codes: list[Tensor]
    loss: Tensor
    residuals: list[Tensor]


@dataclass
class Candidate:
    """Codes of images whose latents were moved by offsets.

    Attributes:
        offsets: Offset to the latents of each grid, `b d h w`.
        quantized: The images quantized with these offsets.
        errors: Reconstruction error of each image, `b`.
    """

    offsets: list[Tensor]
    quantized: QuantizedImages
    errors: Tensor

    def descent_directions(self) -> list[Tensor]:
        """Return the negative gradient of the training loss to each offset, `b d h w`.

        The gradient of each image is scaled to the root mean square of its residual, so that one
        step size fits all images. It can be computed once, because the graph is freed.
        """
        gradients = torch.autograd.grad(self.errors.mean() + self.quantized.loss, self.offsets)
        return [
            -rms(residual) / rms(gradient).clamp_min(1e-30) * gradient
            for residual, gradient in zip(self.quantized.residuals, gradients, strict=True)
        ]


@torch.enable_grad()
def optimize_latents(
    quantize: Callable[[list[Tensor]], QuantizedImages],
    target: Tensor,
    offsets: list[Tensor],
    *,
    measure: ReconstructionLoss,
    num_steps: int,
) -> tuple[list[Tensor], Tensor]:
    """Descend the training loss from the encoder's latents and return the best codes on the way.

    An image follows its gradient as soon as a step has lowered its error. Until then it tries the
    first direction again, with a shorter step each time (backtracking line search).

    Args:
        quantize: Quantizes and decodes the images with an offset to the latents of each grid.
        target: Normalized images, `b c h w`.
        offsets: Zeros in the shape of the latents of each grid, `b d h w`.
        measure: Reconstruction loss that training lowers. It also decides which codes are best.
        num_steps: Gradient steps. Each costs a forward and a backward pass of the decoder.

    Returns:
        The best codes of each grid, `b h w` or `b h w n`, and their errors, `b`.
    """
    candidate = evaluate_offsets(quantize, target, offsets, measure)
    best_codes, initial_errors = candidate.quantized.codes, candidate.errors.detach()
    best_errors = initial_errors
    step_sizes = target.new_full((len(target), 1, 1, 1), STEP_SIZE)
    first_directions: list[Tensor] = []
    for _ in range(num_steps):
        directions = candidate.descent_directions()
        first_directions = first_directions or directions
        unimproved = best_errors >= initial_errors
        offsets = [
            select_examples(unimproved, step_sizes * first, offset + step_sizes * direction)
            for offset, direction, first in zip(candidate.offsets, directions, first_directions, strict=True)
        ]
        candidate = evaluate_offsets(quantize, target, offsets, measure)
        errors = candidate.errors.detach()
        best_codes = [
            select_examples(errors < best_errors, codes, best)
            for codes, best in zip(candidate.quantized.codes, best_codes, strict=True)
        ]
        best_errors = best_errors.minimum(errors)
        step_sizes = select_examples(best_errors >= initial_errors, BACKTRACK_FACTOR * step_sizes, step_sizes)
    return best_codes, best_errors


def evaluate_offsets(
    quantize: Callable[[list[Tensor]], QuantizedImages],
    target: Tensor,
    offsets: list[Tensor],
    measure: ReconstructionLoss,
) -> Candidate:
    """Quantize and decode images `b c h w` with these offsets, and measure their errors."""
    offsets = [offset.detach().requires_grad_() for offset in offsets]
    quantized = quantize(offsets)
    assert quantized.reconstruction is not None
    # A loss is a mean over a batch; vmap gives that of each image.
    return Candidate(offsets, quantized, torch.vmap(measure)(quantized.reconstruction, target))


def select_examples(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Select examples `b ...` of `chosen` where the mask, `b` bool, is True, else of `other`."""
    return torch.where(mask.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each example, `b d h w` -> `b 1 1 1`."""
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
