"""Quantize vectors: our quantizer, the textbook form, diffusers and vector-quantize-pytorch.

The search is also compared with the matrix product that it needs at least, and a residual quantizer with the peer's.
All return the codes, the quantized vectors and (the peer in training only) the commitment loss;
training adds the gradient
and the moving average. Ours also replaces dead codes; the others do not.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vq.quantization.nearest_neighbors import CHUNK, nearest_codes
from tokenizers_vq.quantization.residual_quantizer import ResidualQuantizer
from tokenizers_vq.quantization.vector_quantizer import QuantizerOutput, VectorQuantizer

from ..harness import Case, Comparison, import_peer

COMMITMENT, DECAY = 0.25, 0.99
PEER = "vector-quantize-pytorch"


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare search, encoding and training with a small and a large codebook, and residual quantizers of four codebooks."""
    num_vectors, code_dim = (64, 4) if tiny else (16_384, 64)
    vectors = torch.randn(num_vectors, code_dim, generator=torch.Generator().manual_seed(0))
    peer, diffusers = import_peer("vector_quantize_pytorch"), import_peer("diffusers.models.autoencoders.vae")
    for codebook_size in (8,) if tiny else (512, 8192):
        codebook = vectors[:codebook_size] + 0.1
        size = f"{num_vectors} x {code_dim}, K={codebook_size}"
        yield search_comparison(f"search, {size}", vectors, codebook)
        quantizers = {"ours": our_quantizer(codebook), "plain": PlainQuantizer(codebook)}
        if diffusers is not None:
            quantizers["diffusers"] = DiffusersQuantizer(diffusers, codebook)
        if peer is not None:
            quantizers[PEER] = PeerQuantizer(peer, codebook)
        yield from both(size, quantizers, vectors, baseline="plain")
    if peer is not None:
        codebook_size, num_quantizers = (8, 2) if tiny else (512, 4)
        stacks = {
            "ours": our_stack(vectors, codebook_size, num_quantizers),
            PEER: PeerStack(peer, vectors, codebook_size, num_quantizers),
        }
        yield from both(
            f"{num_vectors} x {code_dim}, {num_quantizers} of K={codebook_size}", stacks, vectors, baseline=PEER
        )


def both(size: str, quantizers: dict[str, nn.Module], vectors: Tensor, *, baseline: str) -> Iterator[Comparison]:
    """Compare encoding and a training step of the same quantizers."""
    encoding = [encode_case(name, quantizer, vectors) for name, quantizer in quantizers.items()]
    yield Comparison(f"encode, {size}", encoding, baseline)
    training = [training_case(name, quantizer, vectors) for name, quantizer in quantizers.items()]
    yield Comparison(f"training step, {size}", training, baseline)


def search_comparison(title: str, vectors: Tensor, codebook: Tensor) -> Comparison:
    """Compare the search with its scores alone, computed in chunks that fit into the cache."""
    num, size = CHUNK
    parts = [part.T.contiguous() for part in codebook.split(size)]
    scores = torch.empty(min(num, len(vectors)), min(size, len(codebook)))

    def multiply() -> None:
        for chunk in vectors.split(num):
            for part in parts:
                torch.mm(chunk, part, out=scores[: len(chunk), : part.shape[1]])

    cases = [Case("ours", lambda: nearest_codes(vectors, codebook)), Case("matrix product", multiply)]
    return Comparison(title, cases, "matrix product")


class PlainQuantizer(nn.Module):
    """Textbook quantizer: the distances of all pairs, their argmin, and one-hot rows for the moving average."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Tensor):
        super().__init__()
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("counts", torch.ones(len(codebook)))
        self.register_buffer("sums", codebook.clone())

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantize `n d`: quantized `n d`, codes `n`, loss."""
        codes = torch.cdist(x.detach(), self.codebook).argmin(dim=1)
        chosen = self.codebook[codes]
        if self.training:
            self.follow(x.detach(), codes)
        return QuantizerOutput(x + (chosen - x).detach(), codes, COMMITMENT * F.mse_loss(x, chosen))

    def follow(self, x: Tensor, codes: Tensor) -> None:
        """Update the codebook from vectors `n d` and their codes `n`."""
        one_hot = torch.zeros(len(x), len(self.codebook)).scatter_(1, codes[:, None], 1)
        self.counts.lerp_(one_hot.sum(dim=0), 1 - DECAY)
        self.sums.lerp_(one_hot.T @ x, 1 - DECAY)
        self.codebook.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])


