"""Residual quantization: a sum of codebook vectors, each of which corrects what those before it leave.

Fixed vectors for every level, as in multi-stage vector quantization (Juang & Gray 1982) and SoundStream (Zeghidour et al. 2021,
section III.C); VQ-DRAW is what becomes of it when a network makes the vectors of each level out of the image so far.
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
    """`num_quantizers` codebooks of `codebook_size` vectors of `code_dim`, whose nearest entries add up; codes are `... n`, coarse to fine.

    Args:
        gradient, codebook_dim, channel_axis: as of `VectorQuantizer`, for the sum.
        settings: further settings of each level's `VectorQuantizer`.

    Raises:
        ValueError: as `VectorQuantizer`, and for fewer than one level, or `use_cosine_sim`: unit vectors do not add up to smaller corrections.
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
                "a ResidualQuantizer cannot compare directions: set cosine to false, or use a VectorQuantizer"
            )
        self.view = VectorView(code_dim, channel_axis=channel_axis, inner_dim=codebook_dim or code_dim)
        self.levels = nn.ModuleList(
            VectorQuantizer(codebook_size, codebook_dim or code_dim, **settings) for _ in range(num_quantizers)
        )
        self.codebook_size, self.num_quantizers, self.gradient = codebook_size, num_quantizers, gradient

    @property
    def skipped(self) -> Tensor:
        """Vectors that were not finite, in training."""
        return self.view.skipped

    def forward(self, x: Tensor, mask: Tensor | None = None, known: Tensor | None = None) -> QuantizerOutput:
        """`... d` (or `b d h w`) -> the sum of one entry a level, codes `... n` (`b h w n`), and the mean loss of the levels.

        Errors and `mask` as of `VectorQuantizer`.

        Args:
            known: `... n`, as of `lookup`: false where an entry is left out of the sum, so that a decoder learns to do with the first
                few; its level learns from the vector nonetheless.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.open(x, mask)
            rest, codes, losses = vectors, [], []
            total = torch.zeros_like(vectors.flat)
            pull = torch.zeros_like(total) if vectors.flat.requires_grad else None
            # Memory for all levels: new memory would cost as much as a lookup. A level that learns looks again at what came into it.
            learns = self.training or torch.is_grad_enabled()
            chosen, *lefts = (torch.empty_like(total) for _ in range(3 if learns else 2))
            for number, level in enumerate(self.quantizers()):
                left = lefts[number % len(lefts)]
                level_codes, level_loss = level.assign(rest, chosen, left)
                rest = replace(rest, flat=left)
                if pull is not None:  # every level's term draws the encoder; none of them another level
                    pull += left
                total += chosen if known is None else chosen * known[..., number].reshape(-1, 1)
                codes.append(level_codes)
                losses.append(level_loss)
            loss, weight = torch.stack(losses).mean(), self.quantizers()[0]._scaled_commitment / self.num_quantizers
            quantized, loss = apply_commitment_loss(self.gradient, vectors, total, loss, pull=pull, weight=weight)
            quantized = self.view.close(quantized, vectors)
        stacked = torch.stack(codes, dim=1).reshape(*vectors.grid, self.num_quantizers)
        return QuantizerOutput(quantized, stacked, loss)

    def lookup(self, codes: Tensor, known: Tensor | None = None) -> Tensor:
        """Codes `... n`, or those of the first levels alone, -> sums of entries `... d` (or `b d h w`).

        Args:
            known: `n`, or `... n`, false where a code is still to come and adds nothing.

        Raises:
            ValueError: for no level, or more than there are, and for codes of another type or range.
        """
        if not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(f"expected codes of 1 to {self.num_quantizers} levels, got {codes.shape[-1]}")
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            total = torch.zeros((), device=codes.device)
            for number, level in enumerate(self.quantizers()[: codes.shape[-1]]):
                chosen = F.embedding(codes[..., number].long(), level.entries())
                total = total + (chosen if known is None else chosen * known[..., number, None])
            return self.view.place(total)

    def quantizers(self) -> list[VectorQuantizer]:
        """The levels, coarse to fine."""
        return [level for level in self.levels if isinstance(level, VectorQuantizer)]

    def codebooks(self) -> list[Tensor]:
        """The codebook of each level, `k d`, without gradient."""
        return [level.entries().detach() for level in self.quantizers()]

    @torch.no_grad()
    def init_from_data(self, x: Tensor) -> None:
        """Put the codebooks on the vectors of `... d` (or `b d h w`), each on what those before it leave."""
        vectors = self.view.open(x)
        rest = vectors.flat[vectors.kept]
        for level in self.quantizers():
            level.start(rest)
            rest = rest - F.embedding(nearest_codes(rest, level.entries()), level.entries())

    def metrics(self) -> dict[str, Tensor]:
        """Perplexity and share of codes given, means over the levels."""
        each = [level.metrics() for level in self.quantizers()]
        return {name: torch.stack([metrics[name] for metrics in each]).mean() for name in each[0]}
