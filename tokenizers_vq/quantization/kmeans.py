"""K-means and sampling of vectors in proportion to their error."""

import torch
from torch import Tensor

from .nearest_neighbors import nearest_codes

KMEANS_STEPS = 10
VECTORS_SHOWN = 2**15  # k-means of the start sees so many at most


def assigned_sums(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors `n d` each code got, `k`, and their sum, `k d`."""
    counts = vectors.new_zeros(codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums


def sample_proportional_to_error(errors: Tensor, num: int) -> Tensor:
    """Draw `num` of the examples, the likelier the larger their error `n` (as k-means++ does): their numbers, `num`.

    An even draw would nearly always return background, which images are full of.
    """
    drawn = gumbel_top_k(errors, torch.empty_like(errors).exponential_(), num)[0]
    return drawn.repeat(-(-num // len(drawn)))[:num] if num else drawn


def gumbel_top_k(errors: Tensor, noise: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The same by exponential `noise` `n` that is given, without repeats: numbers and their keys, best first, all where `num` is too many.

    The best keys of several parts of the examples are the best of the whole.
    """
    best = (errors.clamp_min(1e-12).log() - noise.log()).topk(min(num, len(errors)))
    return best.indices, best.values


def kmeans(vectors: Tensor, num_clusters: int, *, num_steps: int = KMEANS_STEPS) -> Tensor:
    """Lloyd's algorithm on `n d` -> centres `k d`; empty clusters move to badly served vectors at each step.

    It starts from vectors that those drawn before them serve badly, as k-means++ does (Arthur & Vassilvitskii 2007), but twice as many
    after every draw, as in Bahmani et al. 2012: all draws together cost one search.
    """
    centres = vectors[torch.randint(len(vectors), (1,), device=vectors.device)]
    while len(centres) < num_clusters:
        errors = (vectors - centres[nearest_codes(vectors, centres)]).square().sum(dim=1)
        centres = torch.cat([centres, vectors[sample_proportional_to_error(errors, len(centres))]])[:num_clusters]
    for _ in range(num_steps):
        codes = nearest_codes(vectors, centres)
        counts, sums = assigned_sums(vectors, codes, num_clusters)
        errors = (vectors - centres[codes]).square().sum(dim=1)
        places = vectors[sample_proportional_to_error(errors, num_clusters)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], places)
    return centres
