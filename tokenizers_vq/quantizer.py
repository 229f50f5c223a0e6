"""Nearest-neighbour quantization with a codebook that follows its data.

Gradients pass straight through to the encoder (van den Oord et al. 2017, equation 3); the codebook itself moves by an exponential
average of the vectors assigned to it (appendix A.1), or by its own loss term. It starts from k-means on the first batch, and codes
that fall out of use are put back where vectors are worst served.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES_PER_CHUNK = 2**20  # 4 MB of float32 scores: the search stays in cache and memory does not grow with the codebook
KMEANS_STEPS = 10
DEAD_SHARE = 0.03  # a code that gets less than 3 % of an even share of the vectors is out of use


@dataclass
class QuantizerOutput:
    """`quantized` like the input with gradients to it, `codes` without the channel axis, `loss` a scalar."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry `k d` nearest to each vector `n d` -> `n`, in float32 whatever autocast says.

    |v - e|^2 without |v|^2, which no choice of e changes.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        codebook, half_norms = codebook.float(), codebook.float().square().sum(dim=1) / -2
        chunks = vectors.float().split(max(1, SCORES_PER_CHUNK // len(codebook)))
        return torch.cat([torch.addmm(half_norms, chunk, codebook.T).argmax(dim=1) for chunk in chunks])


def assigned_sums(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors `n d` each code got, `k`, and their sum, `k d`; over all ranks, in one call."""
    counts = vectors.new_zeros(codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        both = torch.cat([counts[:, None], sums], dim=1)
        torch.distributed.all_reduce(both)
        counts, sums = both[:, 0], both[:, 1:]
    return counts, sums


def draw_by_error(errors: Tensor, num: int) -> Tensor:
    """Draw `num` of the examples, the likelier the larger their error `n` (as k-means++ does): their numbers, `num`.

    An even draw would nearly always return background, which pictures are full of.
    """
    gumbel = -torch.empty_like(errors).exponential_().log()
    keys = errors.clamp_min(1e-12).log() + gumbel
    drawn = keys.topk(min(num, len(errors))).indices
    return drawn.repeat(-(-num // len(drawn)))[:num] if num else drawn


def worst_served(vectors: Tensor, errors: Tensor, num: int) -> Tensor:
    """`num` of the vectors `n d` as `draw_by_error` draws them, the same on all ranks."""
    drawn = vectors[draw_by_error(errors, num)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(drawn, src=0)
    return drawn


def squared_distance(vectors: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Squared distance of each vector `n d` to its code, `n`."""
    return (vectors - codebook[codes]).square().sum(dim=1)


def kmeans(vectors: Tensor, num_clusters: int, *, num_steps: int = KMEANS_STEPS) -> Tensor:
    """Lloyd's algorithm on `n d` -> centres `k d`; empty clusters move to badly served vectors at each step."""
    centre = vectors[torch.randint(len(vectors), (1,), device=vectors.device)]
    errors = (vectors - centre).square().sum(dim=1)
    centres = torch.cat([centre, worst_served(vectors, errors, num_clusters)])[:num_clusters]
    for _ in range(num_steps):
        codes = nearest_codes(vectors, centres)
        counts, sums = assigned_sums(vectors, codes, num_clusters)
        means = sums / counts.clamp_min(1)[:, None]
        if (counts == 0).any():
            places = worst_served(vectors, squared_distance(vectors, centres, codes), num_clusters)
            means = torch.where(counts[:, None] > 0, means, places)
        centres = means
    return centres


class VectorQuantizer(nn.Module):
    """A codebook of `codebook_size` vectors of `code_dim`, and the nearest of them for every vector.

    Args:
        commitment: weight (beta) of the term that keeps the encoder near its codes.
        decay: of the exponential average by which the codebook follows its vectors; with `ema=False` it is trained by its loss.
        channel_axis: which axis of the input holds the `d` channels: -1 for `... d`, 1 for `b d h w`.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    skipped: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        commitment: float = 0.25,
        decay: float = 0.99,
        ema: bool = True,
        channel_axis: int = -1,
    ):
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.commitment, self.decay, self.ema, self.channel_axis = commitment, decay, ema, channel_axis
        codebook = torch.randn(codebook_size, code_dim) / code_dim**0.5
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.detach().clone())
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("skipped", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """`... d` (or `b d h w`, as `channel_axis` says) -> the nearest codebook entries, and the loss that draws both together.

        Vectors with a value that is not finite keep out of the codebook and the loss and are counted in `skipped`.
        """
        vectors = x.movedim(self.channel_axis, -1).float()
        flat = vectors.reshape(-1, self.code_dim)
        finite = flat.detach().isfinite().all(dim=1)
        clean = torch.where(finite[:, None], flat, 0)
        if self.training and not self.started:
            self._start(clean.detach()[finite])
        codes = nearest_codes(clean.detach(), self.codebook.detach())
        chosen = F.embedding(
            codes, self.codebook
        )  # before the codebook moves: a revived code is no longer near its vectors
        if self.training:
            self._learn(clean.detach(), codes, finite)
        loss = self._loss(clean, chosen, finite)
        # The sum of a code and exactly zero, whose gradient is the encoder's: straight through, to the last bit.
        quantized = chosen.detach() + (clean - clean.detach())
        quantized = quantized.reshape(vectors.shape).movedim(-1, self.channel_axis).to(x.dtype)
        return QuantizerOutput(quantized, codes.reshape(vectors.shape[:-1]), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `...` -> codebook entries `... d` (or `b d h w`)."""
        return F.embedding(codes, self.codebook).movedim(-1, self.channel_axis)

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, finite: Tensor) -> None:
        """Move the codebook by the finite ones of the vectors `n d`."""
        self.skipped += (~finite).sum()
        # What is not finite counts for a code that does not exist.
        kept = torch.where(finite, codes, self.codebook_size)
        counts, sums = (total[:-1] for total in assigned_sums(vectors, kept, self.codebook_size + 1))
        served = torch.where(finite[:, None], vectors, self.codebook[codes])  # no place for a revived code
        self._follow(counts, sums, worst_served(served, squared_distance(served, self.codebook, codes), len(counts)))

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        if not len(vectors):
            return
        centres = kmeans(vectors, self.codebook_size)
        self.codebook.data.copy_(centres)
        self.sums.copy_(centres)
        self.counts.fill_(1)
        self.started.fill_(True)

    def _follow(self, counts: Tensor, sums: Tensor, places: Tensor) -> None:
        """Appendix A.1, equations 6-8, then a new place `d` for each code that is out of use."""
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        even_share = self.counts.mean()
        dead = self.counts < DEAD_SHARE * even_share
        means = self.sums / self.counts.clamp_min(1e-5)[:, None] if self.ema else self.codebook
        # Ten times the share at which a code counts as dead: time to prove itself, then another try.
        second_chance = 10 * DEAD_SHARE * even_share
        self.codebook.data.copy_(torch.where(dead[:, None], places, means))
        self.sums.copy_(torch.where(dead[:, None], places * second_chance, self.sums))
        self.counts.copy_(torch.where(dead, second_chance, self.counts))

    def _loss(self, vectors: Tensor, chosen: Tensor, finite: Tensor) -> Tensor:
        """Equation 3: beta |z - sg(e)|^2, and |sg(z) - e|^2 where the codebook is trained by its loss."""
        share = finite.float().mean().clamp_min(1e-12)
        commitment = ((vectors - chosen.detach()).square().mean(dim=1) * finite).mean() / share
        if self.ema:
            return self.commitment * commitment
        codebook = ((vectors.detach() - chosen).square().mean(dim=1) * finite).mean() / share
        return self.commitment * commitment + codebook

    def metrics(self) -> dict[str, Tensor]:
        """Perplexity and the share of codes in use, over the last 1 / (1 - decay) training batches."""
        in_use = (self.counts > DEAD_SHARE * self.counts.mean()).float().mean()
        return {"perplexity": perplexity(self.counts), "code_usage": in_use}


def perplexity(histogram: Tensor) -> Tensor:
    """exp of the entropy of `... k` counts: how many codes would carry as much if all were used alike."""
    share = histogram / histogram.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1).exp()
