"""Compare quantizers in the same VQ-VAE on CIFAR-10: error, codebook usage and training time.

    python training/experiments/compare_quantizers_cifar10.py DATA --steps 1000 --seeds 3
    [--search-steps 10] [--peer CHECKOUT ...]

The network and all settings are those of the authors' CIFAR-10 example (van den Oord et al. 2017; `vqvae_example` of
DeepMind Sonnet). All quantizers get the same initial weights and the same batches. Ours is compared with the plain
quantizer of the first PyTorch ports. `--peer` adds that of vector-quantize-pytorch, with its own decay and with the
example's. The second error is that of the codes that our latent optimization finds for the
trained network, with any of the quantizers.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from torch import Tensor, nn

from tok2img.data.images import load_images
from tok2img.data.loading import load_captioned_images
from tokenizers_vq import VectorQuantizer
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.quantization.code_usage import perplexity
from tokenizers_vq.vqvae.latent_optimization import QuantizedImages, optimize_latents

IMAGE_SIZE, CODEBOOK_SIZE, CODE_DIM = 32, 512, 64
COMMITMENT, DECAY = 0.25, 0.99
BATCH_SIZE, LEARNING_RATE = 32, 3e-4
TEST_BATCH_SIZE = 250

# Quantized vectors `b d h w` with gradients to the input, codes `b h w`, and the quantizer's loss.
Quantized = tuple[Tensor, Tensor, Tensor]


class ResidualStack(nn.Module):
    """Residual blocks with a bottleneck. No ReLU is in place, because the skip connection still needs its input."""

    def __init__(self, num_blocks: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(128, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 128, 1))
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to `b c h w`."""
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)


def build_networks() -> tuple[nn.Sequential, nn.Sequential]:
    """Build the encoder (stride 4) and the decoder, initialized as in Sonnet: truncated normal with deviation 1/sqrt(fan-in)."""
    encoder = nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), ResidualStack(), nn.Conv2d(128, CODE_DIM, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(CODE_DIM, 128, 3, padding=1), ResidualStack(),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, stride=2, padding=1),
    )  # fmt: skip
    for layer in nn.ModuleList([encoder, decoder]).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            deviation = (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]) ** -0.5
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return encoder, decoder


class OurQuantizer(nn.Module):
    """`VectorQuantizer` with the example's settings, and defaults otherwise."""

    def __init__(self):
        super().__init__()
        self.quantizer = VectorQuantizer(
            CODEBOOK_SIZE, CODE_DIM, commitment_weight=COMMITMENT, decay=DECAY, channel_axis=1
        )

    def forward(self, x: Tensor) -> Quantized:
        """Quantize vectors `b d h w`; see `Quantized`."""
        output = self.quantizer(x)
        return output.quantized, output.codes, output.loss


