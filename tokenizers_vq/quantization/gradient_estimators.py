"""Gradients through quantization: straight-through, rotation trick and commitment loss.

Choosing the nearest entry has no derivative. Each estimator returns the entries bit for bit, and
differs only in the gradient that it passes to the encoder's vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .vector_layout import Vectors, zero_unless

GRADIENTS = ("straight_through", "rotation_trick")
MIN_NORM = 1e-6  # a shorter vector has no direction that could be rotated


class StraightThrough(torch.autograd.Function):
    """Straight-through estimator as one node of the graph.

    The usual form `z + (q - z).detach()` needs two more passes over memory and changes the last
    bit of `q`.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, quantized: Tensor) -> Tensor:
        """Return the entries `n d` in place of the vectors `n d`."""
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient `n d` to `vectors` unchanged; `quantized` gets none."""
        return gradients[0], None


def straight_through(vectors: Tensor, quantized: Tensor) -> Tensor:
    """Return entries `n d` that pass their gradient to `vectors` `n d` (Bengio et al. 2013)."""
    return StraightThrough.apply(vectors, quantized)


def rotation_trick(vectors: Tensor, quantized: Tensor) -> Tensor:
    """Return entries with a gradient that is rotated and scaled as the vectors were.

    Equation 4 of Fifty et al. 2024, with everything in brackets held constant:

        q = [|q| / |e| R] e,   R = I - 2 r r' + 2 q1 e1',   r = (e1 + q1) / |e1 + q1|

    where e1 and q1 are e and q scaled to length 1. A vector of length 0 has no direction to rotate
    and gets its gradient straight through.

    Args:
        vectors: The encoder's vectors e, `n d`.
        quantized: Their codebook entries q, `n d`.
    """
    e, q = vectors.detach(), quantized.detach()
    e_norm, q_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (e, q))
    e, q = e / e_norm.clamp_min(1e-12), q / q_norm.clamp_min(1e-12)
    r = F.normalize(e + q, dim=1)
    # R e by two inner products: the matrix itself, `n d d`, is never built.
    reflected = vectors - 2 * r * (vectors * r).sum(dim=1, keepdim=True)
    rotated = reflected + 2 * q * (vectors * e).sum(dim=1, keepdim=True)
    has_direction = (e_norm > MIN_NORM) & (q_norm > MIN_NORM)
    scaled = torch.where(has_direction, rotated * (q_norm / e_norm.clamp_min(1e-12)), vectors)
    # Rounding leaves `scaled` a bit away from the entry, but a code must decode to the same bits.
    return straight_through(scaled, quantized)


class CommitmentLoss(torch.autograd.Function):
    """Straight-through estimator and commitment loss in one node.

    The backward pass adds both gradients to the vectors in a single pass over memory.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, quantized: Tensor, loss: Tensor, residual: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the entries `n d` and the loss.

        Args:
            ctx: Keeps `residual` and `scale` for `backward`.
            vectors: Receive the gradients, `n d`.
            quantized: Their entries, `n d`.
            loss: Value of the loss, a scalar. It may carry a gradient to the codebook.
            residual: Direction of the loss's gradient to `vectors`, `n d`.
            scale: Factor of that direction, a scalar.
        """
        ctx.save_for_backward(residual, scale)
        ctx.set_materialize_grads(False)  # an output that is not used needs no zeros
        return quantized.detach(), loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients for `vectors` (from both outputs) and for `loss`.

        Raises:
            RuntimeError: If a second derivative is asked for, which would silently be wrong.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("Expected a first derivative, got create_graph=True: quantizers have no second one.")
        residual, scale = ctx.saved_tensors
        quantized_grad, loss_grad = gradients
        if loss_grad is None or not ctx.needs_input_grad[0]:
            return quantized_grad, None, loss_grad, None, None
        scale = scale * loss_grad
        vectors_grad = residual * scale if quantized_grad is None else torch.addcmul(quantized_grad, residual, scale)
        return vectors_grad, None, loss_grad, None, None


def apply_commitment_loss(
    gradient: str, vectors: Vectors, quantized: Tensor, loss: Tensor, *, residual: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Attach the gradients of the estimator and of the commitment loss to `vectors`.

    The commitment loss is the third term of equation 3 of van den Oord et al. 2017:

        L = weight mean_n |z - sg(e)|^2,   dL/dz = 2 weight (z - e) / n

    Its value is already in `loss`; its gradient is added here.

    Args:
        gradient: "straight_through" or "rotation_trick".
        vectors: The vectors that receive the gradients.
        quantized: Their entries, `n d`.
        loss: Value of the loss, a scalar.
        residual: `vectors - quantized`, `n d`, summed over the codebooks if there are several.
            None = no gradient is needed.
        weight: Weight of the squared distance, a sum over `d` and a mean over `n`.

    Returns:
        The entries `n d` and the loss, a scalar, both with gradients.
    """
    if residual is None:
        return quantized.detach(), loss
    residual = zero_unless(vectors.mask, residual)
    scale = 2 * weight / vectors.mask.sum().clamp_min(1)
    straight, loss = CommitmentLoss.apply(vectors.flat, quantized, loss, residual, scale)
    return (rotation_trick(vectors.flat, quantized) if gradient == "rotation_trick" else straight), loss
