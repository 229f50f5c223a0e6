"""VQ-VAE for images: an autoencoder whose latents are codebook entries (van den Oord et al. 2017).

With several grids it is a VQ-VAE-2 (Razavi et al. 2019): each coarser grid has half the height and
width, is quantized first, and conditions those after it.

    pixels -> encoder -> quant_conv -> quantizer -> post_quant_conv -> decoder -> pixels
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..base import DiscreteTokenizer, TokenizerOutput
from ..images.normalization import PixelNormalization
from ..losses.reconstruction import PIXEL_LOSSES, ReconstructionLoss
from ..modules.batch_invariant import batch_invariant_conv1x1, batch_invariant_encode
from ..modules.conv import ResidualBlock, channels_last, downsampling, group_norm, upsampling
from ..modules.eval_mode import eval_mode
from ..quantization.code_usage import reset_code_usage
from ..quantization.configuration import Quantizer, build_quantizer
from ..quantization.kmeans import MAX_INIT_VECTORS
from ..quantization.residual_quantizer import ResidualQuantizer
from ..validation import skip_validation
from .configuration import VQVAEConfig
from .latent_optimization import QuantizedImages, optimize_latents

# Pixels of the images that are searched together: their activations wait for the backward pass.
SEARCH_PIXELS, SEARCH_PIXELS_ON_GPU = 2**15, 2**20


class TopGrid(nn.Module):
    """Modules of a coarser grid, with half the height and width of the next finer one.

    It is the top level of Razavi et al. 2019, section 3.1.

    Args:
        config: Settings of the model.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        width = config.hidden_channels
        self.down = nn.Sequential(
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            *residual_stack(width, config.num_encoder_blocks),
            nn.ReLU(),
        )
        self.quant_conv = nn.Conv2d(width, config.code_dim, 1)
        self.quantizer = build_quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.decoder = nn.Sequential(
            *residual_stack(width, config.num_decoder_blocks), group_norm(width), upsampling([width], width)
        )


