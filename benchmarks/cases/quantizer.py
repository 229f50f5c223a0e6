"""Nearest-neighbour quantization: ours, the textbook form, and vector-quantize-pytorch.

All give the codes, the vectors they stand for and (the peer in training only) the commitment loss; training adds the gradient and the
moving average. Ours also revives dead codes; the others leave them where they are.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.quantizer import QuantizerOutput, VectorQuantizer

from ..harness import Case, Comparison, import_peer

COMMITMENT, DECAY = 0.25, 0.99


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Encoding and a training step, with a small codebook and a large one."""
    num_vectors, code_dim = (64, 4) if tiny else (16_384, 64)
    vectors = torch.randn(num_vectors, code_dim, generator=torch.Generator().manual_seed(0))
    peer = import_peer("vector_quantize_pytorch")
    for codebook_size in (8,) if tiny else (512, 8192):
        codebook = vectors[:codebook_size] + 0.1
        quantizers = {"ours": our_quantizer(codebook), "plain": PlainQuantizer(codebook)}
        if peer is not None:
            quantizers["vector-quantize-pytorch"] = PeerQuantizer(peer, codebook)
        size = f"{num_vectors} x {code_dim}, K={codebook_size}"
        encoding = [encode_case(name, quantizer, vectors) for name, quantizer in quantizers.items()]
        yield Comparison(f"encode, {size}", encoding, "plain")
        training = [training_case(name, quantizer, vectors) for name, quantizer in quantizers.items()]
        yield Comparison(f"training step, {size}", training, "plain")


class PlainQuantizer(nn.Module):
    """Distances of all pairs, their argmin, and one-hot rows for the moving average, all in memory."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Tensor):
        super().__init__()
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("counts", torch.ones(len(codebook)))
        self.register_buffer("sums", codebook.clone())

    def forward(self, x: Tensor) -> QuantizerOutput:
        """`n d` -> quantized `n d`, codes `n`, loss."""
        codes = torch.cdist(x.detach(), self.codebook).argmin(dim=1)
        chosen = self.codebook[codes]
        if self.training:
            self.follow(x.detach(), codes)
        return QuantizerOutput(x + (chosen - x).detach(), codes, COMMITMENT * F.mse_loss(x, chosen))

    def follow(self, x: Tensor, codes: Tensor) -> None:
        """Move the codebook by the vectors `n d` of these codes `n`."""
        one_hot = torch.zeros(len(x), len(self.codebook)).scatter_(1, codes[:, None], 1)
        self.counts.lerp_(one_hot.sum(dim=0), 1 - DECAY)
        self.sums.lerp_(one_hot.T @ x, 1 - DECAY)
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])


class PeerQuantizer(nn.Module):
    """The peer's quantizer with our settings; straight through, as ours is."""

    def __init__(self, peer: Any, codebook: Tensor):
        super().__init__()
        codebook_size, dim = codebook.shape
        self.inner = peer.VectorQuantize(
            dim=dim, codebook_size=codebook_size, decay=DECAY, commitment_weight=COMMITMENT, rotation_trick=False
        )
        self.inner.codebook = codebook

    def forward(self, x: Tensor) -> QuantizerOutput:
        """`n d` -> quantized `n d`, codes `n`, loss."""
        return QuantizerOutput(*self.inner(x))


def our_quantizer(codebook: Tensor) -> nn.Module:
    """Our quantizer, past its k-means."""
    quantizer = VectorQuantizer(*codebook.shape, commitment=COMMITMENT, decay=DECAY)
    quantizer.codebook.copy_(codebook)
    quantizer.sums.copy_(codebook)
    quantizer.started.fill_(True)
    return quantizer


def encode_case(name: str, quantizer: nn.Module, vectors: Tensor) -> Case:
    """A forward pass without gradient, in evaluation mode."""

    @torch.no_grad()
    def encode() -> Tensor:
        return quantizer(vectors).codes

    return Case(name, encode, quantizer.eval)


def training_case(name: str, quantizer: nn.Module, vectors: Tensor) -> Case:
    """Forward, back, and the codebook's move, always from the same state."""
    x, start = vectors.clone().requires_grad_(), deepcopy(quantizer.state_dict())

    def reset() -> None:
        quantizer.train().load_state_dict(start)
        x.grad = None

    def step() -> Tensor:
        output = quantizer(x)
        (output.quantized.square().mean() + output.loss).backward()
        return output.loss

    return Case(name, step, reset)
