"""Which of `k` vectors is nearest, and where `k` vectors best stand: search, k-means, and places for vectors out of use."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Vectors and codes compared at once: their float32 scores stay in a core's cache, whatever the codebook's size, and just below 2 MB, from
# where on torch asks for huge pages.
CHUNK = 1008, 512
CHUNK_ON_GPU = 2**13, 2**13
HAS_ONEDNN = torch.backends.mkldnn.is_available()
NUM_IMAGES = 16  # of so many and more torch hands a convolution to oneDNN, whatever their size


def nearest(vectors: Tensor, codebook: Tensor, chosen: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes `n` of the entries `k d` nearest to vectors `n d`, and their squared distances `n`.

    The entries themselves are written to `chosen` `n d`, and what they leave of the vectors to `rest` `n d`, if that is given: all while
    a chunk of them is in the cache, and to memory of the caller's, for new memory costs as much as a lookup.
    """
    with torch.autocast(vectors.device.type, enabled=False), torch.no_grad():
        search = Search(codebook, len(vectors))
        codes, errors = vectors.new_empty(len(vectors), dtype=torch.long), vectors.new_empty(len(vectors))
        scratch = torch.empty_like(vectors[: search.num_rows])
        for first in range(0, len(vectors), search.num_rows):
            rows = slice(first, first + search.num_rows)
            torch.index_select(codebook, 0, codes[rows].copy_(search(vectors[rows])), out=chosen[rows])
            left = scratch[: len(codes[rows])] if rest is None else rest[rows]
            torch.sub(vectors[rows], chosen[rows], out=left)
            torch.linalg.vector_norm(left, dim=1, out=errors[rows]).square_()
        return codes, errors


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry `k d` nearest to each vector `n d` -> `n`, in float32 whatever autocast says."""
    with torch.autocast(vectors.device.type, enabled=False), torch.no_grad():
        search = Search(codebook.float(), len(vectors))
        return torch.cat([search(chunk) for chunk in vectors.float().split(search.num_rows)])


class Search:
    """Finds the nearest entries of a codebook `k d` to `num_rows` vectors at a time, or as many as there are.

    |v - e|^2 without |v|^2, which no choice of e changes; both are seen from the middle of the codebook, so that far from zero, too, the
    products leave digits to tell distances by.
    """

    def __init__(self, codebook: Tensor, num_vectors: int):
        num, size = CHUNK if codebook.device.type == "cpu" else CHUNK_ON_GPU
        self.num_rows = max(1, min(num, num_vectors))
        self.middle = codebook.mean(dim=0)
        missing = -len(codebook) % NUM_IMAGES  # filled up with entries that are nearest to nothing
        entries = codebook.new_full((len(codebook) + missing, codebook.shape[1] + 1), torch.inf)
        entries[len(codebook) :, :-1] = 0
        known = entries[: len(codebook)]
        known[:, :-1].copy_(codebook).sub_(self.middle)
        # |e|^2 / 2 is one more product, with -1: cheaper than a sum of all scores.
        known[:, -1] = torch.linalg.vector_norm(known[:, :-1], dim=1).square() / 2
        self.parts = [as_images(part) for part in entries.split(size)]
        self.rows = codebook.new_full((self.num_rows, codebook.shape[1] + 1), -1)  # stays in the cache

    def __call__(self, vectors: Tensor) -> Tensor:
        """Vectors `n d`, at most `num_rows` -> codes `n`: those with which the products of entry and vector, with |e|^2 / 2 and -1 at
        their ends, are highest.
        """
        rows = self.rows[: len(vectors)]
        rows[:, :-1].copy_(vectors).sub_(self.middle)
        found = [highest(products(part, rows)) for part in self.parts]
        if len(found) == 1:
            return found[0][1]
        values, best_rows = map(torch.stack, zip(*found, strict=True))
        best = highest(values)[1]
        return best * self.parts[0].shape[2] * NUM_IMAGES + best_rows.gather(0, best[None])[0]


def as_images(part: Tensor) -> Tensor:
    """Rows `(p k) d` as the pixels of images, `p d k 1`, channels last."""
    return rearrange(part, "(p k) d -> p d k 1", p=NUM_IMAGES)


def products(images: Tensor, rows: Tensor) -> Tensor:
    """Products of all pixels `p d k 1` and rows `n d` -> `(p k) n`.

    On a CPU by a convolution: oneDNN, which torch convolves with, is twice as fast on an AMD as what torch multiplies matrices with (190
    and 98 GFLOP/s a core), and gives the same bits for few rows as for many.
    """
    if HAS_ONEDNN and images.device.type == "cpu" and len(rows):
        return F.conv2d(images, rows[:, :, None, None]).movedim(1, 3).flatten(0, 2)
    return rearrange(images, "p d k 1 -> (p k) d") @ rows.T


def highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Highest score of each column `k n` and its row, the first if there are several -> `n`, `n`.

    A maximum pooled over whole columns: of torch's ways to tell where a maximum is the only vectorised one on a CPU, 10 times as fast as
    `argmax`.
    """
    if scores.device.type != "cpu" or not scores.numel():
        return scores.max(dim=0)
    images = scores[None, :, None].movedim(3, 1)  # `1 n k 1`, channels last
    values, rows = F.max_pool2d_with_indices(images, (len(scores), 1))
    return values.flatten(), rows.flatten()
