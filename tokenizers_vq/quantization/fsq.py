"""Finite scalar quantization (FSQ): a few numbers, each rounded to a few levels.

The paper is Mentzer et al. 2024. Nothing is learned, so no codebook can collapse.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..validation import check_code_range
from .code_usage import CodeUsage
from .gradient_estimators import straight_through
from .vector_layout import VectorView
from .vector_quantizer import QuantizerOutput


class FSQ(nn.Module):
    """Quantizer that rounds each of `len(levels)` numbers to one of its levels.

    A code is an integer with the rounded numbers as its digits.

    Args:
        levels: Number of levels of each number, at least 2. `(8, 5, 5, 5)` makes 1,000 codes.
        code_dim: Channels of the input. Linear projections lead to the numbers and back.
            0 = `len(levels)` channels without projections.
        channel_axis: Axis of the channels: -1 for `... d`, 1 for `b d h w`.

    Raises:
        ValueError: If `levels` is empty or has an entry below 2.

    Example:
        >>> import torch
        >>> fsq = FSQ(levels=(3, 3))
        >>> output = fsq(torch.tensor([[0.1, -2.0], [5.0, 0.0]]))
        >>> output.codes.tolist(), output.quantized.tolist()
        ([1, 5], [[0.0, -1.0], [1.0, 0.0]])
        >>> fsq.lookup(output.codes).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """

    basis: Tensor
    levels: Tensor

    def __init__(self, levels: Sequence[int], code_dim: int = 0, *, channel_axis: int = -1):
        super().__init__()
        if not levels or any(not isinstance(size, int) or isinstance(size, bool) or size < 2 for size in levels):
            raise ValueError(f"Expected levels to be whole numbers of at least 2, got {list(levels)}.")
        self.view = VectorView(code_dim or len(levels), channel_axis=channel_axis, codebook_dim=len(levels))
        self.codebook_size = math.prod(levels)
        self.usage = CodeUsage(self.codebook_size)
        self.register_buffer("levels", torch.tensor(levels))
        # Place values of a mixed-radix number: (8, 5, 5) has the basis (1, 8, 40).
        self.register_buffer("basis", torch.tensor([math.prod(levels[:digit]) for digit in range(len(levels))]))

    @property
    def num_non_finite(self) -> Tensor:
        """Number of vectors with NaN or infinity in training, a scalar."""
        return self.view.num_non_finite

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Round `... d` (or `b d h w`), with the gradient passed straight through the rounding.

        Args:
            x: Vectors, `... d` (or `b d h w`).
            mask: False for vectors to leave out of the usage, `...` (or `b h w`) bool. None = keep
                all.

        Returns:
            Rounded values like `x`, codes `...` (or `b h w`), and a loss of 0.

        Raises:
            ValueError: As `VectorQuantizer.forward`.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.flatten(x, mask)
            bounded = self.bound(vectors.flat)
            codes = ((bounded.detach().round() + self.levels // 2).long() * self.basis).sum(dim=1)
            # The values are computed from the codes, so that decoding the codes gives the same
            # bits.
            quantized = straight_through(bounded / (self.levels // 2), self.codes_to_values(codes))
            quantized = self.view.unflatten(quantized, vectors)
        if self.training:
            self.usage.add_codes(vectors, codes)
        return QuantizerOutput(quantized, codes.reshape(vectors.grid), quantized.new_zeros((), dtype=torch.float32))

    def bound(self, values: Tensor) -> Tensor:
        """Squash numbers `n d` smoothly into the range of their levels (appendix A of the paper).

        An even number of levels is shifted by half a level, because it has no level in the middle.
        """
        half_width = (self.levels - 1) * (1 + 1e-3) / 2  # slightly wider, so that the outer levels are reached
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (values + (offset / half_width).atanh()).tanh() * half_width - offset

    def codes_to_values(self, codes: Tensor) -> Tensor:
        """Return the rounded numbers of codes, `...` -> `... d`, scaled to [-1, 1]."""
        half = self.levels // 2
        digits = codes[..., None] // self.basis % self.levels
        return (digits - half) / half

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes: `...` -> `... d` (or `b h w` -> `b d h w`).

        Raises:
            ValueError: If the codes are not integers or not in 0..k-1.
        """
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self.view.from_entries(self.codes_to_values(codes))

    def codebooks(self) -> list[Tensor]:
        """Return the implicit codebook, `k d`: the values of every code."""
        return [self.codes_to_values(torch.arange(self.codebook_size, device=self.basis.device))]

    def init_from_data(self, x: Tensor) -> None:
        """Do nothing: the levels are fixed and need no initialization."""

    def metrics(self) -> dict[str, Tensor]:
        """Return `perplexity` and `code_usage` of the codes in training since the last reset."""
        return self.usage.metrics()
