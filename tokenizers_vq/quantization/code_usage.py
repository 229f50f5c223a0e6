"""Count how often each code is used."""

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from .vector_layout import Vectors, VectorView


class CodeUsage(nn.Module):
    """How often each code was given in training since the last `reset`, which the trainer calls at each epoch."""

    histogram: Tensor

    def __init__(self, codebook_size: int):
        super().__init__()
        self.register_buffer("histogram", torch.zeros(codebook_size), persistent=False)

    def add(self, counts: Tensor) -> None:
        """Count a batch, `k`."""
        self.histogram += counts

    def add_codes(self, vectors: Vectors, codes: Tensor) -> None:
        """Count the codes `n` of those vectors that are kept, in all processes."""
        self.add(all_reduce_sum(torch.zeros_like(self.histogram).index_add_(0, codes, vectors.kept.float())))

    def reset(self) -> None:
        """Start to count anew."""
        self.histogram.zero_()

    def metrics(self) -> dict[str, Tensor]:
        """Perplexity, and the share of codes that were given at all."""
        return {"perplexity": perplexity(self.histogram), "code_usage": (self.histogram > 0).float().mean()}


def perplexity(histogram: Tensor) -> Tensor:
    """exp of the entropy of `... k` counts: how many codes would carry as much if all were used alike."""
    share = histogram / histogram.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1).exp()


def reset_code_usage(module: nn.Module) -> None:
    """Set what is counted in training, and not saved, to nothing counted."""
    if isinstance(module, VectorView):
        module.skipped.zero_()
    if isinstance(module, CodeUsage):
        module.reset()
