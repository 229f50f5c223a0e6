"""Counts how often each code is used in training."""

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from .vector_layout import Vectors, VectorView


class CodeUsage(nn.Module):
    """Histogram of the codes in training since the last `reset`.

    The trainer resets it at every epoch.

    Args:
        codebook_size: Number of codes `k`.
    """

    histogram: Tensor

    def __init__(self, codebook_size: int):
        super().__init__()
        self.register_buffer("histogram", torch.zeros(codebook_size), persistent=False)

    def add(self, counts: Tensor) -> None:
        """Add the counts `k` of a batch, already summed over all processes."""
        self.histogram += counts

    def add_codes(self, vectors: Vectors, codes: Tensor) -> None:
        """Count the codes `n` of the vectors inside the mask, over all processes."""
        self.add(all_reduce_sum(torch.zeros_like(self.histogram).index_add_(0, codes, vectors.mask.float())))

    def reset(self) -> None:
        """Set all counts to zero."""
        self.histogram.zero_()

    def metrics(self) -> dict[str, Tensor]:
        """Return `perplexity` and `code_usage`, the fraction of codes used at least once."""
        return {"perplexity": perplexity(self.histogram), "code_usage": (self.histogram > 0).float().mean()}


def perplexity(histogram: Tensor) -> Tensor:
    """Return exp(entropy) of counts `... k`: how many equally frequent codes have this entropy."""
    frequencies = histogram / histogram.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(frequencies).sum(dim=-1).exp()


def reset_code_usage(module: nn.Module) -> None:
    """Set counters, which are not saved, to zero; models call it on each module after loading."""
    if isinstance(module, VectorView):
        module.num_non_finite.zero_()
    if isinstance(module, CodeUsage):
        module.reset()
