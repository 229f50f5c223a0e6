"""Residual vector quantization (RVQ): each codebook quantizes what those before it leave.

Introduced as multi-stage vector quantization (Juang and Gray 1982); SoundStream (Zeghidour et al.
2021, section III.C) uses it in an autoencoder. VQ-DRAW generalizes it: there, a network proposes
the entries of each stage from the image so far.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import check_choice, check_code_range, check_number
from .gradient_estimators import GRADIENTS, apply_commitment_loss
from .nearest_neighbors import nearest_codes
from .vector_layout import VectorView
from .vector_quantizer import QuantizerOutput, VectorQuantizer


class ResidualQuantizer(nn.Module):
    """Sum of one entry from each of `num_quantizers` codebooks; codes are `... n`, coarse to fine.

    Any prefix of a vector's codes can be looked up and gives a coarser vector.

    Args:
        codebook_size: Number of entries `k` of each codebook.
        code_dim: Number of channels `d`.
        num_quantizers: Number of codebooks `n`.
        gradient: "straight_through" or "rotation_trick", for the sum.
        codebook_dim: Length of the entries, with linear projections there and back. 0 = `code_dim`.
        channel_axis: Axis of the channels: -1 for `... d`, 1 for `b d h w`.
        **settings: Further arguments of each `VectorQuantizer`.

    Raises:
        ValueError: As `VectorQuantizer`; if `num_quantizers` is below 1; or for `use_cosine_sim`.

    Example:
        >>> import torch
        >>> quantizer = ResidualQuantizer(codebook_size=16, code_dim=4, num_quantizers=3)
        >>> codes = quantizer(torch.randn(2, 10, 4)).codes
        >>> codes.shape
        torch.Size([2, 10, 3])
        >>> quantizer.lookup(codes[..., :1]).shape
        torch.Size([2, 10, 4])
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        num_quantizers: int,
        *,
        gradient: str = "straight_through",
        codebook_dim: int = 0,
        channel_axis: int = -1,
        **settings: Any,
    ):
        super().__init__()
        check_number("ResidualQuantizer", "num_quantizers", num_quantizers, 1)
        check_choice("gradient", gradient, GRADIENTS)
        if settings.get("use_cosine_sim"):
            raise ValueError(
                "Expected use_cosine_sim=False for a ResidualQuantizer, got True: vectors of length 1 cannot add up "
                "to ever smaller corrections. Use a VectorQuantizer to compare directions."
            )
        codebook_dim = codebook_dim or code_dim
        self.view = VectorView(code_dim, channel_axis=channel_axis, codebook_dim=codebook_dim)
        self.layers = nn.ModuleList(
            VectorQuantizer(codebook_size, codebook_dim, **settings) for _ in range(num_quantizers)
        )
        self.codebook_size, self.num_quantizers, self.gradient = codebook_size, num_quantizers, gradient

    @property
    def num_non_finite(self) -> Tensor:
        """Number of vectors with NaN or infinity in training, a scalar."""
        return self.view.num_non_finite

    def forward(self, x: Tensor, mask: Tensor | None = None, code_mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize `... d` (or `b d h w`) with all codebooks and, in training, update them.

        Args:
            x: Vectors, `... d` (or `b d h w`).
            mask: False for vectors to leave out of the loss, the codebooks and the usage, `...` (or
                `b h w`) bool. None = keep all.
            code_mask: False for entries to leave out of the sum, `... n` bool, so that a decoder
                learns to decode prefixes. Their codebooks learn from the vector nevertheless.

        Returns:
            Sums of entries like `x`, codes `... n` (or `b h w n`), and the mean loss of the
            codebooks.

        Raises:
            ValueError: As `VectorQuantizer.forward`.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.flatten(x, mask)
            remaining, codes, losses = vectors, [], []
            total = torch.zeros_like(vectors.flat)
            # The commitment loss of each codebook has its own residual as gradient to the encoder.
            residual_sum = torch.zeros_like(total) if vectors.flat.requires_grad else None
            # All codebooks share these buffers, as new memory costs as much as a lookup. One that
            # learns reads its input again after the search, so its residual needs another buffer.
            learns = self.training or torch.is_grad_enabled()
            entries, *buffers = (torch.empty_like(total) for _ in range(3 if learns else 2))
            for index, quantizer in enumerate(self.quantizers()):
                residual = buffers[index % len(buffers)]
                quantizer_codes, quantizer_loss = quantizer.quantize(remaining, entries, residual)
                remaining = replace(remaining, flat=residual)
                if residual_sum is not None:
                    residual_sum += residual
                total += entries if code_mask is None else entries * code_mask[..., index].reshape(-1, 1)
                codes.append(quantizer_codes)
                losses.append(quantizer_loss)
            loss, weight = torch.stack(losses).mean(), self.quantizers()[0].commitment_scale / self.num_quantizers
            quantized, loss = apply_commitment_loss(
                self.gradient, vectors, total, loss, residual=residual_sum, weight=weight
            )
            quantized = self.view.unflatten(quantized, vectors)
        stacked = torch.stack(codes, dim=1).reshape(*vectors.grid, self.num_quantizers)
        return QuantizerOutput(quantized, stacked, loss)

    def lookup(self, codes: Tensor, code_mask: Tensor | None = None) -> Tensor:
        """Sum the entries of codes: `... n` -> `... d` (or `b h w n` -> `b d h w`).

        Args:
            codes: Codes of the first 1 to `num_quantizers` codebooks, `... n`.
            code_mask: False for codes that add nothing, `n` or `... n` bool. None = all add.

        Raises:
            ValueError: If the number of codes is 0 or above `num_quantizers`, or if they are not
                integers in 0..k-1.
        """
        if not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(f"Expected codes of 1 to {self.num_quantizers} codebooks, got {codes.shape[-1]}.")
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            total = torch.zeros((), device=codes.device)
            for index, quantizer in enumerate(self.quantizers()[: codes.shape[-1]]):
                entries = F.embedding(codes[..., index].long(), quantizer.entries())
                total = total + (entries if code_mask is None else entries * code_mask[..., index, None])
            return self.view.from_entries(total)

    def quantizers(self) -> list[VectorQuantizer]:
        """Return the quantizer of each codebook, coarse to fine."""
        return [layer for layer in self.layers if isinstance(layer, VectorQuantizer)]

    def codebooks(self) -> list[Tensor]:
        """Return the codebooks, `k d` each, without gradient."""
        return [quantizer.entries().detach() for quantizer in self.quantizers()]

    @torch.no_grad()
    def init_from_data(self, x: Tensor) -> None:
        """Initialize each codebook by k-means on the residuals of `... d` (or `b d h w`)."""
        vectors = self.view.flatten(x)
        residual = vectors.flat[vectors.mask]
        for quantizer in self.quantizers():
            quantizer.init_codebook(residual)
            residual = residual - F.embedding(nearest_codes(residual, quantizer.entries()), quantizer.entries())

    def metrics(self) -> dict[str, Tensor]:
        """Return `perplexity` and `code_usage`, averaged over the codebooks."""
        each = [quantizer.metrics() for quantizer in self.quantizers()]
        return {name: torch.stack([metrics[name] for metrics in each]).mean() for name in each[0]}