class PeerQuantizer(nn.Module):
    """Quantizer of vector-quantize-pytorch with our settings and the straight-through estimator."""

    def __init__(self, peer: Any, codebook: Tensor):
        super().__init__()
        codebook_size, dim = codebook.shape
        self.inner = peer.VectorQuantize(
            dim=dim, codebook_size=codebook_size, decay=DECAY, commitment_weight=COMMITMENT, rotation_trick=False
        )
        self.inner.codebook = codebook

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantize `n d`: quantized `n d`, codes `n`, loss."""
        return QuantizerOutput(*self.inner(x))


class DiffusersQuantizer(nn.Module):
    """Quantizer of diffusers' VQModel, which learns by its loss.

    Its gradient is measured, the optimizer's step is not.
    """

    def __init__(self, diffusers: Any, codebook: Tensor):
        super().__init__()
        self.inner = diffusers.VectorQuantizer(*codebook.shape, beta=COMMITMENT, legacy=False)
        self.inner.embedding.weight.data.copy_(codebook)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantize `n d`: quantized `n d`, codes `n`, loss."""
        image = x[None, None].movedim(-1, 1)  # `1 d 1 n`, whose vectors lie as it wants them
        quantized, loss, (_, _, codes) = self.inner(image)
        own_share = COMMITMENT / (1 + COMMITMENT)  # its loss holds the codebook's term too, which ours has no need of
        return QuantizerOutput(quantized.movedim(1, -1)[0, 0], codes, own_share * loss)


class PeerStack(nn.Module):
    """Residual quantizer of vector-quantize-pytorch with our settings."""

    def __init__(self, peer: Any, vectors: Tensor, codebook_size: int, num_quantizers: int):
        super().__init__()
        self.inner = peer.ResidualVQ(
            dim=vectors.shape[1],
            num_quantizers=num_quantizers,
            codebook_size=codebook_size,
            decay=DECAY,
            commitment_weight=COMMITMENT,
            rotation_trick=False,
        )
        for layer in self.inner.layers:
            layer.codebook = vectors[:codebook_size] + 0.1

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantize `n d`: quantized `n d`, codes `n l`, loss."""
        quantized, codes, losses = self.inner(x)
        return QuantizerOutput(quantized, codes, losses.mean())


def our_stack(vectors: Tensor, codebook_size: int, num_quantizers: int) -> nn.Module:
    """Build our residual quantizer, already initialized."""
    stack = ResidualQuantizer(
        codebook_size, vectors.shape[1], num_quantizers, commitment_weight=COMMITMENT, decay=DECAY
    )
    for level in stack.quantizers():
        place(level, vectors[:codebook_size] + 0.1)
    return stack


def our_quantizer(codebook: Tensor) -> nn.Module:
    """Build our quantizer, already initialized."""
    quantizer = VectorQuantizer(*codebook.shape, commitment_weight=COMMITMENT, decay=DECAY)
    place(quantizer, codebook)
    return quantizer


def place(quantizer: VectorQuantizer, codebook: Tensor) -> None:
    """Initialize a codebook near the data, as k-means would."""
    quantizer.codebook.copy_(codebook)
    quantizer.embed_avg.copy_(codebook)
    quantizer.cluster_size.fill_(1)
    quantizer.initialized.fill_(True)


def encode_case(name: str, quantizer: nn.Module, vectors: Tensor) -> Case:
    """Run a forward pass without gradient, in eval mode."""

    @torch.no_grad()
    def encode() -> Tensor:
        return quantizer(vectors).codes

    return Case(name, encode, quantizer.eval)


def training_case(name: str, quantizer: nn.Module, vectors: Tensor) -> Case:
    """Run a training step from the same state every time; the gradient of a decoder is given."""
    x, start, gradient = vectors.clone().requires_grad_(), deepcopy(quantizer.state_dict()), vectors / vectors.numel()

    def reset() -> None:
        quantizer.train().load_state_dict(start)
        x.grad = None

    def step() -> Tensor:
        output = quantizer(x)
        torch.autograd.backward([output.quantized, output.loss], [gradient, None])
        return output.loss

    return Case(name, step, reset)
