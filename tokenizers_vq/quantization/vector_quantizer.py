"""Vector quantization with a codebook that follows the moving averages of its vectors.

A training step of `VectorQuantizer` has the five parts of van den Oord et al. 2017 ("VQ-VAE") and
its successors. Each is one method or function:

    init       k-means on the first batches                              `init_codebook`
    nearest    c = argmin_k |z - e_k|                   (equation 1)     `nearest_entries`
    update     e_k <- moving average of its vectors     (equations 6-8)  `_update_codebook`
    replace    dead codes <- vectors with large errors                   `_replace_dead_codes`
    gradient   straight-through or rotation trick, and
               the commitment loss beta |z - sg(e)|^2   (equation 3)     `apply_commitment_loss`
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_reduce_coalesced, all_reduce_top_k, broadcast_from_rank0, get_rank, get_world_size
from ..validation import can_read_without_sync, check_choice, check_code_range, check_number
from .code_usage import CodeUsage
from .gradient_estimators import GRADIENTS, apply_commitment_loss
from .kmeans import KMEANS_STEPS, cluster_statistics, gumbel_top_k, kmeans
from .nearest_neighbors import nearest_entries
from .vector_layout import Vectors, VectorView

EMA_WARMUP = 30  # decay of batch t is at most (1 + t) / (30 + t): a third less error early on than a constant 0.99
VECTORS_PER_CODE = 4  # k-means waits until it has 4 vectors per code
MIN_CLUSTER_SIZE = 1e-5  # a smaller cluster has no mean to move its code to
DEAD_CODE_THRESHOLD = 0.03  # a code is dead if it gets less than 3 % of the average number of vectors


@dataclass
class QuantizerOutput:
    """Output of a quantizer.

    Attributes:
        quantized: Codebook entries in the layout of the input, with a gradient to it.
        codes: Their indices, int64, in the layout of the input without its channel axis.
        loss: Commitment loss (and codebook loss with `ema_update=False`), a scalar.

    Example:
        >>> import torch
        >>> output = VectorQuantizer(codebook_size=16, code_dim=4)(torch.zeros(2, 5, 4))
        >>> output.quantized.shape, output.codes.shape, output.loss.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]), torch.Size([]))
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Codebook of `k` vectors that replaces each input vector by its nearest entry.

    The codebook is initialized by k-means on the first training batches. Vectors with NaN or
    infinity get a code, but do not enter the loss, the codebook or the usage.

    Args:
        codebook_size: Number of entries `k`.
        code_dim: Number of channels `d`.
        commitment_weight: Weight beta of the commitment loss, which keeps vectors near their
            entries.
        decay: Decay of the moving averages, in [0, 1). 0.99 averages over about 100 batches.
        ema_update: Move the codebook by moving averages. False = train it by the gradient of its
            own loss term, the second of equation 3.
        gradient: "straight_through", or "rotation_trick" (Fifty et al. 2024).
        replace_dead_codes: Move codes that are hardly used to vectors with large errors.
        use_cosine_sim: Compare directions: vectors and entries are scaled to length 1 (Yu et al.
            2022, section 3.2).
        codebook_dim: Length of the entries. Another length than `code_dim` adds linear projections
            there and back. 0 = `code_dim`.
        channel_axis: Axis of the channels: -1 for `... d`, 1 for `b d h w`.

    Raises:
        ValueError: If a size is below 1, `decay` is outside [0, 1) or `gradient` is unknown.

    Example:
        >>> import torch
        >>> quantizer = VectorQuantizer(codebook_size=16, code_dim=4, channel_axis=1)
        >>> output = quantizer(torch.randn(2, 4, 8, 8))
        >>> output.codes.shape
        torch.Size([2, 8, 8])
        >>> quantizer.lookup(output.codes).shape
        torch.Size([2, 4, 8, 8])
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initialized: Tensor
    num_batches: Tensor
    init_vectors: Tensor

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
            raise ValueError(f"Expected decay in [0, 1), got {decay}.")
        codebook_dim = codebook_dim or code_dim
        self.view = VectorView(code_dim, channel_axis=channel_axis, codebook_dim=codebook_dim)
        self.usage = CodeUsage(codebook_size)
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.commitment_weight, self.decay, self.ema_update = commitment_weight, decay, ema_update
        self.gradient, self.replace_dead_codes, self.use_cosine_sim = gradient, replace_dead_codes, use_cosine_sim
        codebook = self.maybe_l2_normalize(torch.randn(codebook_size, codebook_dim) / codebook_dim**0.5)
        if ema_update:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed_avg", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("num_batches", torch.tensor(0.0))
        self.register_buffer("init_vectors", torch.empty(0, codebook_dim), persistent=False)
        self._initialized = False  # copy of `initialized` that is read without waiting for the device

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize `... d` (or `b d h w`) and, in training, update the codebook.

        Args:
            x: Vectors, `... d` (or `b d h w`).
            mask: False for vectors that get a code, but do not enter the loss, the codebook and the
                usage, `...` (or `b h w`) bool. None = all do.

        Returns:
            Entries like `x`, codes `...` (or `b h w`), and the loss.

        Raises:
            ValueError: If `x` is not floating-point or has another number of channels, or if the
                mask has another type or shape or keeps nothing.
        """
        # In float32: bfloat16 would flip 0.1 to 0.3 % of the codes.
        with torch.autocast(x.device.type, enabled=False):
            vectors = self.view.flatten(x, mask)
            vectors.flat = self.maybe_l2_normalize(vectors.flat)
            quantized = torch.empty_like(vectors.flat, requires_grad=False)
            residual = torch.empty_like(quantized) if vectors.flat.requires_grad else None
            codes, loss = self.quantize(vectors, quantized, residual)
            quantized, loss = apply_commitment_loss(
                self.gradient, vectors, quantized, loss, residual=residual, weight=self.commitment_scale
            )
            quantized = self.view.unflatten(quantized, vectors)
        return QuantizerOutput(quantized, codes.reshape(vectors.grid), loss)

    def quantize(self, vectors: Vectors, quantized: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the nearest entries and, in training, initialize and update the codebook.

        The vectors get no gradient here. `apply_commitment_loss` adds it once, for one codebook or
        for the sum of several.

        Args:
            vectors: The vectors to quantize.
            quantized: Buffer that receives the entries, `n d`.
            residual: Buffer that receives `vectors - quantized`, `n d`; may be the vectors' own
                memory unless the codebook learns. None = not needed.

        Returns:
            The codes, `n`, and the loss, a scalar.
        """
        flat, mask = vectors.flat.detach(), vectors.mask
        if self.training and self.needs_init():
            self.init_codebook(flat[mask])
        entries = self.entries()
        codes, errors = nearest_entries(flat, entries.detach().float(), quantized, residual)
        loss = self.commitment_scale * vectors.masked_mean(errors)
        if not self.ema_update:
            # |sg(z) - e|^2 again, now with a gradient to the codebook. Without gradients the
            # residuals may have overwritten the vectors, and the errors have the same value.
            has_gradient = torch.is_grad_enabled()
            distances = (flat - F.embedding(codes, entries)).square().sum(dim=1) if has_gradient else errors
            loss = loss + vectors.masked_mean(distances) / self.codebook_dim
        if self.training:
            counts = self._update_codebook(flat, codes, mask)
            if self.replace_dead_codes:
                self._replace_dead_codes(flat, codes, mask, errors, has_vectors=counts.sum() > 0)
        return codes, loss

    def needs_init(self) -> bool:
        """Return True until k-means has placed the codebook.

        The buffer is read until it is True and never again, because reading it waits for a GPU. A
        compiled graph cannot read it and takes the codebook as it is.
        """
        if self._initialized or torch.compiler.is_compiling():
            return False
        self._initialized = bool(self.initialized)
        return not self._initialized

    @torch.no_grad()
    def init_codebook(self, vectors: Tensor) -> None:
        """Initialize the codebook by k-means once there are enough vectors.

        Until then the entries are vectors sampled from those seen so far.

        Args:
            vectors: The finite vectors of a batch, `n d`. They join those of earlier batches.
        """
        self.init_vectors = seen = torch.cat([self.init_vectors, vectors])
        enough = torch.tensor(len(seen) >= VECTORS_PER_CODE * self.codebook_size, device=vectors.device)
        centers = self.codebook
        if len(seen):
            centers = self.maybe_l2_normalize(kmeans(seen, self.codebook_size, num_steps=KMEANS_STEPS if enough else 0))
        # Every process runs k-means on its own vectors; the result of the first counts.
        self.codebook.data.copy_(centers)
        broadcast_from_rank0(self.codebook.data)
        # As after one batch shared evenly by all codes: none is dead, and it is soon forgotten.
        broadcast_from_rank0(self.cluster_size.fill_(len(vectors) / self.codebook_size))
        self.embed_avg.copy_(self.codebook * self.cluster_size[:, None])
        if broadcast_from_rank0(enough):
            self.initialized.fill_(True)
            self.init_vectors = seen[:0]

    @torch.no_grad()
    def _update_codebook(self, vectors: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        """Move each entry to the moving average of its vectors.

        Appendix A.1 of van den Oord et al. 2017; Razavi et al. 2019 use it too:

            N_k <- decay N_k + (1 - decay) n_k                (equation 6)  `cluster_size`
            m_k <- decay m_k + (1 - decay) sum of vectors     (equation 7)  `embed_avg`
            e_k <- m_k / N_k                                  (equation 8)  `codebook`

        With `ema_update=False` the averages are kept as well: they tell which codes are dead.

        Args:
            vectors: `n d`.
            codes: Their codes, `n`.
            mask: False for vectors to leave out, `n`.

        Returns:
            The number of vectors of each code in this batch, over all processes, `k`.
        """
        # Vectors outside the mask get the extra code k, whose row is dropped: indexing by the mask
        # would wait for a GPU to count them.
        codes = torch.where(mask, codes, self.codebook_size)
        counts, sums = cluster_statistics(vectors, codes, self.codebook_size + 1)
        counts, sums = all_reduce_coalesced(counts[:-1], sums[:-1])
        self.usage.add(counts)
        self.num_batches += 1
        # 1 - decay, warmed up: the encoder moves fast at first, and entries that lag behind it
        # would die. But a batch with few vectors per code must not throw a good codebook away.
        weight = ((EMA_WARMUP - 1) / (EMA_WARMUP + self.num_batches)).minimum(counts.mean() / VECTORS_PER_CODE)
        weight = weight.clamp_min(1 - self.decay)
        self.cluster_size.lerp_(counts, weight)
        self.embed_avg.lerp_(sums, weight)
        if self.ema_update:
            means = self.maybe_l2_normalize(self.embed_avg / self.cluster_size.clamp_min(MIN_CLUSTER_SIZE)[:, None])
            # A weight of 1 or 0, instead of an indexed copy that would wait for a GPU.
            self.codebook.lerp_(means, (self.cluster_size >= MIN_CLUSTER_SIZE).float()[:, None])
        return counts

    @torch.no_grad()
    def _replace_dead_codes(
        self, vectors: Tensor, codes: Tensor, mask: Tensor, errors: Tensor, *, has_vectors: Tensor
    ) -> None:
        """Move dead codes to vectors of the batch that were sampled in proportion to their error.

        Args:
            vectors: `n d`.
            codes: Their codes, `n`.
            mask: False for vectors that must not be sampled, `n`.
            errors: Squared distances to the nearest entries, `n`.
            has_vectors: Whether any process has a vector inside its mask, a scalar bool.
        """
        dead = (self.cluster_size < DEAD_CODE_THRESHOLD * self.cluster_size.mean()) & has_vectors
        if can_read_without_sync(dead) and not dead.any():
            return
        candidates = self._replacement_candidates(vectors, codes, mask, errors)
        # Ten times the size of a dead code: time to attract vectors before it is moved again.
        new_size = 10 * DEAD_CODE_THRESHOLD * self.cluster_size.mean()
        self.codebook.data.copy_(torch.where(dead[:, None], candidates, self.codebook))
        self.embed_avg.copy_(torch.where(dead[:, None], candidates * new_size, self.embed_avg))
        self.cluster_size.copy_(torch.where(dead, new_size, self.cluster_size))

    def _replacement_candidates(self, vectors: Tensor, codes: Tensor, mask: Tensor, errors: Tensor) -> Tensor:
        """Sample a new position for each code from the vectors of all processes.

        A vector is sampled in proportion to its error, as in k-means++.

        Args:
            vectors: `n d`.
            codes: Their codes, `n`.
            mask: False for vectors that must not be sampled, `n`.
            errors: Squared distances to the nearest entries, `n`.

        Returns:
            Candidates, `k d`, the same on all processes.
        """
        # Each rank draws the noise of all ranks and takes its own, so that their random states
        # stay equal.
        noise = errors.new_empty(get_world_size(), len(errors)).exponential_()[get_rank()]
        sampled, keys = gumbel_top_k(torch.where(mask, errors, 0), noise, self.codebook_size)
        # A vector outside the mask has the error 0 and is sampled only if others run out. Its
        # nearest entry stands in for it, as it may be padding.
        candidates = torch.where(mask[sampled, None], vectors[sampled], self.codebook[codes[sampled]])
        num_missing = self.codebook_size - len(sampled)
        keys = F.pad(keys, (0, num_missing), value=-torch.inf)
        return all_reduce_top_k(keys, F.pad(candidates, (0, 0, 0, num_missing)))

    def init_from_data(self, x: Tensor) -> None:
        """Initialize the codebook from `... d` (or `b d h w`), as the first training batches do."""
        vectors = self.view.flatten(x)
        self.init_codebook(self.maybe_l2_normalize(vectors.flat[vectors.mask]))

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the entries of codes: `...` -> `... d` (or `b h w` -> `b d h w`).

        Raises:
            ValueError: If the codes are not integers or not in 0..k-1.
        """
        check_code_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self.view.from_entries(F.embedding(codes.long(), self.entries()))

    def entries(self) -> Tensor:
        """Return the codebook `k d`, scaled to length 1 if the quantizer compares directions."""
        return self.maybe_l2_normalize(self.codebook)

    def codebooks(self) -> list[Tensor]:
        """Return the only codebook, `k d`, without gradient."""
        return [self.entries().detach()]

    def maybe_l2_normalize(self, vectors: Tensor) -> Tensor:
        """Scale vectors `n d` to length 1 if the quantizer compares directions."""
        return F.normalize(vectors, dim=1) if self.use_cosine_sim else vectors

    @property
    def commitment_scale(self) -> float:
        """Weight of a squared distance, a sum over `d`; the commitment loss is a mean over `d`."""
        return self.commitment_weight / self.codebook_dim

    @property
    def num_non_finite(self) -> Tensor:
        """Number of vectors with NaN or infinity in training, a scalar."""
        return self.view.num_non_finite

    def metrics(self) -> dict[str, Tensor]:
        """Return `perplexity` and `code_usage` of the codes in training since the last reset."""
        return self.usage.metrics()