class PlainQuantizer(nn.Module):
    """Moving averages of appendix A.1 as in the first PyTorch ports: random initial codes, and dead codes are not replaced."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("codebook", torch.randn(CODEBOOK_SIZE, CODE_DIM))
        self.register_buffer("counts", torch.zeros(CODEBOOK_SIZE))
        self.register_buffer("sums", torch.randn(CODEBOOK_SIZE, CODE_DIM))

    def forward(self, x: Tensor) -> Quantized:
        """Quantize vectors `b d h w`; see `Quantized`."""
        vectors = rearrange(x, "b d h w -> (b h w) d")
        codes = torch.cdist(vectors.detach(), self.codebook).argmin(dim=1)
        if self.training:
            self._update_codebook(vectors.detach(), F.one_hot(codes, CODEBOOK_SIZE).float())
        chosen = rearrange(self.codebook[codes], "(b h w) d -> b d h w", h=x.shape[2], w=x.shape[3])
        codes = rearrange(codes, "(b h w) -> b h w", h=x.shape[2], w=x.shape[3])
        return x + (chosen - x).detach(), codes, COMMITMENT * F.mse_loss(x, chosen)

    def _update_codebook(self, vectors: Tensor, chosen: Tensor) -> None:
        """Update the codebook from vectors `n d` and their one-hot codes `n k`."""
        self.counts.lerp_(chosen.sum(dim=0), 1 - DECAY)
        self.sums.lerp_(chosen.T @ vectors, 1 - DECAY)
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) / (total + CODEBOOK_SIZE * 1e-5) * total
        self.codebook.copy_(self.sums / smoothed[:, None])


class PeerQuantizer(nn.Module):
    """`VectorQuantize` of vector-quantize-pytorch, with its defaults except for the commitment weight and `options`."""

    def __init__(self, **options: Any):
        super().__init__()
        peer: Any = import_module("vector_quantize_pytorch")
        self.quantizer = peer.VectorQuantize(
            dim=CODE_DIM, codebook_size=CODEBOOK_SIZE, commitment_weight=COMMITMENT, accept_image_fmap=True, **options
        )

    def forward(self, x: Tensor) -> Quantized:
        """Quantize vectors `b d h w`; see `Quantized`."""
        quantized, codes, loss = self.quantizer(x)
        return quantized, codes, loss.sum()


@dataclass
class Figures:
    """Results of one run.

    Attributes:
        error: Squared error, relative to the variance of the images.
        searched: The same with the codes that the latent optimization finds.
        codes_in_use: Number of codes that the test set uses.
        perplexity: Perplexity of the codes.
        seconds: CPU seconds of training.
    """

    error: float
    searched: float
    codes_in_use: float
    perplexity: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.error:8.4f} {self.searched:8.4f} {self.codes_in_use:8.0f} {self.perplexity:12.1f} {self.seconds:10.1f}"


def contenders(*, with_peer: bool) -> dict[str, Callable[[], nn.Module]]:
    """Return a function that builds each quantizer, by name."""
    found: dict[str, Callable[[], nn.Module]] = {"ours": OurQuantizer, "plain": PlainQuantizer}
    if with_peer:
        found["vector-quantize-pytorch"] = PeerQuantizer
        found[f"the same, decay {DECAY}"] = partial(PeerQuantizer, decay=DECAY)
    return found


def batches(pixels: Tensor, *, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `num_steps` batches of pixels `n c h w`, reshuffled in every epoch."""
    order = torch.Generator().manual_seed(seed)
    full = max(len(pixels) // BATCH_SIZE, 1)
    epochs = (torch.randperm(len(pixels), generator=order).split(BATCH_SIZE)[:full] for _ in count())
    for rows in islice(chain.from_iterable(epochs), num_steps):
        yield pixels[rows]


def train(
    build: Callable[[], nn.Module], pixels: Tensor, test: Tensor, *, num_steps: int, seed: int, search_steps: int
) -> Figures:
    """Train on pixels `n c h w` in [-0.5, 0.5], and evaluate on `test`."""
    torch.manual_seed(seed)
    encoder, decoder = build_networks()
    quantizer = build().train()
    parameters = [parameter for each in (encoder, quantizer, decoder) for parameter in each.parameters()]
    optimizer, variance = torch.optim.Adam(parameters, LEARNING_RATE), pixels.var(correction=0)
    started = time.process_time()
    for batch in batches(pixels, num_steps=num_steps, seed=seed):
        quantized, _, quantizer_loss = quantizer(encoder(batch))
        loss = F.mse_loss(decoder(quantized), batch) / variance + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - started
    error, histogram = evaluate(encoder, quantizer.eval(), decoder, test)
    searched = searched_error(encoder, quantizer, decoder, test, variance=variance, num_steps=search_steps)
    return Figures(
        error / variance.item(), searched, (histogram > 0).sum().item(), perplexity(histogram).item(), seconds
    )


@torch.no_grad()
def evaluate(encoder: nn.Module, quantizer: nn.Module, decoder: nn.Module, test: Tensor) -> tuple[float, Tensor]:
    """Return the mean squared error of pixels `n c h w`, and how often each code is used, `k`."""
    squares, histogram = 0.0, torch.zeros(CODEBOOK_SIZE)
    for batch in test.split(TEST_BATCH_SIZE):
        quantized, codes, _ = quantizer(encoder(batch))
        squares += (decoder(quantized) - batch).square().sum().item()
        histogram += torch.bincount(codes.flatten(), minlength=CODEBOOK_SIZE)
    return squares / test.numel(), histogram


def searched_error(
    encoder: nn.Module, quantizer: nn.Module, decoder: nn.Module, test: Tensor, *, variance: Tensor, num_steps: int
) -> float:
    """Return the relative squared error of pixels `n c h w` with the codes that the latent optimization finds."""

    def code(latents: Tensor, offsets: list[Tensor]) -> QuantizedImages:
        moved = latents + offsets[0]
        quantized, codes, loss = quantizer(moved)
        return QuantizedImages(decoder(quantized), [codes], loss, [(moved - quantized).detach()])

    def measure(reconstruction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(reconstruction, target) / variance

    least = []
    for batch in test.split(TEST_BATCH_SIZE):
        with torch.no_grad():
            latents = encoder(batch)
        nothing = [torch.zeros_like(latents)]
        least.append(optimize_latents(partial(code, latents), batch, nothing, measure=measure, num_steps=num_steps)[1])
    return torch.cat(least).mean().item()


def load(data: str, split: str, max_samples: int | None = None) -> Tensor:
    """Load the images of a split, `n c h w` in [-0.5, 0.5]."""
    rows = load_captioned_images(data, split=split, with_captions=False, max_samples=max_samples)
    return pixels_from_images(load_images(rows["image"][:]), image_size=IMAGE_SIZE, num_channels=3) - 0.5


def main(
    data: Annotated[str, typer.Argument(help="Data set with splits train and test, in any form that `tok2img` reads.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per quantizer, with seeds from 0.")] = 3,
    search_steps: Annotated[int, typer.Option(min=0, help="Steps of the latent optimization.")] = 10,
    names: Annotated[
        list[str] | None, typer.Option("--only", help="Quantizer to train; may be repeated. Default: all.")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images of each split. Default: all.")
    ] = None,
    peer: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Checkout of another project to import from; may be repeated. Default: none.",
        ),
    ] = None,
) -> None:
    """Train and evaluate all quantizers with every seed, then print the medians."""
    sys.path[:0] = [str(path.resolve()) for path in peer or []]
    builds = contenders(with_peer=find_spec("vector_quantize_pytorch") is not None)
    for name in names or []:
        if name not in builds:
            raise typer.BadParameter(f"no quantizer {name!r}; there are {', '.join(builds)}")
    pixels, test = load(data, "train", max_samples), load(data, "test", max_samples)
    runs: dict[str, list[Figures]] = {name: [] for name in names or builds}
    print(f"{'':32} {'error':>8} {'searched':>8} {'in use':>8} {'perplexity':>12} {'CPU s':>10}   ({steps} steps)")
    for seed in range(seeds):
        for name, each in runs.items():
            each.append(train(builds[name], pixels, test, num_steps=steps, seed=seed, search_steps=search_steps))
            print(f"{name + ', seed ' + str(seed):32} {each[-1]}", flush=True)
    for name, each in runs.items():
        print(f"{name + ', median':32} {Figures(*map(median, zip(*map(astuple, each), strict=True)))}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