class VQVAE(DiscreteTokenizer):
    """Image tokenizer with one code, or several that add up, for each cell of a grid.

    It codes images of any size that is a multiple of `config.stride`. `num_codes` and `code_shape`
    are those of `config.image_size`.

    Args:
        config: Settings of the model.

    Example:
        >>> import torch
        >>> from tokenizers_vq import VQVAEConfig
        >>> config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=0)
        >>> model = VQVAE(config).eval()
        >>> images = torch.rand(5, 3, 8, 8)
        >>> codes = model.encode(images)
        >>> model.code_shape, codes.shape, model.decode(codes).shape
        ((2, 2), torch.Size([5, 4]), torch.Size([5, 3, 8, 8]))
        >>> model.train()(images).loss.backward()
    """

    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config, stride=config.stride)
        widths, width = config.block_out_channels(), config.hidden_channels
        self.encoder = nn.Sequential(
            downsampling(config.num_channels, widths), *residual_stack(width, config.num_encoder_blocks), nn.ReLU()
        )
        self.quant_conv = nn.Conv2d(width, config.code_dim, 1)
        self.quantizer = build_quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.decoder = nn.Sequential(
            *residual_stack(width, config.num_decoder_blocks),
            group_norm(width),
            upsampling(widths[::-1], config.num_channels),
        )
        self.top_grids = nn.ModuleList(TopGrid(config) for _ in range(config.num_grids - 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Reset the counters, which are not saved. Weights keep the initialization of torch."""
        reset_code_usage(module)

    @property
    def num_quantizers(self) -> int:
        """Number of codes of a cell."""
        return self.config.codes_per_vector

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes of an image of `config.image_size`.

        `(h, w)` with one code a cell, `(n, h, w)` with n codes a cell. Several grids are one
        sequence, `(num_codes,)`.
        """
        lengths = self.positions_per_codebook
        if self.config.num_grids > 1:
            return (sum(lengths),)
        (shape,) = self.grid_shapes()
        return shape if len(lengths) == 1 else (len(lengths), *shape)

    @property
    def codebook_size(self) -> int:
        """Number of entries of each codebook."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Number of codes from each codebook: all cells of a grid, for each of its codebooks."""
        return tuple(height * width for height, width in self.grid_shapes() for _ in range(self.num_quantizers))

    @property
    def supports_prefix_decoding(self) -> bool:
        """True for a residual quantizer on one grid, where the codes of a cell add up."""
        return self.num_quantizers > 1 and self.config.num_grids == 1

    def grid_shapes(self, image_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Return the height and width of each grid, coarse to fine.

        Args:
            image_size: Height and width of the images in pixels. None = `config.image_size`.

        Raises:
            ValueError: If they are not multiples of the stride.
        """
        return self.config.grid_shapes(image_size or (self.config.image_size, self.config.image_size))

    def grids(self) -> list[Any]:
        """Return the modules of each grid, coarse to fine; the finest is the model itself.

        Each has a `quant_conv`, `quantizer`, `post_quant_conv` and `decoder`.
        """
        return [*reversed(self.top_grids), self]

    def codebook_vectors(self) -> list[Tensor]:
        """Return the codebooks, `k d` each, in the order of `positions_per_codebook`."""
        return [codebook for grid in self.grids() for codebook in grid.quantizer.codebooks()]

    @property
    def num_init_examples(self) -> int:
        """Number of images with enough cells for k-means."""
        return max(1, MAX_INIT_VECTORS // math.prod(self.grid_shapes()[-1]))

    @torch.no_grad()
    def init_from_data(self, pixel_values: Tensor) -> None:
        """Initialize all codebooks by k-means on the latents of images, coarse to fine.

        Args:
            pixel_values: Images in [0, 1], `b c h w`; the first `num_init_examples` are used.
        """
        images = pixel_values[: self.num_init_examples]
        with eval_mode(self):
            features = self._encode_features(self.normalize(images))
            self._quantize_grids(features, init_codebooks=True, reconstruct=False)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, *, search_steps: int = 0) -> Tensor:
        """Encode images `b c h w` in [0, 1] to codes `b n`.

        Codes are ordered by grid, coarse to fine, then by codebook, then row by row.

        Args:
            pixel_values: Images in [0, 1], `b c h w`.
            search_steps: Gradient steps on the latents that look for codes with a lower
                reconstruction error (`latent_optimization`). Each costs a forward and a backward
                pass of the decoder. 0 = the entries nearest to the encoder's latents.

        Returns:
            The codes, `b n` int64.

        Raises:
            ValueError: If the images have another number of channels, a size that is not a multiple
                of the stride, or NaN, or if `search_steps` is below 0.
        """
        target = self.normalize(pixel_values, check_range=True)
        if search_steps < 0:
            raise ValueError(f"Expected search_steps of at least 0, got {search_steps}.")
        # Codes are part of a data set: they must depend neither on autocast nor on the batch.
        with torch.autocast(pixel_values.device.type, enabled=False), eval_mode(self):
            if search_steps and len(target):
                encode = partial(self._encode_with_optimization, num_steps=search_steps)
                num_pixels = SEARCH_PIXELS if target.device.type == "cpu" else SEARCH_PIXELS_ON_GPU
                batch_size = max(1, num_pixels // (target.shape[2] * target.shape[3]))
                return torch.cat([batch_invariant_encode(encode, batch) for batch in target.split(batch_size)])
            return batch_invariant_encode(self._encode_nearest, target)

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """Encode images `b c h w` in [0, 1] with `config.search_steps` steps, see `encode`."""
        return self.encode(pixel_values, search_steps=self.config.search_steps)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, image_size: tuple[int, int] | None = None) -> Tensor:
        """Decode codes `b n` to images `b c h w` in [0, 1].

        Args:
            codes: All codes of each image, or the first of them if `supports_prefix_decoding`.
            image_size: Height and width of the images in pixels. None = `config.image_size`.

        Raises:
            ValueError: If the codes have another number, type or range.
        """
        shapes = self.grid_shapes(image_size)
        lengths = [self.num_quantizers * height * width for height, width in shapes]
        self.check_codes(codes, prefix=self.supports_prefix_decoding, num_codes=sum(lengths))
        context: Tensor | None = None
        with torch.autocast(codes.device.type, enabled=False), skip_validation():
            codes_of_grids = codes.long().tensor_split(list(accumulate(lengths))[:-1], dim=1)
            for grid, grid_codes, (height, width) in zip(self.grids(), codes_of_grids, shapes, strict=True):
                latents = self._lookup(grid.quantizer, grid_codes, height, width)
                context = grid.decoder(add_context(grid.post_quant_conv(latents), context))
            assert context is not None
            return self.normalize.inverse(context)

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the images `b c h w` decoded from the first codebook, the first two, and so on.

        Without prefix decoding the only image is that of all codes.

        Args:
            codes: `b n`.
        """
        step = self.positions_per_codebook[0] if self.supports_prefix_decoding else self.num_codes
        for length in range(step, codes.shape[1] + 1, step):
            yield self.decode(codes[:, :length])

    def forward(self, pixel_values: Tensor, reconstruction_loss: ReconstructionLoss | None = None) -> TokenizerOutput:
        """Reconstruct images `b c h w` in [0, 1] and return the training loss.

        The loss is the reconstruction loss of normalized pixels plus that of the quantizers.

        Args:
            pixel_values: Images in [0, 1], `b c h w`.
            reconstruction_loss: Loss of the normalized images. None = the config's.

        Returns:
            The loss, the reconstruction, codes `b n` and metrics (`mse` in pixels; in training
            `perplexity` and `code_usage`, averaged over the grids).
        """
        target = self.normalize(pixel_values)
        quantized = self._quantize_grids(self._encode_features(target))
        assert quantized.reconstruction is not None
        measure = PIXEL_LOSSES[self.config.reconstruction_loss] if reconstruction_loss is None else reconstruction_loss
        metrics = {"mse": self.normalize.squared_error(quantized.reconstruction, target)}
        if self.training:  # in eval mode nothing is counted
            usages = [grid.quantizer.metrics() for grid in self.grids()]
            metrics |= {name: torch.stack([usage[name] for usage in usages]).mean() for name in usages[0]}
        return TokenizerOutput(
            loss=measure(quantized.reconstruction, target) + quantized.loss,
            reconstruction=self.normalize.inverse(quantized.reconstruction),
            codes=flatten_codes(quantized.codes),
            metrics=metrics,
        )

    def _encode_features(self, target: Tensor) -> list[Tensor]:
        """Encode normalized images to features of each grid, `b c h w`, coarse to fine."""
        features = [self.encoder(channels_last(target))]
        for top_grid in self.top_grids:
            assert isinstance(top_grid, TopGrid)
            features.append(top_grid.down(features[-1]))
        return features[::-1]

    def _quantize_grids(
        self,
        features: list[Tensor],
        offsets: Sequence[Tensor | None] = (),
        *,
        init_codebooks: bool = False,
        reconstruct: bool = True,
    ) -> QuantizedImages:
        """Quantize the latents of all grids, coarse to fine.

        A coarse grid is decoded to the resolution of the next. There it is added to the features
        that are quantized and to what the decoder reads (Razavi et al. 2019, section 3.1).

        Args:
            features: The encoder's features of each grid, `b c h w`, coarse to fine.
            offsets: Offset to the latents of each grid, `b d h w`. Empty = none.
            init_codebooks: Initialize each codebook from its latents before it is used.
            reconstruct: Decode the finest grid too.
        """
        context: Tensor | None = None
        codes, losses, residuals = [], [], []
        for grid, grid_features, offset in zip(self.grids(), features, offsets or [None] * len(features), strict=True):
            latents = batch_invariant_conv1x1(grid.quant_conv, add_context(grid_features, context))
            if offset is not None:
                latents = latents + offset
            if init_codebooks:
                grid.quantizer.init_from_data(latents)
            output = grid.quantizer(latents)
            if reconstruct or grid is not self:
                context = grid.decoder(add_context(grid.post_quant_conv(output.quantized), context))
            codes.append(output.codes)
            losses.append(output.loss)
            if offset is not None:
                residuals.append((latents - output.quantized).detach())
        return QuantizedImages(context if reconstruct else None, codes, torch.stack(losses).sum(), residuals)

    def _encode_nearest(self, target: Tensor) -> Tensor:
        """Encode normalized images `b c h w` to the codes `b n` of the nearest entries."""
        return flatten_codes(self._quantize_grids(self._encode_features(target), reconstruct=False).codes)

    def _encode_with_optimization(self, target: Tensor, *, num_steps: int) -> Tensor:
        """Encode normalized images `b c h w` to codes `b n` by gradient steps on their latents."""
        shapes = self.grid_shapes((target.shape[2], target.shape[3]))
        measure = PIXEL_LOSSES[self.config.reconstruction_loss]
        with torch.inference_mode(False):  # a tensor made in inference mode has no gradient, but its copy may
            target = target.clone()
            offsets = [target.new_zeros(len(target), self.config.code_dim, *shape) for shape in shapes]
            quantize = partial(self._quantize_grids, self._encode_features(target))
            codes, _ = optimize_latents(quantize, target, offsets, measure=measure, num_steps=num_steps)
            return flatten_codes(codes)

    def _lookup(self, quantizer: Quantizer, codes: Tensor, height: int, width: int) -> Tensor:
        """Look up the latents of a grid: codes `b n`, or the first of them, -> `b d h w`."""
        if not isinstance(quantizer, ResidualQuantizer):
            return quantizer.lookup(rearrange(codes, "b (h w) -> b h w", h=height))
        num_codes = self.num_quantizers * height * width
        # A prefix is padded by codes that add nothing, so that it may end within a codebook.
        code_mask = torch.arange(num_codes, device=codes.device) < codes.shape[1]
        padded = F.pad(codes, (0, num_codes - codes.shape[1]))
        return quantizer.lookup(
            rearrange(padded, "b (n h w) -> b h w n", h=height, w=width),
            None if codes.shape[1] == num_codes else rearrange(code_mask, "(n h w) -> h w n", h=height, w=width),
        )


def add_context(x: Tensor, context: Tensor | None) -> Tensor:
    """Add the decoded coarser grids, `b c h w`, to `b c h w`; the coarsest grid has no context."""
    return x if context is None else x + context


def flatten_codes(codes: list[Tensor]) -> Tensor:
    """Flatten codes of each grid, `b h w` or `b h w n`, to `b n`, row by row."""
    return torch.cat(
        [each.flatten(1) if each.ndim == 3 else rearrange(each, "b h w n -> b (n h w)") for each in codes], dim=1
    )


def residual_stack(width: int, num_blocks: int) -> list[nn.Module]:
    """Build residual blocks for a latent grid of `width` channels."""
    return [ResidualBlock(width, max(1, width // 2)) for _ in range(num_blocks)]
