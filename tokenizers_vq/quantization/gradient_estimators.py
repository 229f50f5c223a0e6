"""Gradient estimators through quantization: straight-through and the rotation trick."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .vector_layout import Vectors, zero_non_finite

GRADIENTS = ("straight_through", "rotation_trick")


class StraightThrough(torch.autograd.Function):
    """Chosen vectors that give their gradient to those they stand for: no sum and no difference is taken for it."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, chosen: Tensor) -> Tensor:
        """`n d`, `n d` -> the chosen `n d`."""
        return chosen.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """To the vectors all, to the chosen nothing."""
        return gradients[0], None


def straight_through(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen vectors `n d` to the last bit, with the gradient of the vectors they stand for (Bengio et al. 2013)."""
    return StraightThrough.apply(vectors, chosen)


class CommitmentLoss(torch.autograd.Function):
    """Chosen vectors that give their gradient to those they stand for, and a loss that pulls on these; both go back in one pass."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, chosen: Tensor, loss: Tensor, pull: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`n d`, `n d`, the loss and its gradient to the vectors, `pull` `n d` times `scale` -> the chosen `n d`, the loss."""
        ctx.save_for_backward(pull, scale)
        ctx.set_materialize_grads(False)  # no zeros for what is not used
        return chosen.detach(), loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """To the vectors that of the chosen and of the loss, to the loss its own; a gradient of that gradient it has not."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("a quantizer's gradient has no gradient of its own (create_graph=True asks for one)")
        pull, scale = ctx.saved_tensors
        of_chosen, of_loss = gradients
        if of_loss is None or not ctx.needs_input_grad[0]:
            return of_chosen, None, of_loss, None, None
        scale = scale * of_loss
        to_vectors = pull * scale if of_chosen is None else torch.addcmul(of_chosen, pull, scale)
        return to_vectors, None, of_loss, None, None


def rotation_trick(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen vectors `n d` to the last bit, their gradient turned and scaled as the step from a vector to its code is.

    The rotation trick (Fifty et al. 2024, equation 4): q = |q|/|e| R e, with the rotation R and the ratio held constant. Vectors of
    length 0 have no direction and get the gradient straight through.
    """
    e, q = vectors.detach(), chosen.detach()
    e_norm, q_norm = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (e, q))
    e, q = e / e_norm.clamp_min(1e-12), q / q_norm.clamp_min(1e-12)
    middle = F.normalize(e + q, dim=1)
    reflected = vectors - 2 * middle * (vectors * middle).sum(dim=1, keepdim=True)
    turned = reflected + 2 * q * (vectors * e).sum(dim=1, keepdim=True)
    has_direction = (e_norm > 1e-6) & (q_norm > 1e-6)
    turned = torch.where(has_direction, turned * (q_norm / e_norm.clamp_min(1e-12)), vectors)
    return straight_through(turned, chosen)


def apply_commitment_loss(
    kind: str, vectors: Vectors, chosen: Tensor, loss: Tensor, *, pull: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """The chosen vectors `n d` with a gradient of a kind to `vectors`, and the loss with the commitment's.

    Args:
        loss: its value, the commitment's term in it, whose gradient is given here: `weight` times the mean square over vectors.
        pull: what the chosen leave of the vectors, `n d`, summed over the levels where there are several; None where no gradient is wanted.
    """
    if pull is None:
        return chosen.detach(), loss
    pull = zero_non_finite(vectors.kept, pull)
    scale = 2 * weight / vectors.kept.sum().clamp_min(1)
    quantized, loss = CommitmentLoss.apply(vectors.flat, chosen, loss, pull, scale)
    return rotation_trick(vectors.flat, chosen) if kind == "rotation_trick" else quantized, loss
