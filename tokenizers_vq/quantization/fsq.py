"""Finite scalar quantization: a few numbers, each rounded to a few values (Mentzer et al. 2024). No codebook, so none can collapse."""

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
    """Rounds each of `len(levels)` numbers to one of its levels; the code is all of them as digits of one number.

    Args:
        levels: values of each number, at least 2, e.g. `(8, 5, 5, 5)` for 1,000 codes.
        code_dim: channels of the input, with linear layers to the numbers and back; 0: one channel a number.
        channel_axis: which axis of the input holds the channels: -1 for `... d`, 1 for `b d h w`.

    Raises:
        ValueError: for no level, or a number that can take fewer than two values.
    """

    basis: Tensor
    sizes: Tensor

    def __init__(self, levels: Sequence[int], code_dim: int = 0, *, channel_axis: int = -1):
        super().__init__()
        if not levels or any(not isinstance(size, int) or isinstance(size, bool) or size < 2 for size in levels):
            raise ValueError(f"levels must be whole numbers of at least 2, got {list(levels)}")
        self.view = VectorView(code_dim or len(levels), channel_axis=channel_axis, inner_dim=len(levels))
        self.codebook_size = math.prod(levels)
        self.usage = CodeUsage(self.codebook_size)
        self.register_buffer("sizes", torch.tensor(levels))
        self.register_buffer("basis", torch.tensor([math.prod(levels[:place]) for place in range(len(levels))]))

    @property
    def skipped(self) -> Tensor:
        """Vectors that were not finite, in training."""
        return self.view.skipped

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """`... d` (or `b d h w`) -> rounded, codes `...` (`b h w`), and no loss. Errors and `mask` as of `VectorQuantizer`."""
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.open(x, mask)
            bounded = self.bound(vectors.flat)
            codes = ((bounded.detach().round() + self.sizes // 2).long() * self.basis).sum(dim=1)
            # By way of the codes, so that they decode to the same bits.
            quantized = straight_through(bounded / (self.sizes // 2), self.numbers(codes))
            quantized = self.view.close(quantized, vectors)
        if self.training:
            self.usage.add_codes(vectors, codes)
        return QuantizerOutput(quantized, codes.reshape(vectors.grid), quantized.new_zeros((), dtype=torch.float32))

    def bound(self, numbers: Tensor) -> Tensor:
        """Numbers `n d` -> between the lowest and the highest level of each (the paper's appendix A)."""
        half = (self.sizes - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        return (numbers + (offset / half).atanh()).tanh() * half - offset

    def numbers(self, codes: Tensor) -> Tensor:
        """Codes `...` -> the numbers they stand for, `... d`, in -1..1."""
        half = self.sizes // 2
        digits = codes[..., None] // self.basis % self.sizes
        return (digits - half) / half

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `...` -> rounded vectors `... d` (or `b d h w`). ValueError for codes of another type or range."""
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self.view.place(self.numbers(codes))

    def codebooks(self) -> list[Tensor]:
        """What every code stands for, `k d`."""
        return [self.numbers(torch.arange(self.codebook_size, device=self.basis.device))]

    def init_from_data(self, x: Tensor) -> None:
        """Nothing here is placed by data."""

    def metrics(self) -> dict[str, Tensor]:
        """Perplexity of the codes, and the share of them that was given, in training since the usage was reset."""
        return self.usage.metrics()
