"""K-means clustering, and sampling of examples in proportion to their error."""

import torch
from torch import Tensor

from .nearest_neighbors import nearest_codes

KMEANS_STEPS = 10
MAX_INIT_VECTORS = 2**15  # bounds the time that initializing a codebook takes


def cluster_statistics(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Return the size of each cluster, `k`, and the sum of its vectors, `k d`.

    `index_add_` reads each vector once; the usual one-hot matrix product would read `n k` numbers.

    Args:
        vectors: `n d`.
        codes: Cluster of each vector, `n`.
        codebook_size: Number of clusters `k`.
    """
    counts = vectors.new_zeros(codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums


def sample_proportional_to_error(errors: Tensor, num: int) -> Tensor:
    """Sample examples with probability proportional to their error, as k-means++ does.

    Uniform sampling would nearly always return background, which images are full of.

    Args:
        errors: Error of each example, `n`, at least 0.
        num: Number of samples; examples repeat if there are fewer.

    Returns:
        Indices of the examples, `num`.
    """
    sampled = gumbel_top_k(errors, torch.empty_like(errors).exponential_(), num)[0]
    return sampled.repeat(-(-num // len(sampled)))[:num] if num else sampled


def gumbel_top_k(errors: Tensor, noise: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Sample without replacement by the Gumbel top-k trick (Kool et al. 2019).

    log(error) - log(noise) is the log-probability plus Gumbel noise. Its top k are such a sample,
    and the top k over several processes are a sample of all their examples.

    Args:
        errors: Error of each example, `n`, at least 0.
        noise: Standard exponential noise, `n`.
        num: Number of samples; all `n` if there are fewer.

    Returns:
        Indices of the examples and their keys, best first.
    """
    # The floor gives examples without error a finite key, so that they can fill up the sample.
    top = (errors.clamp_min(1e-12).log() - noise.log()).topk(min(num, len(errors)))
    return top.indices, top.values


def kmeans(vectors: Tensor, num_clusters: int, *, num_steps: int = KMEANS_STEPS) -> Tensor:
    """Cluster vectors by Lloyd's algorithm; empty clusters move to vectors with a large error.

    The initial centers are sampled as in k-means++ (Arthur and Vassilvitskii 2007). The number of
    centers doubles with every round, as in k-means|| (Bahmani et al. 2012), so all rounds together
    cost one search instead of `num_clusters`.

    Args:
        vectors: `n d`, at least one.
        num_clusters: Number of clusters `k`.
        num_steps: Iterations of Lloyd's algorithm; 0 = return the initial centers.

    Returns:
        The centers, `k d`.
    """
    centers = vectors[torch.randint(len(vectors), (1,), device=vectors.device)]
    while len(centers) < num_clusters:
        errors = (vectors - centers[nearest_codes(vectors, centers)]).square().sum(dim=1)
        centers = torch.cat([centers, vectors[sample_proportional_to_error(errors, len(centers))]])[:num_clusters]
    for _ in range(num_steps):
        codes = nearest_codes(vectors, centers)
        counts, sums = cluster_statistics(vectors, codes, num_clusters)
        errors = (vectors - centers[codes]).square().sum(dim=1)
        # Sampled even if no cluster is empty: asking would wait for the GPU at every step.
        candidates = vectors[sample_proportional_to_error(errors, num_clusters)]
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], candidates)
    return centers
