"""A tensor of any layout as a list of vectors, and back: what all quantizers do before and after they choose codes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import check_number
from .looks import may_look_at

GRADIENTS = ("straight_through", "rotation")


@dataclass
class Vectors:
    """Vectors `n d` in float32, zero where they were not finite.

    Attributes:
        kept: which of them, `n`, take part in the loss and in the codebook's statistics.
        grid: shape of the codes.
        dtype: of the tensor they came from.
    """

    flat: Tensor
    kept: Tensor
    grid: torch.Size
    dtype: torch.dtype

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `n` values over the vectors that are kept; 0 where none is."""
        return torch.where(self.kept, values, 0).sum() / self.kept.sum().clamp_min(1)


class VectorView(nn.Module):
    """Opens a tensor into vectors and closes vectors into a tensor of the same layout.

    Args:
        code_dim: channels of the tensor.
        channel_axis: which axis holds them: -1 for `... d`, 1 for `b d h w`.
        inner_dim: length of the vectors inside; where it differs from `code_dim`, linear layers lead there and back.
    """

    skipped: Tensor

    def __init__(self, code_dim: int, *, channel_axis: int = -1, inner_dim: int | None = None):
        super().__init__()
        inner_dim = code_dim if inner_dim is None else inner_dim
        for name, value in {"code_dim": code_dim, "inner_dim": inner_dim}.items():
            check_number("quantizer", name, value, 1)
        self.code_dim, self.channel_axis = code_dim, channel_axis
        has_layers = inner_dim != code_dim
        self.project_in = nn.Linear(code_dim, inner_dim) if has_layers else nn.Identity()
        self.project_out = nn.Linear(inner_dim, code_dim) if has_layers else nn.Identity()
        self.register_buffer("skipped", torch.tensor(0), persistent=False)

    def open(self, x: Tensor, mask: Tensor | None = None) -> Vectors:
        """`... d` (or `b d h w`) -> vectors, without those that `mask` `...` (`b h w`) says to leave out.

        In training, vectors with a value that is not finite are counted in `skipped`.

        Raises:
            ValueError: for what is no floats or has another number of channels, and for a mask that is not boolean, of another shape, or
                false everywhere.
        """
        if not x.is_floating_point():
            raise ValueError(f"expected floats, got {x.dtype}")
        if x.ndim < 1 or not -x.ndim <= self.channel_axis < x.ndim or x.shape[self.channel_axis] != self.code_dim:
            raise ValueError(
                f"expected {self.code_dim} channels on axis {self.channel_axis}, got shape {tuple(x.shape)}"
            )
        moved = x.movedim(self.channel_axis, -1)
        flat = moved.reshape(-1, self.code_dim).float()
        finite = torch.linalg.vector_norm(flat.detach(), dim=1).isfinite()
        if self.training:
            self.skipped += (~finite).sum()
        kept = finite if mask is None else finite & checked(mask, moved.shape[:-1]).flatten()
        return Vectors(projected(self.project_in, zero_unless(finite, flat)).float(), kept, moved.shape[:-1], x.dtype)

    def close(self, flat: Tensor, like: Vectors) -> Tensor:
        """Vectors `n d` -> a tensor in the layout and of the type that they came from."""
        closed = projected(self.project_out, flat).reshape(*like.grid, self.code_dim)
        return closed.movedim(-1, self.channel_axis).to(like.dtype)

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors `... d` -> `... d` (or `b d h w`)."""
        return projected(self.project_out, vectors).movedim(-1, self.channel_axis)


def projected(layer: nn.Module, vectors: Tensor) -> Tensor:
    """Vectors `... d` through a linear layer in the type of its weights, or none."""
    return layer(vectors.to(layer.weight.dtype)) if isinstance(layer, nn.Linear) else vectors


def zero_unless(finite: Tensor, flat: Tensor) -> Tensor:
    """Vectors `n d`, zero where `finite`, `n`, is false; as they are where it is not: a tenth off a training step on a CPU."""
    return flat if may_look_at(finite) and finite.all() else torch.where(finite[:, None], flat, 0)


def checked(mask: Tensor, grid: torch.Size) -> Tensor:
    """The mask, if it says of each vector whether it counts, and of some that it does."""
    if mask.dtype != torch.bool or mask.shape != grid:
        raise ValueError(f"mask must be boolean of shape {tuple(grid)}, got {mask.dtype} of {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and not mask.any():
        raise ValueError("mask leaves out every vector; leave out the batch instead")
    return mask


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


class Committed(torch.autograd.Function):
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


def rotated(vectors: Tensor, chosen: Tensor) -> Tensor:
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


def committed(
    kind: str, vectors: Vectors, chosen: Tensor, loss: Tensor, *, pull: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """The chosen vectors `n d` with a gradient of a kind to `vectors`, and the loss with the commitment's.

    Args:
        loss: its value, the commitment's term in it, whose gradient is given here: `weight` times the mean square over vectors.
        pull: what the chosen leave of the vectors, `n d`, summed over the levels where there are several; None where no gradient is wanted.
    """
    if pull is None:
        return chosen.detach(), loss
    pull = zero_unless(vectors.kept, pull)
    scale = 2 * weight / vectors.kept.sum().clamp_min(1)
    quantized, loss = Committed.apply(vectors.flat, chosen, loss, pull, scale)
    return rotated(vectors.flat, chosen) if kind == "rotation" else quantized, loss
