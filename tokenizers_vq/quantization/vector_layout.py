"""A tensor of any layout as a list of vectors, and back: what all quantizers do before and after they choose codes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..validation import can_read_without_sync, check_number


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
        return Vectors(
            projected(self.project_in, zero_non_finite(finite, flat)).float(), kept, moved.shape[:-1], x.dtype
        )

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


def zero_non_finite(finite: Tensor, flat: Tensor) -> Tensor:
    """Vectors `n d`, zero where `finite`, `n`, is false; as they are where it is not: a tenth off a training step on a CPU."""
    return flat if can_read_without_sync(finite) and finite.all() else torch.where(finite[:, None], flat, 0)


def checked(mask: Tensor, grid: torch.Size) -> Tensor:
    """The mask, if it says of each vector whether it counts, and of some that it does."""
    if mask.dtype != torch.bool or mask.shape != grid:
        raise ValueError(f"mask must be boolean of shape {tuple(grid)}, got {mask.dtype} of {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and not mask.any():
        raise ValueError("mask leaves out every vector; leave out the batch instead")
    return mask
