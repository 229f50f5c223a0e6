"""Which of `k` vectors is nearest, and where `k` vectors best stand: search, k-means, and places for vectors out of use."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_PER_CHUNK = 2**18  # 1 MB of float32 scores stays in a core's cache; memory does not grow with the codebook
SCORES_PER_CHUNK_ON_GPU = 2**26
SMALLEST_CHUNK = 64
SMALLEST_BLOCKED = 64  # from so many columns on, two short argmax beat one
KMEANS_STEPS = 10


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry `k d` nearest to each vector `n d` -> `n`, in float32 whatever autocast says.

    |v - e|^2 without |v|^2, which no choice of e changes.
    """
    with torch.autocast(vectors.device.type, enabled=False), torch.no_grad():
        codebook, width = codebook.float(), block_width(len(codebook))
        padding = -len(codebook) % width
        # |e|^2 / 2 is one more product, with -1: cheaper than a sum of all scores.
        half_norms = F.pad(codebook.square().sum(dim=1) / 2, (0, padding), value=torch.inf)
        columns = torch.cat([F.pad(codebook, (0, 0, 0, padding)), half_norms[:, None]], dim=1).T.contiguous()
        scores_per_chunk = SCORES_PER_CHUNK if vectors.device.type == "cpu" else SCORES_PER_CHUNK_ON_GPU
        chunks = F.pad(vectors.float(), (0, 1), value=-1).split(
            max(SMALLEST_CHUNK, scores_per_chunk // len(half_norms))
        )
        scores = columns.new_empty(len(chunks[0]), len(half_norms))
        found = [blocked_argmax(torch.mm(chunk, columns, out=scores[: len(chunk)]), width) for chunk in chunks]
        return torch.cat(found)


def block_width(num_columns: int) -> int:
    """A power of two near sqrt(2 k): columns in a block of `blocked_argmax`."""
    return 1 if num_columns < SMALLEST_BLOCKED else 1 << num_columns.bit_length() // 2


def blocked_argmax(scores: Tensor, width: int) -> Tensor:
    """Column of the highest score of each row `n k` -> `n`; `k` is a multiple of `width`.

    The place within a block first, then the block: torch finds a maximum ten times as fast as where it is, on a CPU.
    """
    if width == 1:
        return scores.argmax(dim=1)
    place = scores.unflatten(1, (-1, width)).amax(dim=1).argmax(dim=1)
    candidates = place[:, None] + torch.arange(0, scores.shape[1], width, device=scores.device)
    return place + width * scores.gather(1, candidates).argmax(dim=1)


def assigned_sums(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many vectors `n d` each code got, `k`, and their sum, `k d`."""
    counts = vectors.new_zeros(codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums


def draw_by_error(errors: Tensor, num: int) -> Tensor:
    """Draw `num` of the examples, the likelier the larger their error `n` (as k-means++ does): their numbers, `num`.

    An even draw would nearly always return background, which pictures are full of.
    """
    drawn = best_by_error(errors, torch.empty_like(errors).exponential_(), num)[0]
    return drawn.repeat(-(-num // len(drawn)))[:num] if num else drawn


def best_by_error(errors: Tensor, noise: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The same by exponential `noise` `n` that is given, without repeats: numbers and their keys, best first, all where `num` is too many.

    The best keys of several parts of the examples are the best of the whole.
    """
    best = (errors.clamp_min(1e-12).log() - noise.log()).topk(min(num, len(errors)))
    return best.indices, best.values


def kmeans(vectors: Tensor, num_clusters: int, *, num_steps: int = KMEANS_STEPS) -> Tensor:
    """Lloyd's algorithm on `n d` -> centres `k d`; empty clusters move to badly served vectors at each step."""
    centre = vectors[torch.randint(len(vectors), (1,), device=vectors.device)]
    errors = (vectors - centre).square().sum(dim=1)
    centres = torch.cat([centre, vectors[draw_by_error(errors, num_clusters)]])[:num_clusters]
    for _ in range(num_steps):
        codes = nearest_codes(vectors, centres)
        counts, sums = assigned_sums(vectors, codes, num_clusters)
        errors = (vectors - centres[codes]).square().sum(dim=1)
        places = vectors[draw_by_error(errors, num_clusters)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], places)
    return centres
