"""Nearest-neighbour quantization with a codebook that follows its data.

Gradients pass to the encoder as if nothing had happened (van den Oord et al. 2017, equation 3); the codebook itself moves by an
exponential average of the vectors assigned to it (appendix A.1), or by its own loss term. It starts from k-means on the first
batches, and codes that fall out of use are put back where vectors are worst served.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_reduce_coalesced, all_reduce_top_k, broadcast_from_rank0, local_exponential_noise
from ..validation import can_read_without_sync, check_choice, check_code_range, check_number
from .code_usage import CodeUsage
from .gradient_estimators import GRADIENTS, apply_commitment_loss
from .kmeans import KMEANS_STEPS, assigned_sums, gumbel_top_k, kmeans
from .nearest_neighbors import nearest
from .vector_layout import Vectors, VectorView

WARM_UP = 30  # decay of the t-th batch is (1 + t) / (30 + t) at most: a third less error early on than .99 at once
VECTORS_PER_CODE = 4  # k-means waits until it has so many
SMALLEST_COUNT = 1e-5  # below it a code stays where it is
DEAD_SHARE = 0.03  # a code that gets less than 3 % of an even share of the vectors is out of use


@dataclass
class QuantizerOutput:
    """`quantized` like the input with gradients to it, `codes` without the channel axis, `loss` a scalar."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook of `codebook_size` vectors, and the nearest of them for every vector of `code_dim`.

    Args:
        commitment: weight (beta) of the term that keeps the encoder near its codes.
        decay: of the exponential average by which the codebook follows its vectors; with `ema=False` it is trained by its loss.
        gradient: "straight_through", or "rotation_trick" (Fifty et al. 2024).
        revive: put codes that are out of use where vectors are worst served.
        cosine: compare directions: vectors and codes are scaled to length 1 (Yu et al. 2022, section 3.2).
        codebook_dim: search among vectors of this length, with linear layers there and back; 0: as they are.
        channel_axis: which axis of the input holds the `d` channels: -1 for `... d`, 1 for `b d h w`.

    Raises:
        ValueError: for sizes below 1, a decay outside 0..1, and an unknown gradient.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    num_batches: Tensor
    first_vectors: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        ema_update: bool = True,
        gradient: str = "straight_through",
        replace_dead_codes: bool = True,
        use_cosine_sim: bool = False,
        codebook_dim: int = 0,
        channel_axis: int = -1,
    ):
        super().__init__()
        check_number("VectorQuantizer", "codebook_size", codebook_size, 1)
        check_choice("gradient", gradient, GRADIENTS)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.view = VectorView(code_dim, channel_axis=channel_axis, inner_dim=codebook_dim or code_dim)
        self.usage = CodeUsage(codebook_size)
        self.codebook_size, self.code_dim = codebook_size, codebook_dim or code_dim
        self.commitment_weight, self.decay, self.ema_update = commitment_weight, decay, ema_update
        self.gradient, self.replace_dead_codes, self.use_cosine_sim = gradient, replace_dead_codes, use_cosine_sim
        codebook = self.scaled(torch.randn(codebook_size, self.code_dim) / self.code_dim**0.5)
        if ema_update:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, self.code_dim))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("num_batches", torch.tensor(0.0))
        self.register_buffer("first_vectors", torch.empty(0, self.code_dim), persistent=False)
        self.stands = False  # `started` without a look at the device

    @property
    def skipped(self) -> Tensor:
        """Vectors that were not finite, in training."""
        return self.view.skipped

    @property
    def _scaled_commitment(self) -> float:
        """Weight of the squared distance of a vector to its code, a sum over its numbers."""
        return self.commitment_weight / self.code_dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """`... d` (or `b d h w`, as `channel_axis` says) -> the nearest codebook entries, and the loss that draws both together.

        Vectors with a value that is not finite, and those where the boolean `mask` `...` (`b h w`) is false, get a code, but
        keep out of the loss, the codebook and the usage.

        Raises:
            ValueError: for another number of channels, and a mask that does not fit or leaves out everything.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.open(x, mask)
            vectors.flat = self.scaled(vectors.flat)
            chosen = torch.empty_like(vectors.flat, requires_grad=False)
            pull = torch.empty_like(chosen) if vectors.flat.requires_grad else None
            codes, loss = self.assign(vectors, chosen, pull)
            quantized, loss = apply_commitment_loss(
                self.gradient, vectors, chosen, loss, pull=pull, weight=self._scaled_commitment
            )
            quantized = self.view.close(quantized, vectors)
        return QuantizerOutput(quantized, codes.reshape(vectors.grid), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `...` -> codebook entries `... d` (or `b d h w`). ValueError for codes of another type or range."""
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self.view.place(F.embedding(codes.long(), self.entries()))

    def assign(self, vectors: Vectors, chosen: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes `n` of vectors, and the loss, a scalar; in training the codebook moves on.

        The entries are written to `chosen` `n d`, what they leave to `rest` `n d`. Nothing has a gradient to the vectors: `apply_commitment_loss` gives
        them theirs.
        """
        flat = vectors.flat.detach()
        if self.training and self.needs_start():
            self.start(flat[vectors.kept])
        entries = self.entries()
        codes, errors = nearest(flat, entries.detach().float(), chosen, rest)
        loss = self._scaled_commitment * vectors.mean(errors)
        if not self.ema_update:
            learns = torch.is_grad_enabled()  # else `rest` may be the vectors by now
            squares = (flat - F.embedding(codes, entries)).square().sum(dim=1) if learns else errors
            loss = loss + vectors.mean(squares) / self.code_dim
        if self.training:
            self._learn(flat, codes, vectors.kept, errors)
        return codes, loss

    def entries(self) -> Tensor:
        """The codebook `k d` as vectors are compared with it."""
        return self.scaled(self.codebook)

    def codebooks(self) -> list[Tensor]:
        """The codebook, `k d`, without gradient."""
        return [self.entries().detach()]

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors `n d` of length 1 where directions are compared."""
        return F.normalize(vectors, dim=1) if self.use_cosine_sim else vectors

    def needs_start(self) -> bool:
        """Whether k-means is still to come; looks at the device once, and never in a compiled graph, which starts from what stands."""
        if self.stands or torch.compiler.is_compiling():
            return False
        self.stands = bool(self.started)
        return not self.stands

    def init_from_data(self, x: Tensor) -> None:
        """Put the codebook on the vectors of `... d` (or `b d h w`), as the first batches of training do."""
        vectors = self.view.open(x)
        self.start(self.scaled(vectors.flat[vectors.kept]))

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Put the codebook on vectors `n d`: by k-means as soon as there are enough of them with those shown before, else on some."""
        self.first_vectors = shown = torch.cat([self.first_vectors, vectors])
        enough = torch.tensor(len(shown) >= VECTORS_PER_CODE * self.codebook_size, device=vectors.device)
        centres = self.codebook
        if len(shown):
            centres = self.scaled(kmeans(shown, self.codebook_size, num_steps=KMEANS_STEPS if enough else 0))
        self.codebook.data.copy_(centres)
        broadcast_from_rank0(self.codebook.data)
        # As if one batch had been shared evenly: nothing is out of use yet, and soon forgotten.
        broadcast_from_rank0(self.counts.fill_(len(vectors) / self.codebook_size))
        self.sums.copy_(self.codebook * self.counts[:, None])
        if broadcast_from_rank0(enough):
            self.started.fill_(True)
            self.first_vectors = shown[:0]

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, kept: Tensor, errors: Tensor) -> None:
        """Appendix A.1, equations 6-8, by those of the vectors `n d` that are kept; the average grows longer up to `decay`."""
        # What is left out counts for a code that does not exist.
        counts, sums = assigned_sums(vectors, torch.where(kept, codes, self.codebook_size), self.codebook_size + 1)
        counts, sums = all_reduce_coalesced(counts[:-1], sums[:-1])
        self.usage.add(counts)
        self.num_batches += 1
        # At first a batch counts for much: the encoder has just begun to move, and codes that lag behind it fall out of use. But no more
        # than it has vectors to place the codebook by.
        weight = ((WARM_UP - 1) / (WARM_UP + self.num_batches)).minimum(counts.mean() / VECTORS_PER_CODE)
        weight = weight.clamp_min(1 - self.decay)
        self.counts.lerp_(counts, weight)
        self.sums.lerp_(sums, weight)
        if self.ema_update:
            means = self.scaled(self.sums / self.counts.clamp_min(SMALLEST_COUNT)[:, None])
            self.codebook.lerp_(means, (self.counts >= SMALLEST_COUNT).float()[:, None])  # all the way, or not at all
        # Without vectors there are no places to go to.
        dead = (self.counts < DEAD_SHARE * self.counts.mean()) & (counts.sum() > 0)
        if self.replace_dead_codes and (not can_read_without_sync(dead) or dead.any()):
            self._revive(dead, self._places(vectors, codes, kept, errors))

    def _places(self, vectors: Tensor, codes: Tensor, kept: Tensor, errors: Tensor) -> Tensor:
        """Where codes out of use may go, `k d`: drawn among the worst served of the vectors `n d` of all processes."""
        noise = local_exponential_noise(errors)
        worst, keys = gumbel_top_k(torch.where(kept, errors, 0), noise, self.codebook_size)
        # A vector that is left out is no place for a code.
        places = torch.where(kept[worst, None], vectors[worst], self.codebook[codes[worst]])
        missing = self.codebook_size - len(worst)
        return all_reduce_top_k(F.pad(keys, (0, missing), value=-torch.inf), F.pad(places, (0, 0, 0, missing)))

    def _revive(self, dead: Tensor, places: Tensor) -> None:
        """Give each code that is out of use, `k` booleans, the place `d` of its row `k d`."""
        # Ten times the share at which a code counts as dead: time to prove itself, then another try.
        second_chance = 10 * DEAD_SHARE * self.counts.mean()
        self.codebook.data.copy_(torch.where(dead[:, None], places, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], places * second_chance, self.sums))
        self.counts.copy_(torch.where(dead, second_chance, self.counts))

    def metrics(self) -> dict[str, Tensor]:
        """Perplexity of the codes, and the share of them that was given, in training since the usage was reset."""
        return self.usage.metrics()
